"""A file is the result to the bit, or an error; whatever the numbers and the tokens are."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

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
