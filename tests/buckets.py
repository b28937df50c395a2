"""An object store for tests: moto's server of S3 on this machine, asked over HTTP."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """The server's address, with the environment that leads to it."""
    pytest.importorskip("obstore", reason="obstore is an extra: `make ray` runs this")
    moto = pytest.importorskip("moto.server", reason="moto is an S3 server for tests: `make ray` runs this")
    running = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    own = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ALLOW_HTTP": "true", "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
    }  # fmt: skip
    before = {name: os.environ.get(name) for name in own}
    os.environ.update(own)
    yield own["AWS_ENDPOINT_URL"]
    running.stop()
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value


@pytest.fixture
def bucket(server: str) -> str:
    """The address of an empty bucket."""
    import boto3  # pyright: ignore[reportMissingImports]  (moto brings it)

    name = f"b{uuid.uuid4().hex}"
    boto3.client("s3", endpoint_url=server).create_bucket(Bucket=name)
    return f"s3://{name}"
