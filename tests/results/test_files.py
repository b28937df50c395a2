"""A file is the result to the bit, or an error; whatever the numbers and the tokens are."""

from __future__ import annotations

import json
import pickle
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors.numpy import load_file, save_file

from nnsplice.errors import BadType, FileError
from nnsplice.results import Cell, SweepResult, Table
from results.tables import table

POSITION = st.integers(-(2**31), 2**31)
TEXT = st.text(st.characters(codec=None), max_size=6)  # also halves of pairs, which no UTF-8 has


@st.composite
def tables(draw: st.DrawFn) -> Table:
    prompts, cells = draw(st.integers(1, 3)), draw(st.integers(0, 5))
    plane, ends = (prompts, cells), arrays.arrays(np.float64, prompts)
    return Table(
        tuple(
            Cell(draw(TEXT), draw(TEXT), layer=n, position=draw(st.none() | POSITION | TEXT)) for n in range(cells)
        ),
        draw(arrays.arrays(np.float64, plane)),
        draw(arrays.arrays(np.bool_, plane)),
        draw(arrays.arrays(np.bool_, plane)),
        draw(ends),
        draw(ends),
        tuple(tuple(draw(st.lists(TEXT, max_size=3))) for _ in range(prompts)),
        draw(st.dictionaries(TEXT, st.floats() | st.lists(st.integers()) | TEXT, max_size=3)),
    )  # fmt: skip


@given(made=tables())
def test_any_result_comes_back(made: Table, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("any") / "result.safetensors"
    result = SweepResult(made)
    result.to_file(path)
    again = SweepResult.from_file(path)
    assert again == result and again.digest == result.digest
    for name in ("values", "done", "exists", "clean", "corrupted"):
        assert getattr(again.table, name).tobytes() == getattr(result.table, name).tobytes()
    assert (again.cells, again.tokens, again.run) == (result.cells, result.tokens, result.run)
    # ... and can be looked at, without a warning from the depths.
    result.to_html(path)
    assert len(result.frame()) == result.table.done.sum() and repr(result)
    _ = result.total_effect


@given(data=st.data())
def test_damage_is_found_wherever_it_is(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("flip") / "result.safetensors"
    result = SweepResult(table())
    result.to_file(path)
    raw = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(raw)
    with suppress(FileError):
        assert SweepResult.from_file(path) == result  # what running cost is no part of it


def test_a_header_of_any_length_is_no_pickle(tmp_path: Path) -> None:
    # The file begins with the header's length, and 0x0280, 0x0480 begin a pickle.
    starts = set()
    for length in range(0, 700, 4):
        path = tmp_path / "result.safetensors"
        SweepResult(replace(table(), asked={"model": "x" * length})).to_file(path)
        starts.add(path.read_bytes()[:1])
        SweepResult.from_file(path)
    assert b"\x80" in starts


def test_a_file_needs_its_folder(tmp_path: Path) -> None:
    for write in (SweepResult(table()).to_file, SweepResult(table()).to_html):
        with pytest.raises(FileNotFoundError, match="no folder"):
            write(tmp_path / "none" / "result")


@pytest.mark.parametrize("asked", [{"model": object()}, {"model": {1, 2}}, {("a",): 1}])
def test_what_was_asked_is_plain_data(asked: Any) -> None:
    with pytest.raises(BadType, match="plain data"):
        _ = SweepResult(replace(table(), asked=asked)).digest


def test_numbers_of_numpy_are_plain() -> None:
    asked = {"seed": np.int64(3), "noise": np.float32(0.5)}
    assert SweepResult(replace(table(), asked=asked)) == SweepResult(replace(table(), asked={"seed": 3, "noise": 0.5}))


def test_others_may_read_a_result_as_they_may_any_new_file(tmp_path: Path) -> None:
    plain, written = tmp_path / "plain", tmp_path / "result.safetensors"
    plain.touch()
    SweepResult(table()).to_file(written)
    assert written.stat().st_mode == plain.stat().st_mode


@pytest.mark.parametrize("number", [-0.0, float("inf"), 5e-324, 0.1 + 0.2, float("nan")])
def test_a_file_gives_everything_back_to_the_bit(tmp_path: Path, number: float) -> None:
    whole = table()
    whole.values[0, 0] = number
    result = SweepResult(whole)
    result.to_file(tmp_path / "one.safetensors")
    again = SweepResult.from_file(tmp_path / "one.safetensors")
    for name in ("values", "done", "exists", "clean", "corrupted"):
        mine, other = getattr(whole, name), getattr(again.table, name)
        assert mine.dtype == other.dtype and mine.tobytes() == other.tobytes()
    assert again == result and hash(again) == hash(result)
    assert (again.cells, again.tokens, again.run) == (result.cells, result.tokens, result.run)
    assert dict(again.asked) == dict(result.asked)
    assert [p.name for p in tmp_path.iterdir()] == ["one.safetensors"]


def _written(folder: Path) -> Path:
    SweepResult(table()).to_file(folder / "whole")
    return folder / "whole"


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 100, 0.5, 0.9, -1])
def test_a_cut_file_is_refused(tmp_path: Path, keep: float) -> None:
    raw = _written(tmp_path).read_bytes()
    at = int(keep * len(raw)) if isinstance(keep, float) else keep
    (tmp_path / "cut").write_bytes(raw[:at])
    with pytest.raises(FileError, match="damaged"):
        SweepResult.from_file(tmp_path / "cut")


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other"
    for protocol in (2, 4, 5):
        path.write_bytes(pickle.dumps({"values": 1}, protocol))
        with pytest.raises(FileError, match="pickle"):
            SweepResult.from_file(path)
    path.write_bytes(b"PK\x03\x04 and so on")
    with pytest.raises(FileError, match="pickle"):
        SweepResult.from_file(path)
    path.write_text("something else altogether")
    with pytest.raises(FileError, match="damaged"):
        SweepResult.from_file(path)
    save_file({"values": np.zeros(3)}, path)
    with pytest.raises(FileError, match="no result of a sweep"):
        SweepResult.from_file(path)
    with pytest.raises(FileNotFoundError):
        SweepResult.from_file(tmp_path / "none")


def _changed(path: Path, arrays: dict[str, Any] | None = None, **header: Any) -> None:
    """The same file with another header or other arrays."""
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        told = json.loads(file.metadata()["nnsplice"])
    there = load_file(path)
    told = {key: value for key, value in {**told, **header}.items() if value is not ...}
    save_file({**there, **(arrays or {})}, path, metadata={"nnsplice": json.dumps(told)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 99}, "format 99"),
        ({"format": "one"}, "damaged"),
        ({"kind": "SavedActivation"}, "no result"),
        ({"cells": ...}, "damaged"),
        ({"cells": [{"route": "x"}]}, "damaged"),
        ({"cells": []}, "damaged"),
        ({"tokens": 3}, "damaged"),
        ({"asked": 3}, "damaged"),
        ({"run": {"speed": 1}}, "damaged"),
        ({"arrays": {"values": np.zeros((2, 3))}}, "damaged"),
        ({"arrays": {"corrupted": np.zeros(5)}}, "damaged"),
        ({"arrays": {"exists": np.zeros(5, dtype=bool)}}, "damaged"),
        ({"arrays": {"values": np.zeros((2, 14), dtype=np.float32)}}, "damaged"),
    ],
)
def test_a_file_whose_parts_do_not_fit_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = _written(tmp_path)
    _changed(path, **change)
    with pytest.raises(FileError, match=message):
        SweepResult.from_file(path)


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _written(tmp_path)
    before = path.read_bytes()

    def fails(*_: Any, **__: Any) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr("safetensors.numpy.save_file", fails)
    with pytest.raises(OSError, match="full"):
        SweepResult(replace(table(), clean=np.zeros(2))).to_file(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["whole"]
