"""`saved.slice`: rows of the batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import nnsplice as ns
from activations.captures import captures, hand
from nnsplice.errors import BadArgument, BadType, ShortRow

KEY = "layers[0].output[-1]"
ROWS = 10


@pytest.fixture
def saved() -> ns.SavedActivation:
    return hand(KEY, "layers[1].output[0]", rows=ROWS)


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        (np.s_[0:4], [0, 1, 2, 3]),
        (np.s_[3], [3]),
        (np.s_[-1], [9]),
        (np.s_[0:2, 5, 7:9], [0, 1, 5, 7, 8]),
        (range(2, 8, 3), [2, 5]),
        (range(3, -1, -1), [3, 2, 1, 0]),
        (np.s_[7:], [7, 8, 9]),
        (np.s_[:2], [0, 1]),
        (np.s_[:], list(range(10))),
        (np.s_[::4], [0, 4, 8]),
        (np.s_[::-1], list(range(9, -1, -1))),
        (np.s_[8:99], [8, 9]),
        (np.s_[-2:], [8, 9]),
        (np.s_[5, 5, 0], [5, 5, 0]),
        (np.s_[3:0, 1], [1]),
        (np.s_[range(2), -1, 4:6], [0, 1, 9, 4, 5]),
        (np.int64(3), [3]),
        (torch.tensor(4), [4]),
        (slice(np.int64(0), torch.tensor(2)), [0, 1]),
    ],
)
def test_every_selector_takes_the_rows_that_python_would(
    saved: ns.SavedActivation, selector: Any, expected: list[int]
) -> None:
    taken = saved.slice[selector]
    assert taken.keys() == saved.keys() and taken.rows == len(expected)
    for key in saved:
        assert torch.equal(taken[key], saved[key][expected])


bounds = st.none() | st.integers(-15, 15)


@given(
    st.lists(st.integers(-ROWS, ROWS - 1) | st.builds(slice, bounds, bounds, st.none() | st.integers(1, 4)), min_size=1)
)
def test_several_selectors_stand_one_after_another(parts: list[int | slice]) -> None:
    saved = hand(KEY, rows=ROWS)
    numbers = list(range(ROWS))
    chosen = [n for part in parts for n in (numbers[part] if isinstance(part, slice) else [numbers[part]])]
    if chosen:
        assert torch.equal(saved.slice[tuple(parts)][KEY], saved[KEY][chosen])
    else:
        with pytest.raises(BadArgument, match="selects none"):
            saved.slice[tuple(parts)]


@given(captures(), st.data())
def test_parts_put_side_by_side_are_the_whole(saved: ns.SavedActivation, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, saved.rows))
    whole = saved.slice[:cut, cut:]
    assert all(torch.equal(whole[key], saved[key]) for key in saved)


@pytest.mark.parametrize("selector", [10, -11, range(8, 11), np.s_[0:2, 12]])
def test_a_number_out_of_bounds_is_an_index_error(saved: ns.SavedActivation, selector: Any) -> None:
    with pytest.raises(IndexError, match=r"capture with 10 rows[\s\S]*\[0\] to \[9\], or \[-10\] to \[-1\]"):
        saved.slice[selector]
    with pytest.raises(ShortRow, match=r"row 0 of a capture with 0 rows$"):
        ns.SavedActivation().slice[0]


@pytest.mark.parametrize(
    ("selector", "text"), [(np.s_[4:4], r"slice\[4:4\]"), (np.s_[20:], r"slice\[20:\]"), ((), r"slice\[\(\)\]")]
)
def test_no_rows_at_all_is_a_mistake(saved: ns.SavedActivation, selector: Any, text: str) -> None:
    with pytest.raises(BadArgument, match=text + " selects none of the 10 rows"):
        saved.slice[selector]


@pytest.mark.parametrize("selector", [True, None, 1.5, "0", [0, 1], np.array([0, 1]), np.s_[0, "x"]])
def test_anything_else_is_a_type_error(saved: ns.SavedActivation, selector: Any) -> None:
    with pytest.raises(BadType, match="selects no rows"):
        saved.slice[selector]


def test_a_step_of_zero_is_an_error_as_in_python(saved: ns.SavedActivation) -> None:
    with pytest.raises(ValueError, match="step cannot be zero"):
        saved.slice[::0]


def test_rows_and_places_that_are_taken_own_their_memory() -> None:
    rows, positions, width = 40, 3, 16
    saved = ns.SavedActivation.from_pairs(
        *((f"layers[{i}].output[{p}]", torch.randn(rows, width)) for i in range(2) for p in range(positions))
    )
    assert held(saved) == 2 * rows * positions * width * 4
    assert held(saved.slice[3]) == held(saved) // rows
    assert held(saved.slice[0:4]) == held(saved.slice[0, 7, 9, 2]) == held(saved) // rows * 4
    assert held(saved.subset("layers[0].output[1]")) == held(saved.subset("layers[1].output[1:2]")) == held(saved) // 6
    assert held(saved.subset("layers[0].output[1:3]").slice[3:5]) == 2 * 2 * width * 4
    whole = saved.slice[:]  # all of it needs no copy
    assert whole._packs[0].tensor.untyped_storage().data_ptr() == saved._packs[0].tensor.untyped_storage().data_ptr()
    row = saved.slice[3]
    assert torch.equal(row["layers[1].output[2]"], saved["layers[1].output[2]"][3:4])


def held(saved: ns.SavedActivation) -> int:
    """The bytes that a capture keeps alive."""
    storages = {p.tensor.untyped_storage().data_ptr(): p.tensor.untyped_storage().nbytes() for p in saved._packs}
    return sum(storages.values())
