"""What is left when a write ends badly, and what is said of a checkpoint that is damaged."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints.folders import read
from nnsplice import checkpoints as ck
from nnsplice.checkpoints.io import staging, swap
from nnsplice.errors import FileError, MapperError, MissingCheckpoint, WriteFailed

SCRIPT = Path(__file__).parents[1] / "checkpoint_faults.py"
KB = 1 / 1024**2


def trials(*arguments: str, before: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """What the script prints, from a process of its own."""
    command = [*before, sys.executable, str(SCRIPT), *arguments]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def check_trial(told: dict[str, Any]) -> None:
    """The old checkpoint or the new one, whole; and a second call makes the new one, and leaves nothing else."""
    if told["after"] != 200:
        assert told["after"] == 100 if told["old"] else "MissingCheckpoint" in told["after"], told
    assert (told["code again"], told["in the end"]) == (0, 200), told
    # A lock that was never given is a file of its own for a moment.
    assert [name for name in told["left"] if not name.startswith(".ck.lock.")] == [], told
    assert told["inside"] == 4 + 2, told  # shards, index, config


def test_a_kill_at_any_step_leaves_one_whole_checkpoint_and_can_be_gone_on_with(tmp_path: Path):
    found = trials("kills", str(tmp_path / "work"))
    assert len(found) > 30
    for told in found:
        check_trial(told)
    for old in (True, False):
        mine = [told for told in found if told["old"] is old]
        assert [told["code"] for told in mine] == [-9] * (len(mine) - 1) + [0]
        # Kills fell between any two of the files.
        finished = {told["finished"] for told in mine}
        assert finished <= set(range(5)) and len(finished) >= (3 if old else 2)
        assert {told["after"] == 200 for told in mine} == {True, False}


def test_a_kill_at_any_time(tmp_path: Path):
    found = trials("timed", str(tmp_path / "work"), "4")
    for told in found:
        check_trial(told)
    assert -9 in {told["code"] for told in found}


def test_a_full_disk_leaves_the_old_checkpoint_and_names_file_and_tensor(tmp_path: Path):
    mount = ("unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=300k tmpfs "$0" && exec "$@"', str(tmp_path))
    if subprocess.run([*mount, "true"], capture_output=True).returncode:
        pytest.skip("this system lets nobody mount a small disk")
    found = trials("full", str(tmp_path), before=mount)
    assert len(found) == 14
    for told in found:
        assert "No space left on device while writing " in told["said"] and "resume=True" in told["said"], told
        assert (told["between"], told["in the end"], told["at last"]) == (100, 200, ["ck"])
        assert told["left"] == ([".ck.part"] if told["resume"] else []), told
    # Full in every file, and after the last one; what was finished is kept for those who go on.
    for file in range(1, 5):
        assert any(f"{file:05d}.safetensors: No space" in told["said"] for told in found)
    assert any("the index and other files" in told["said"] for told in found)
    assert len({told["finished"] for told in found if told["resume"]}) >= 3
    assert {told["finished"] for told in found if not told["resume"]} == {0}


def test_a_limit_on_files_leaves_the_old_checkpoint_and_names_file_and_tensor(tmp_path: Path):
    (told,) = trials("limited", str(tmp_path))
    assert (
        told["said"].startswith("WriteFailed")
        and "00001.safetensors: File too large while writing made.0" in told["said"]
    )
    assert (told["after"], told["there"]) == (100, ["ck"])


# -- in this process ---------------------------------------------------------------------------------------------------


def save(folder: Path, value: float, count: int = 6, **options: Any) -> None:
    mapper = ck.Parallel([ck.Identity(f"t{i}") for i in range(count)])
    states = ((f"t{i}", torch.full((600,), value + i)) for i in range(count))
    ck.write_model_state_local(folder, mapper, states, 2.5 * KB, show_progress=False, **options)


def holds(folder: Path, value: float, count: int = 6) -> bool:
    mapper = ck.Parallel([ck.Identity(f"t{i}") for i in range(count)])
    found = dict(ck.read_model_state(folder, mapper, "cpu", show_progress=False))
    return all((found[f"t{i}"] == value + i).all() for i in range(count))


@pytest.mark.parametrize("stop", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_the_old_checkpoint_and_nothing_else(tmp_path: Path, stop: type[BaseException]):
    save(tmp_path / "ck", 1)

    def states():
        for i in range(4):
            yield f"t{i}", torch.full((600,), 50.0)
        raise stop("enough")

    mapper = ck.Parallel([ck.Identity(f"t{i}") for i in range(6)])
    with pytest.raises(stop):
        ck.write_model_state_local(tmp_path / "ck", mapper, states(), 2.5 * KB, show_progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["ck"] and holds(tmp_path / "ck", 1)


def test_going_on_applies_only_what_is_missing(tmp_path: Path):
    applied: list[str] = []

    class Noting(ck.Identity):
        def _compute(self, *tensors: torch.Tensor):
            applied.append(self.name)
            return tensors

    mapper = ck.Parallel([Noting(f"t{i}") for i in range(6)])

    def states(stop: int):
        for i in range(6):
            if i == stop:
                raise RuntimeError("stopped")
            yield f"t{i}", torch.full((600,), 1.0 + i)

    with pytest.raises(RuntimeError, match="stopped"):
        ck.write_model_state_local(tmp_path / "ck", mapper, states(4), 2.5 * KB, False, resume=True)
    assert applied == ["t0", "t1", "t2", "t3"]
    applied.clear()
    ck.write_model_state_local(tmp_path / "ck", mapper, states(9), 2.5 * KB, False, resume=True)
    assert applied == ["t3", "t4", "t5"]  # t3 stood in a file that was not finished
    assert holds(tmp_path / "ck", 1) and [path.name for path in tmp_path.iterdir()] == ["ck"]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_a_place_that_may_not_be_written_to_is_told_with_what_to_write_instead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def denied(_path: Path) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(staging, "Lock", denied)
    with pytest.raises(
        WriteFailed, match=r"expected: a destination in a folder that may be written[\s\S]*write: "
    ) as told:
        ck.write_model_state_local(tmp_path / "ck", ck.Identity("a"), [("a", torch.ones(2))], show_progress=False)
    assert os.strerror(number) in str(told.value) and told.value.errno == number


def test_finished_files_are_gone_on_with_where_the_last_step_failed(tmp_path: Path) -> None:
    mapper = ck.Parallel([ck.Identity(f"t{n}") for n in range(4)])

    def offered() -> list[tuple[str, torch.Tensor]]:
        return [(f"t{n}", torch.full((256,), float(n))) for n in range(4)]

    arguments: dict[str, Any] = {"shard_size_gb": 1 * KB, "show_progress": False, "resume": True}
    with pytest.raises(WriteFailed):  # a file that should come along is not there, and all files have their last names
        ck.write_model_state_local(tmp_path / "ck", mapper, offered(), carry={"note": tmp_path / "none"}, **arguments)
    there = {path.stat().st_ino for path in (tmp_path / ".ck.part" / "weights").glob("*.safetensors")}
    assert len(there) == 4
    ck.write_model_state_local(tmp_path / "ck", mapper, offered(), **arguments)
    assert {path.stat().st_ino for path in (tmp_path / "ck").glob("*.safetensors")} == there
    assert [float(tensor[0]) for tensor in read(tmp_path / "ck").values()] == [0, 1, 2, 3]


class Times(ck.ModelStateMapper):
    """A mapper of somebody's own, of whose groups nothing tells what it does."""

    def __init__(self, factor: float, then: ck.ModelStateMapper | None = None) -> None:
        self.factor, self.then = factor, then

    def state_dependency_groups(self) -> frozenset[ck.StateGroup]:
        return frozenset(ck.StateGroup(frozenset({name}), frozenset({name})) for name in ("t0", "t1"))

    def apply(self, group: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: tensor * self.factor for name, tensor in group.items()}


def test_a_mapper_of_ones_own_is_another_with_another_number(tmp_path: Path):
    def stopped():
        yield "t0", torch.ones(600)
        raise RuntimeError("stopped")

    states = [("t0", torch.ones(600)), ("t1", torch.full((600,), 1.5))]
    with pytest.raises(RuntimeError):
        ck.write_model_state_local(tmp_path / "ck", Times(2.0), stopped(), 1 * KB, False, resume=True)
    for other in (Times(3.0), Times(2.0, Times(3.0))):
        with pytest.raises(FileError, match="asked for something else"):
            ck.write_model_state_local(tmp_path / "ck", other, states, 1 * KB, False, resume=True)
    ck.write_model_state_local(tmp_path / "ck", Times(2.0), states, 1 * KB, False, resume=True)
    assert holds(tmp_path / "ck", 2, count=2)


def test_another_job_does_not_go_on_with_what_is_there(tmp_path: Path):
    def stopped():
        yield "t0", torch.ones(600)
        raise RuntimeError("stopped")

    mapper = ck.Parallel([ck.Identity("t0"), ck.Identity("t1")])
    with pytest.raises(RuntimeError):
        ck.write_model_state_local(tmp_path / "ck", mapper, stopped(), 2.5 * KB, False, resume=True, source="a")
    for other, source in ((mapper, "b"), (ck.Parallel([ck.Identity("t0"), ck.Rename("t1", "x")]), "a")):
        with pytest.raises(FileError, match="asked for something else"):
            ck.write_model_state_local(tmp_path / "ck", other, [], 2.5 * KB, False, resume=True, source=source)
    states = [("t0", torch.ones(600)), ("t1", torch.ones(600))]
    ck.write_model_state_local(tmp_path / "ck", mapper, states, 2.5 * KB, False, source="b")
    assert [path.name for path in tmp_path.iterdir()] == ["ck"]


def test_two_writers_at_once_do_not_meet(tmp_path: Path):
    inside, go_on = threading.Event(), threading.Event()

    def slow():
        yield "t0", torch.ones(3)
        inside.set()
        go_on.wait(30)

    first = threading.Thread(
        target=ck.write_model_state_local,
        args=(tmp_path / "ck", ck.Identity("t0"), slow()),
        kwargs={"show_progress": False},
    )
    first.start()
    assert inside.wait(30)
    try:
        with pytest.raises(FileError, match="is being written by process"):
            save(tmp_path / "ck", 5)
    finally:
        go_on.set()
        first.join()
    assert len(ck.Checkpoint.open(tmp_path / "ck")) == 1
    save(tmp_path / "ck", 5)
    assert holds(tmp_path / "ck", 5)


def test_a_system_without_the_one_step_takes_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(swap, "_exchanged", lambda one, other: False)
    save(tmp_path / "ck", 1)
    (tmp_path / "ck" / "config.json").write_text("{}")
    save(tmp_path / "ck", 2)
    assert holds(tmp_path / "ck", 2) and (tmp_path / "ck" / "config.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["ck"]
    # A process that ended between the two steps: the next one puts the old checkpoint back first.
    (tmp_path / ".ck.part").mkdir()
    (tmp_path / "ck").rename(tmp_path / ".ck.part" / "old")
    with pytest.raises(MapperError):
        ck.write_model_state_local(tmp_path / "ck", ck.Identity("a"), [], show_progress=False)
    assert holds(tmp_path / "ck", 2)


# -- damaged sources ---------------------------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path: Path) -> Path:
    save(tmp_path / "src", 1)
    return tmp_path / "src"


def convert(source: Path) -> None:
    """Read the whole of it into another checkpoint, which is there already."""
    mapper = ck.Parallel([ck.Identity(f"t{i}") for i in range(6)])
    save(source.parent / "dst", 9)
    ck.write_model_state_local(
        source.parent / "dst", mapper, ck.read_model_state(source, mapper, "cpu", False), show_progress=False
    )


@pytest.mark.parametrize("length", [0, 5, 8, 100, 2000])
def test_a_shard_that_was_cut_off(source: Path, length: int):
    shard = source / "model-00004-of-00006.safetensors"
    shard.write_bytes(shard.read_bytes()[:length])
    with pytest.raises(FileError, match=r"model-00004-of-00006\.safetensors is cut off") as caught:
        convert(source)
    assert length < 2000 or "t3 ends at byte" in str(caught.value)
    assert holds(source.parent / "dst", 9)


def test_a_shard_that_is_missing(source: Path):
    (source / "model-00004-of-00006.safetensors").unlink()
    with pytest.raises(MissingCheckpoint, match=r"model-00004-of-00006\.safetensors is missing; .* holds t3"):
        convert(source)
    assert isinstance(MissingCheckpoint("x"), FileNotFoundError) and holds(source.parent / "dst", 9)
    # What does not need it can still be read.
    assert len(dict(ck.read_model_state(source, ck.Identity("t0"), "cpu", False))) == 1


def test_an_index_that_is_wrong(source: Path):
    path = source / "model.safetensors.index.json"
    told = json.loads(path.read_text())
    told["weight_map"]["t3"] = told["weight_map"]["t0"]
    path.write_text(json.dumps(told))
    with pytest.raises(FileError, match=r"says that t3 is in model-00001-of-00006\.safetensors, but it is not"):
        convert(source)
    for text in ("{", "[]", '{"weight_map": 3}'):
        path.write_text(text)
        with pytest.raises(FileError, match=r"index\.json is damaged"):
            convert(source)
    assert holds(source.parent / "dst", 9)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"dtype": "F32", "shape": [600], "data_offsets": [0, 2396]}, r"t3 in .* has 2396 bytes"),
        ({"dtype": "F32", "shape": [-600], "data_offsets": [0, 2400]}, "t3 in "),
        ({"dtype": "F99", "shape": [600], "data_offsets": [0, 2400]}, "t3 in .* is of type F99"),
        ({"dtype": "F32", "shape": [600]}, "header of .* is damaged"),
        ("nonsense", "header of .* is damaged"),
    ],
)
def test_a_header_that_is_wrong(source: Path, entry: object, said: str):
    header = json.dumps({"t3": entry}).encode()
    shard = source / "model-00004-of-00006.safetensors"
    shard.write_bytes(len(header).to_bytes(8, "little") + header + bytes(2400))
    with pytest.raises(FileError, match=said):
        convert(source)
    assert holds(source.parent / "dst", 9)


def test_a_file_that_is_something_else(source: Path):
    shard = source / "model-00004-of-00006.safetensors"
    shutil.copy(__file__, shard)
    with pytest.raises(FileError, match="no safetensors file"):
        convert(source)
