"""What a server does with a remote request, in a process of its own that has no nnsplice.

    python remote_server.py FAMILY REQUEST RESULT

builds the tiny model, runs the request against it, and saves the dictionary of values that came out.
"""

from __future__ import annotations

import sys
from pathlib import Path


class Absent:
    """nnsplice is not installed on a server: whoever imports it there fails."""

    def find_spec(self, name: str, *_: object) -> None:
        if name.split(".")[0] == "nnsplice":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def main(family: str, request: str, result: str) -> None:
    sys.meta_path.insert(0, Absent())
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import torch
    from nnsight.schema.request import RequestModel
    from nnsight.tracing import tracer as tracing

    import zoo

    model = zoo.wrap(family)
    tracer = RequestModel.deserialize(Path(request).read_bytes(), model._remoteable_persistent_objects())
    tracing.inc()
    try:
        tracer.execute(tracer.info.code)
        saved = {name: value for name, value in tracer.info.frame.f_locals.items() if id(value) in tracing._saves()}
    finally:
        tracing.dec()
    assert not any(name.split(".")[0] == "nnsplice" for name in sys.modules)
    torch.save(saved, result)


if __name__ == "__main__":
    main(*sys.argv[1:])
