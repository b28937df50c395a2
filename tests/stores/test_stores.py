"""Folders and object stores do the same: the same tests on both; `make ray` installs what the object store needs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import nnsplice as ns
from buckets import bucket, server  # noqa: F401  (fixtures)
from nnsplice import stores
from nnsplice.errors import BadArgument, FileError, MissingPackage, StoreError
from nnsplice.locks import this_process
from nnsplice.stores import Store, is_address, store_of
from zoo import wrap


@pytest.fixture(params=["folder", "object store"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    found = store_of(tmp_path / "a" if request.param == "folder" else f"{request.getfixturevalue('bucket')}/a/b")
    found.make()
    assert found.names() == []
    return found


def test_files_are_written_read_and_removed(store: Store) -> None:
    assert not store.has("x/one")
    with pytest.raises(FileNotFoundError):
        store.read("x/one")
    store.write("x/one", b"1")
    store.write("x/one", b"2")
    with store.writing("two") as path:
        path.write_bytes(b"22")
    assert (store.read("x/one"), store.read("two"), store.has("x/one")) == (b"2", b"22", True)
    assert (sorted(store.names()), store.names("x"), store.names("y")) == (["two", "x"], ["one"], [])
    store.remove("two")
    store.remove("two")
    assert store.names() == ["x"]
    store.clear()
    assert store.names() == []


def test_a_block_that_fails_writes_nothing(store: Store) -> None:
    store.write("x/one", b"before")
    with pytest.raises(ZeroDivisionError), store.writing("x/one") as path:
        path.write_bytes(b"half")
        raise ZeroDivisionError
    assert store.read("x/one") == b"before"
    assert store.names("x") == ["one"]


def test_of_many_at_once_one_creates(store: Store) -> None:
    store.write("claims/other", b"")
    for round_ in range(5):
        ready, first = threading.Barrier(8), []

        def create(number: int, name: str = f"claims/{round_}", ready: Any = ready, first: Any = first) -> None:
            ready.wait()
            if store.create(name, str(number).encode()):
                first.append(number)

        threads = [threading.Thread(target=create, args=(number,)) for number in range(8)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        (winner,) = first
        assert store.read(f"claims/{round_}") == str(winner).encode()


def test_a_sign_of_life_makes_a_file_young(store: Store) -> None:
    store.write("x/one", b"1")
    time.sleep(2.1)
    assert 1 <= store.age("x/one") < 60
    store.touch("x/one")
    store.touch("x/gone")
    assert store.age("x/one") < 2
    assert store.read("x/one") == b"1"
    assert store.names("x") == ["one"]
    with pytest.raises(FileNotFoundError):
        store.age("x/gone")


def test_lines_are_appended(store: Store) -> None:
    store.write("x/other", b"")
    for line in ("a\n", "b\n"):
        store.append("x/log", line)
    store.flush()
    store.append("x/log", "c\n")
    store.flush()
    assert store.read("x/log") == b"a\nb\nc\n"


def test_a_lock_is_held_by_one(store: Store) -> None:
    lock = store.lock("driver")
    with pytest.raises(FileError, match=rf"driver is being written by process {os.getpid()}"):
        store.lock("driver")
    lock.release()
    assert store.names() == []
    again = store.lock("driver")
    code = "import sys\nfrom nnsplice.stores import store_of\nstore_of(sys.argv[1]).lock('driver')"
    told = subprocess.run([sys.executable, "-c", code, store.address], capture_output=True, text=True, check=False)
    assert f"is being written by process {os.getpid()}" in told.stderr
    again.release()


def test_the_lock_of_a_process_that_is_gone_is_taken_over(store: Store) -> None:
    code = "import json; from nnsplice.locks import this_process; print(json.dumps(this_process()))"
    gone = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    for text in (gone.stdout, b"", b"not JSON"):
        store.write("driver.lock", text)
        store.lock("driver").release()
        assert store.names() == []


def test_the_lock_of_another_machine_is_taken_over_when_its_lease_is_over(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = json.dumps({**this_process(), "host": "elsewhere x"}).encode()
    store.write("driver.lock", words)
    with pytest.raises(FileError, match=r"process \d+ on elsewhere"):
        store.lock("driver")
    for module in ("nnsplice.locks.LEASE", "nnsplice.stores.cloud.LEASE"):
        monkeypatch.setattr(module, 1.0)
    time.sleep(3)
    lock = store.lock("driver")
    assert store.read("driver.lock") != words
    lock.release()


def test_single_files_are_written_whole(store: Store) -> None:
    path = store.at("one.txt")
    with stores.whole(path) as temporary:
        temporary.write_bytes(b"0123456789")
    with stores.opened(path) as file:
        assert file.local.read_bytes() == b"0123456789"
        assert file.is_same()
        store.write("one.txt", b"01234x6789")
        assert not file.is_same()


def test_ranges_are_fetched_alone(bucket: str) -> None:  # noqa: F811
    store = store_of(bucket)
    store.write("a.safetensors", (4).to_bytes(8, "little") + b"head" + b"0123456789")
    with stores.opened(store.at("a.safetensors"), header=True) as file:
        assert file.local.read_bytes()[8:] == b"head" + bytes(10)
        file.fetch(15, 4)
        assert file.local.read_bytes()[12:] == bytes(3) + b"3456" + bytes(3)


def test_a_store_that_takes_a_second_writer_is_refused(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    store: Any = store_of(f"{bucket}/a")

    class Careless:
        def __getattr__(self, name: str) -> Any:
            return getattr(store.inner, name)

        def put(self, name: str, data: bytes, mode: Any = "overwrite") -> None:
            store.inner.put(name, data)

    with pytest.raises(BadArgument, match="takes a second writer"):
        type(store)(store.address, Careless()).make()
    assert store.names() == []


def test_a_put_whose_answer_was_lost_is_ones_own(bucket: str) -> None:  # noqa: F811
    """obstore sends it again, and then finds what it has written itself."""
    store = store_of(bucket)
    store.write("claim", b"mine")
    assert store.create("claim", b"mine")
    assert not store.create("claim", b"of another")


def test_what_is_wrong_with_a_store_is_told(server: str, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    with pytest.raises(StoreError, match="bucket that is not there"):
        store_of("s3://nowhere/run").make()
    with pytest.raises(StoreError, match="bucket that is not there"):
        store_of("s3://nowhere/run").read("x")


@pytest.mark.parametrize(
    ("address", "what"),
    [
        ("s3://", "no address"), ("s3:///a", "no address"), ("s3://b/../c", "no address"),
        ("s3://b/a//c", "no address"),
        ("http://host/a", "no address of an object store"), ("file:///tmp/a", "no address of an object store"),
        (Path("s3://bucket/a"), r"write: 's3://bucket/a'"),
    ],
)  # fmt: skip
def test_other_addresses_are_refused(address: Any, what: str) -> None:
    with pytest.raises(BadArgument, match=what):
        store_of(address)


def test_paths_are_no_addresses() -> None:
    assert [is_address(path) for path in ("a/b", Path("/a"), "s3", "C:/a", "s3://b/a")] == [False] * 4 + [True]


def test_without_the_extra_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    for path in ("s3://bucket/a", "gs://bucket/a"):
        with pytest.raises(MissingPackage, match=r'pip install "nnsplice\[cloud\]"'):
            store_of(path)


@pytest.mark.parametrize("address", ["s3://bucket/a.safetensors", "gs://bucket/a.safetensors"])
def test_files_that_stay_on_a_file_system_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.chdir(tmp_path)
    model = wrap("gpt2")
    subspace = ns.Subspace.of("layers[1].output", torch.eye(4)[:2])
    circuit = ns.Circuit.of(nodes=["layers[0].mlp"], model=model)
    written = (ns.checkpoints.Identity("a"), [("a", torch.zeros(1))])
    question: Any = (model, "w3 w4", "w3 w5", "layers[:].output", ns.rank("w7"))
    for do in (
        lambda: subspace.to_file(address), lambda: ns.Subspace.from_file(address), lambda: circuit.to_file(address),
        lambda: ns.Circuit.from_file(address), lambda: ns.lens.FittedLens.from_file(address),
        lambda: ns.Alignment.from_folder(address), lambda: ns.sweep(*question, journal=address, progress=False),
        lambda: ns.over_revisions(wrap, ["gpt2"], lambda _: ns.sweep(*question), journal=address),
        lambda: ns.checkpoints.write_model_state_local(address, *written),
        lambda: ns.checkpoints.write_model_state_local(Path(address), *written),
        lambda: ns.checkpoints.Checkpoint.open(address), lambda: ns.checkpoints.read(address, "embed"),
        lambda: ns.checkpoints.convert(address, tmp_path / "new", written[0]),
        lambda: ns.checkpoints.mapper_between(address, "tl"), lambda: ns.adapters.read_optimizer(address),
        lambda: ns.adapters.ExpertAdapter.from_peft(address), lambda: ns.steering.read_evals(address),
        lambda: ns.steering.from_gguf(address),
    ):  # fmt: skip
        with pytest.raises(BadArgument, match=r"bucket/a.safetensors is an address of an object store"):
            do()
    assert list(tmp_path.iterdir()) == []
