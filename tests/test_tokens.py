"""Positions become columns of a padded value: against an oracle that writes every token's number down."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nnsplice.errors import BadArgument, LateUpdate, PathError, ShortRow, SpanError
from nnsplice.paths import Slice, Span
from nnsplice.tokens import Rows, absolute, columns, concrete

# ------------------------------------------------------------------------------------------------------------- oracle


@dataclass(frozen=True)
class Batch:
    """Some padded prompts, of which a pass computes the last `width` columns; numbers of own tokens by column."""

    numbers: tuple[tuple[int | None, ...], ...]
    width: int

    @property
    def mask(self) -> torch.Tensor:
        return torch.tensor([[number is not None for number in row] for row in self.numbers]).long()

    def length(self, row: int) -> int:
        return sum(number is not None for number in self.numbers[row])

    def column(self, row: int, position: int) -> int | None:
        """Where a token stands in the value of the pass; None for one of an earlier pass, or of no pass."""
        token = position if position >= 0 else self.length(row) + position
        seen = len(self.numbers[row]) - self.width
        held = self.numbers[row][seen:]
        return held.index(token) if token in held else None


@st.composite
def batches(draw: st.DrawFn, ragged: bool = True, rows: int | None = None) -> Batch:
    """Prompts padded on one side; while generating, padded on the left, and only the newest token is computed."""
    count = draw(st.integers(1, 4)) if rows is None else rows
    lengths = [draw(st.integers(1, 6))] * count
    if ragged:
        lengths = [draw(st.integers(1, 6)) for _ in range(count)]
    total = max(lengths) + draw(st.integers(0, 2))
    step = draw(st.booleans())
    left = step or draw(st.booleans())
    numbers: list[tuple[int | None, ...]] = []
    for length in lengths:
        own, padding = tuple(range(length)), (None,) * (total - length)
        numbers.append((*padding, *own) if left else (*own, *padding))
    return Batch(tuple(numbers), 1 if step else total)


def as_lists(found: list[int] | torch.Tensor, rows: int) -> list[list[int]]:
    return found.tolist() if isinstance(found, torch.Tensor) else [found] * rows


# ---------------------------------------------------------------------------------------------------------------- mask


@given(batches())
def test_a_mask_tells_where_every_row_begins_and_how_long_it_is(batch: Batch) -> None:
    rows = Rows.from_mask(batch.mask)
    assert (rows.batch, rows.width) == tuple(batch.mask.shape)
    expected = [row.index(0) for row in batch.numbers], [batch.length(row) for row in range(len(batch.numbers))]
    if batch.mask.all():
        assert rows.starts is rows.lengths is None
    else:
        assert [list(rows.starts or ()), list(rows.lengths or ())] == list(expected)
    assert rows.length == (expected[1][0] if len(set(expected[1])) == 1 else None)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32, torch.bfloat16])
def test_masks_of_any_dtype_are_read(dtype: torch.dtype) -> None:
    rows = Rows.from_mask(torch.tensor([[0, 0, 1], [0, 1, 1]]).to(dtype))
    assert (rows.starts, rows.lengths) == ((2, 1), (1, 2))


@pytest.mark.parametrize("row", [[1, 0, 1], [0, 1, 0, 1], [1, 1, 0, 1, 0]])
def test_a_mask_with_holes_is_refused(row: list[int]) -> None:
    with pytest.raises(BadArgument, match="holes between the tokens"):
        Rows.from_mask(torch.tensor([[1] * len(row), row]))


def test_a_row_without_tokens_is_named() -> None:
    with pytest.raises(BadArgument, match="leaves no token of row 1"):
        Rows.from_mask(torch.tensor([[0, 1], [0, 0], [1, 1]]))


# ------------------------------------------------------------------------------------------------------------- columns


@given(batches(), st.lists(st.integers(-7, 7), min_size=1, max_size=5))
def test_numbers_count_the_prompts_own_tokens(batch: Batch, positions: list[int]) -> None:
    rows, count = Rows.from_mask(batch.mask), len(batch.numbers)
    expected = [[batch.column(row, position) for position in positions] for row in range(count)]
    if any(None in row for row in expected):
        with pytest.raises(ShortRow):
            columns(positions, rows, batch.width)
    else:
        assert as_lists(columns(positions, rows, batch.width), count) == expected


@given(batches(), st.data())
def test_tokens_of_a_span_are_counted_inside_it(batch: Batch, data: st.DataObject) -> None:
    rows, count = Rows.from_mask(batch.mask), len(batch.numbers)
    bounds: list[tuple[int, int]] = []
    for row in range(count):
        start = data.draw(st.integers(0, batch.length(row) - 1))
        bounds.append((start, data.draw(st.integers(start + 1, batch.length(row)))))
    token = data.draw(st.integers(-3, 3))
    spans = {"s": bounds}
    inside = [list(range(start, stop)) for start, stop in bounds]
    if any(not -len(own) <= token < len(own) for own in inside):
        with pytest.raises(ShortRow, match='span "s" of row'):
            columns([Span("s", token)], rows, batch.width, spans)
        return
    expected = [batch.column(row, own[token]) for row, own in enumerate(inside)]
    if None in expected:
        with pytest.raises(ShortRow, match="earlier step"):
            columns([Span("s", token)], rows, batch.width, spans)
    else:
        found = as_lists(columns([Span("s", token)], rows, batch.width, spans), count)
        assert [column for (column,) in found] == expected
        assert absolute(Span("s", token), [0] * count, spans) == [own[token] for own in inside]


def test_one_list_serves_all_rows_where_they_agree() -> None:
    padded = Rows(2, 4, (2, 1), (2, 3))
    assert columns([-1, -2], padded, 4) == [3, 2]
    found = columns([-1, 0], padded, 4)
    assert isinstance(found, torch.Tensor) and found.tolist() == [[3, 2], [3, 1]]
    assert columns([0, 3], Rows(2, 4), 4) == [0, 3]


def test_a_row_too_short_is_named_with_the_positions_it_has() -> None:
    with pytest.raises(
        IndexError, match=r"row 1 has 2 tokens, so there is no position \[2\]\n.*\[0\] to \[1\], or \[-2\]"
    ):
        columns([2], Rows(2, 4, (0, 2), (4, 2)), 4)
    with pytest.raises(ShortRow, match=r"the prompt has 1 token, so there is no position \[-2\]"):
        columns([-2], Rows(3, 1), 1)


def test_a_step_says_which_of_the_prompts_tokens_it_computes() -> None:
    # Two columns of padding, four own tokens, the last of which is new.
    rows = Rows(1, 6, (2,), (4,))
    assert columns([3], rows, 1) == columns([-1], rows, 1) == [0]
    with pytest.raises(ShortRow, match=r"\[2\] was computed in an earlier step[\s\S]*in this step, token 3 or later"):
        columns([2], rows, 1)


@pytest.mark.parametrize("pads_left", [True, False])
def test_where_the_padding_is_not_known_only_the_other_end_is_counted_from(pads_left: bool) -> None:
    rows = Rows(None, known=False, pads_left=pads_left)
    safe, unsafe = (-1, 0) if pads_left else (0, -1)
    assert columns([safe], rows, 5) == [4 if pads_left else 0]
    with pytest.raises(LateUpdate, match="before the trace's other requests"):
        columns([unsafe], rows, 5)
    with pytest.raises(LateUpdate):
        concrete(Slice(), rows, 5)
    # A span counts from the first token.
    if pads_left:
        with pytest.raises(LateUpdate):
            columns([Span("s", 0)], rows, 5, {"s": [(1, 2)]})
    else:
        assert columns([Span("s", 0)], rows, 5, {"s": [(1, 2)]}) == [1]


def test_spans_are_given_for_every_prompt_of_the_run() -> None:
    for rows in (Rows(2, 4), Rows(2, 4, (0, 1), (4, 3))):
        with pytest.raises(SpanError, match="given for 3 prompts, and the run has 2"):
            columns([Span("s", 0)], rows, 4, {"s": [(0, 1)] * 3})
    with pytest.raises(SpanError, match='the span "s" is not given; spans given: "t"'):
        columns([Span("s", 0)], Rows(1, 4), 4, {"t": [(0, 1)]})
    with pytest.raises(SpanError, match="spans given: none"):
        concrete(Span("s"), Rows(1, 4), 4)


def test_a_span_past_the_end_of_a_row_never_lands_in_its_padding() -> None:
    with pytest.raises(ShortRow, match=r"row 1 has 2 tokens, so there is no position \[3\]"):
        columns([Span("s", 0)], Rows(2, 4, (0, 0), (4, 2)), 4, {"s": [(3, 4), (3, 4)]})
    with pytest.raises(ShortRow):
        columns([Span("s", 0)], Rows(1, 4), 4, {"s": [(4, 5)]})


# ------------------------------------------------------------------------------------------------------------ concrete


@given(
    batches(ragged=False), st.builds(Slice, *[st.none() | st.integers(-8, 8)] * 2, st.sampled_from([None, 1, 2, -1]))
)
def test_a_slice_becomes_the_tokens_it_selects_and_this_pass_computes(batch: Batch, wanted: Slice) -> None:
    rows = Rows.from_mask(batch.mask)
    own = list(range(batch.length(0)))[slice(wanted.start, wanted.stop, wanted.step)]
    expected = [token for token in own if batch.column(0, token) is not None]
    if expected:
        assert concrete(wanted, rows, batch.width) == expected
        assert as_lists(columns(expected, rows, batch.width), 1)[0] == [batch.column(0, p) for p in expected]
    else:
        with pytest.raises(ShortRow, match="selects none of the"):
            concrete(wanted, rows, batch.width)


def test_a_slice_over_rows_of_different_length_says_what_to_write() -> None:
    with pytest.raises(PathError, match=r"\[:\] over prompts of different length \(2, 4 tokens\)[\s\S]*\[-1\], or"):
        concrete(Slice(), Rows(2, 4, (0, 2), (4, 2)), 4)


def test_numbers_and_lists_stay_as_they_were_asked_for() -> None:
    rows = Rows(1, 5)
    assert concrete(-1, rows, 5) == [-1]
    assert concrete((4, -1, 0, 4), rows, 5) == [4, -1, 0]
    assert concrete(Span("s", -1), rows, 5) == [Span("s", -1)]
    assert concrete(Slice(), Rows(None), 3) == [0, 1, 2]  # only the value tells how many there are


def test_a_whole_span_becomes_its_tokens_where_all_are_as_long() -> None:
    assert concrete(Span("s"), Rows(2, 5), 5, {"s": [(0, 2), (3, 5)]}) == [Span("s", 0), Span("s", 1)]
    with pytest.raises(SpanError, match=r'span "s" has 1, 2 tokens in different prompts[\s\S]*\["s"\]\[-1\]'):
        concrete(Span("s"), Rows(2, 5), 5, {"s": [(0, 2), (3, 4)]})


def test_an_absolute_position_is_known_for_single_tokens_only() -> None:
    assert absolute(3, [5, 4], None) == [3, 3]
    assert absolute(-1, [5, 4], None) == [4, 3]
    assert absolute(Span("s", -1), [5, 4], {"s": [(0, 2), (1, 4)]}) == [1, 3]
    assert absolute(Span("s"), [5, 4], {"s": [(0, 2), (1, 4)]}) is None
    assert absolute(Span("mean"), [5, 4], None) is None
