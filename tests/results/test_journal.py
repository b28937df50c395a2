"""A journal gives back every whole line that was written, to the bit, and touches no file that is not its own."""

from __future__ import annotations

import json
import math
import os
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nnsplice.errors import BadArgument, FileError
from nnsplice.locks import LEASE
from nnsplice.results import Journal

ASKED = {"model": "gpt2", "sites": ["layers[0].output[1]"], "metric": {"name": "logit_diff", "ids": (3, 4)}, "seed": 0}
CHUNKS: list[tuple[list[int], list[int], list[float]]] = [
    ([0, 0], [1, 2], [0.1 + 0.2, -0.0]),
    ([0, 1], [3, 0], [math.nan, math.inf]),
    ([1], [5], [5e-324]),
    ([1, 1, 1], [6, 7, 8], [-math.inf, 1e308, -1 / 3]),
]


def _write(path: Path, chunks: Sequence[tuple[list[int], list[int], list[float]]] = CHUNKS) -> bytes:
    with Journal.open(path, ASKED, 9) as journal:
        for chunk in chunks:
            journal.append(*chunk)
    return path.read_bytes()


def _records(path: Path, asked: Any = ASKED) -> dict[tuple[int, int], float]:
    with Journal.open(path, asked, 9) as journal:
        return journal.done()


def _expected(chunks: Sequence[tuple[list[int], list[int], list[float]]]) -> dict[tuple[int, int], bytes]:
    return {(p, c): struct.pack("d", v) for ps, cs, vs in chunks for p, c, v in zip(ps, cs, vs, strict=True)}


def _bits(records: dict[tuple[int, int], float]) -> dict[tuple[int, int], bytes]:
    return {key: struct.pack("d", value) for key, value in records.items()}


def test_everything_comes_back_to_the_bit(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    with Journal.open(path, ASKED, 9) as journal:
        assert journal.done() == {}
        for number, chunk in enumerate(CHUNKS):
            journal.append(*chunk)
            assert _bits(journal.done()) == _expected(CHUNKS[: number + 1])
            assert path.read_bytes().count(b"\n") == number + 2  # on the disk at once
    assert _bits(_records(path)) == _expected(CHUNKS)
    assert [p.name for p in tmp_path.iterdir()] == ["run.jsonl"]


@settings(max_examples=50, deadline=None)
@given(value=st.floats())
def test_any_number_comes_back(value: float, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("any") / "run.jsonl"
    _write(path, [([0], [0], [value])])
    again = _records(path)[0, 0]
    assert math.isnan(again) if math.isnan(value) else struct.pack("d", again) == struct.pack("d", value)


def test_texts_come_back_beside_their_values_and_need_not_be_there(tmp_path: Path) -> None:
    with Journal.open(tmp_path / "j.jsonl", {}, 4) as journal:
        journal.append([0, 0], [0, 1], [1.0, 2.0], ["eins\nzwei", "“ä”"])
        journal.append([1], [0], [3.0])
        assert journal.texts() == {(0, 0): "eins\nzwei", (0, 1): "“ä”"}
        with pytest.raises(BadArgument, match="1 prompt, 1 cell, 1 value, 2 texts"):
            journal.append([1], [1], [4.0], ["a", "b"])
    with Journal.open(tmp_path / "j.jsonl", {}, 4) as journal:
        assert journal.texts() == {(0, 0): "eins\nzwei", (0, 1): "“ä”"} and len(journal) == 3


def test_a_journal_is_gone_on_with(tmp_path: Path) -> None:
    whole = _write(tmp_path / "whole")
    path = tmp_path / "run.jsonl"
    for number in range(len(CHUNKS)):
        _write(path, CHUNKS[number : number + 1])
    assert path.read_bytes() == whole


def test_every_beginning_of_the_file_opens_to_a_beginning_of_the_records(tmp_path: Path) -> None:
    raw = _write(tmp_path / "whole")
    path = tmp_path / "run.jsonl"
    ends = [n + 1 for n, byte in enumerate(raw) if byte == 10]
    for at in sorted({*range(0, len(raw), 11), *ends, *(end - 1 for end in ends), *(end + 1 for end in ends[:-1])}):
        path.write_bytes(raw[:at])
        lines = max(raw[:at].count(b"\n") - 1, 0)
        assert _bits(_records(path)) == _expected(CHUNKS[:lines])
        # ... and what was cut off is gone, so that the next line stands by itself.
        assert _write(path, CHUNKS[lines:]) == raw


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_a_damaged_line_is_an_error_and_the_file_stays(data: st.DataObject, tmp_path_factory: Any) -> None:
    path = tmp_path_factory.mktemp("damaged") / "run.jsonl"
    raw = bytearray(_write(path))
    ends = [n for n, byte in enumerate(raw) if byte == 10]
    at = data.draw(st.integers(ends[0] + 1, len(raw) - 1).filter(lambda n: n not in ends))
    raw[at] = data.draw(st.integers(33, 126).filter(lambda n: n != raw[at]))
    path.write_bytes(raw)
    number = sum(end < at for end in ends) + 1
    with pytest.raises(FileError) as told:
        _records(path)
    assert f"line {number} of" in str(told.value) and f"{len(ends) - number} lines after it" in str(told.value)
    assert f"head -n {number - 1} " in str(told.value)
    assert path.read_bytes() == bytes(raw)
    assert not path.with_name("run.jsonl.lock").exists()


def test_lines_that_are_missing_or_come_twice_are_errors(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    lines = _write(path).splitlines(keepends=True)
    for changed in ([*lines[:2], *lines[3:]], [*lines[:3], *lines[2:]], [lines[0], lines[2], lines[1], *lines[3:]]):
        path.write_bytes(b"".join(changed))
        with pytest.raises(FileError, match="is damaged"):
            _records(path)
        assert path.read_bytes() == b"".join(changed)


def test_a_cell_that_stands_in_two_lines_with_two_values_is_an_error(tmp_path: Path) -> None:
    """Both lines are whole and in order, as two writers on a file system without locks may leave them."""
    path = tmp_path / "run.jsonl"
    first, *lines = _write(path, CHUNKS[:2]).splitlines(keepends=True)
    other = _write(tmp_path / "other.jsonl", [CHUNKS[1], ([0], [1], [7.0])]).splitlines(keepends=True)[2]
    path.write_bytes(b"".join((first, lines[0], other)))
    with pytest.raises(FileError, match=r"line 3 of .* is damaged"):
        _records(path)
    same = _write(tmp_path / "same.jsonl", [CHUNKS[1], CHUNKS[0]]).splitlines(keepends=True)[2]
    path.write_bytes(b"".join((first, lines[0], same)))
    assert _bits(_records(path)) == _expected(CHUNKS[:1])


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({**ASKED, "seed": 1}, r"another sweep\n  seed: 0 there, 1 here\n  expected"),
        ({**ASKED, "model": "llama", "seed": 0}, r"model: 'gpt2' there, 'llama' here"),
        ({k: v for k, v in ASKED.items() if k != "seed"}, "seed: 0 there, None here"),
        ({**ASKED, "window": 3}, "window: None there, 3 here"),
        ({**ASKED, "sites": ["x" * 300]}, r"sites: .* there, \['x+\.\.\. here"),
    ],
)
def test_the_journal_of_another_sweep_is_refused_and_stays(tmp_path: Path, asked: Any, message: str) -> None:
    path = tmp_path / "run.jsonl"
    raw = _write(path) + b'{"n": 4, "pro'
    path.write_bytes(raw)
    with pytest.raises(FileError, match=message):
        _records(path, asked)
    assert path.read_bytes() == raw
    assert [p.name for p in tmp_path.iterdir()] == ["run.jsonl"]


@pytest.mark.parametrize(
    "raw",
    [
        b"my notes\n",
        b"my notes",
        b"{}\n",
        b"[1, 2]\n",
        b"\xff\xfe\x00\n1\n",
        b"\n",
        b'{"kind": "other", "sum": 1}\n',
        b"3",
    ],
)
def test_a_file_that_is_no_journal_is_refused_and_stays(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "run.jsonl"
    path.write_bytes(raw)
    with pytest.raises(FileError, match="no journal of a sweep"):
        _records(path)
    assert path.read_bytes() == raw
    assert [p.name for p in tmp_path.iterdir()] == ["run.jsonl"]


def test_one_process_writes_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    with Journal.open(path, ASKED, 9) as journal:
        with pytest.raises(FileError, match=rf"being written by process {os.getpid()}"):
            Journal.open(path, ASKED, 9)
        code = (
            "import json, sys\nfrom pathlib import Path\nfrom nnsplice.results import Journal\n"
            "try:\n    Journal.open(Path(sys.argv[1]), json.loads(sys.argv[2]), 9)\n"
            "except Exception as error:\n    print(error)"
        )
        told = subprocess.run([sys.executable, "-c", code, path, "{}"], capture_output=True, text=True, check=True)
        assert f"being written by process {os.getpid()}" in told.stdout
        journal.append(*CHUNKS[0])  # the refused ones have not taken the lock away
    assert _bits(_records(path)) == _expected(CHUNKS[:1])


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    _write(path, CHUNKS[:1])
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    lock = path.with_name("run.jsonl.lock")
    for text in (gone.stdout.decode(), "", "not a number"):
        lock.write_text(text)
        with Journal.open(path, ASKED, 9) as journal:
            assert json.loads(lock.read_text())["pid"] == os.getpid()
            assert _bits(journal.done()) == _expected(CHUNKS[:1])
        assert not lock.exists()


def test_the_journal_of_a_driver_that_died_on_another_machine_is_taken_over_after_its_lease(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    _write(path, CHUNKS[:1])
    lock = path.with_name("run.jsonl.lock")
    lock.write_text(json.dumps({"pid": 1, "host": "elsewhere pid:[1]", "began": "1", "lock": "x"}))
    with pytest.raises(FileError, match="being written by process 1 on elsewhere"):
        Journal.open(path, ASKED, 9)
    past = time.time() - LEASE - 5
    os.utime(lock, (past, past))
    with Journal.open(path, ASKED, 9) as journal:
        assert json.loads(lock.read_text())["pid"] == os.getpid()
        assert _bits(journal.done()) == _expected(CHUNKS[:1])
        journal.append(*CHUNKS[1])
    assert not lock.exists()
    assert _bits(_records(path)) == _expected(CHUNKS[:2])


def test_an_error_while_running_gives_the_lock_back(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    with pytest.raises(ZeroDivisionError), Journal.open(path, ASKED, 9) as journal:
        journal.append(*CHUNKS[0])
        raise ZeroDivisionError
    assert _bits(_records(path)) == _expected(CHUNKS[:1])


@contextmanager
def _full_after(size: int) -> Iterator[None]:
    """No file of this process grows beyond this size, as on a disk that is full."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("more", [0, 1, 20, 60])
def test_a_line_that_finds_the_disk_full_leaves_nothing_and_the_lock_is_given_back(tmp_path: Path, more: int) -> None:
    path = tmp_path / "run.jsonl"
    before = _write(path, CHUNKS[:1])
    with Journal.open(path, ASKED, 9) as journal:
        with _full_after(len(before) + more), pytest.raises(OSError, match="File too large"):
            journal.append(*CHUNKS[1])
        assert path.read_bytes() == before and _bits(journal.done()) == _expected(CHUNKS[:1])
        journal.append(*CHUNKS[1])
    with (
        pytest.raises(OSError, match="File too large"),
        Journal.open(path, ASKED, 9) as journal,
        _full_after(path.stat().st_size + more),
    ):
        journal.append(*CHUNKS[2])
    assert not list(tmp_path.glob("*.lock"))
    _write(path, CHUNKS[2:])
    assert path.read_bytes() == _write(tmp_path / "at_once.jsonl")
