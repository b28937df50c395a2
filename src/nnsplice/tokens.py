"""From token positions to columns of a padded value.

Positions count a prompt's own tokens: `[10]` is its eleventh token and `[-1]` its last, for any padding; in a
generation they count from the prompt's first token. `Rows` has the columns of the tokens in a batch; the functions here
turn a position into the columns of one value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nnsplice.errors import BadArgument, LateUpdate, PathError, ShortRow, SpanError
from nnsplice.paths import Position, Slice, Span

#: The name of a span -> its (start, stop) in each prompt.
Spans = Mapping[str, Sequence[tuple[int, int]]]


@dataclass(frozen=True, slots=True)
class Rows:
    """The columns of the prompts' own tokens in the values of one forward pass.

    Attributes:
        batch: the number of prompts; None if the model does not tell it.
        width: the tokens of each row so far, with padding; None if only the value tells it.
        starts: the column of the first own token of each row; None if no row is padded.
        lengths: the number of own tokens of each row; None if no row is padded.
        new: the tokens of each row in this pass: all, or the newest in a decode step; None if it is not known.
        known: False if the padding is no longer known; then positions count from the unpadded end only.
        pads_left: whether unknown padding would be on the left.
    """

    batch: int | None
    width: int | None = None
    starts: tuple[int, ...] | None = None
    lengths: tuple[int, ...] | None = None
    new: int | None = None
    known: bool = True
    pads_left: bool = True

    @staticmethod
    def from_mask(mask: Tensor) -> Rows:
        """Read an attention mask `[prompt, token]`."""
        batch, width = mask.shape
        own = mask != 0
        if bool(own.all()):
            return Rows(batch, width)
        empty = (~own.any(-1)).nonzero().flatten().tolist()
        if empty:
            raise BadArgument(
                f"the attention mask leaves no token of row {empty[0]}", expected="at least one token in every prompt"
            )
        starts = own.int().argmax(-1)
        lengths = own.sum(-1)
        last = width - 1 - own.flip(-1).int().argmax(-1)
        if bool((last - starts + 1 != lengths).any()):
            raise BadArgument(
                "the attention mask has holes between the tokens of a prompt",
                expected="each row's own tokens side by side, padded on the left or on the right",
            )
        return Rows(batch, width, tuple(starts.tolist()), tuple(lengths.tolist()))

    @property
    def length(self) -> int | None:
        """The number of own tokens of each row, if it is the same in all."""
        if self.lengths is None:
            return self.width
        return self.lengths[0] if len(set(self.lengths)) == 1 else None


def concrete(position: Position, rows: Rows, width: int, spans: Spans | None = None) -> list[int | Span]:
    """The single positions of a position.

    A slice becomes the absolute positions that it selects; a list keeps its numbers; a span becomes its tokens.

    Args:
        width: the number of tokens in the value (one, in a decode step).
    """
    if isinstance(position, int):
        return [position]
    if isinstance(position, tuple):
        return list(dict.fromkeys(position))
    if isinstance(position, Slice):
        if not rows.known:
            raise _too_late(f"[{position}]")
        total = rows.length if rows.width is not None else width
        if total is None:
            raise PathError(
                f"[{position}] over prompts of different length ({_some(rows.lengths or ())} tokens) has no one shape",
                expected="prompts of one length, single positions, or a named span",
                write='[-1], or capture each length by itself, or spans={"name": [...]} and ["name"][-1]',
            )
        # In a generation, rows of one length are padded equally, on the left.
        seen = (rows.width or width) - width - min(rows.starts or (0,))
        held = [p for p in position.range(total) if p >= seen]
        if not held:
            raise ShortRow(f"[{position}] selects none of the {total} tokens")
        return list(held)
    if position.token is not None:
        return [position]
    lengths = sorted({stop - start for start, stop in _bounds(position, spans)})
    if len(lengths) > 1:
        raise SpanError(
            f'span "{position.name}" has {_some(lengths)} tokens in different prompts, so its tokens have no one shape',
            expected="the same number of tokens in every prompt, or one token of the span",
            write=f'["{position.name}"][-1] for its last token, ["{position.name}"][0] for its first',
        )
    return [Span(position.name, token) for token in range(lengths[0])]


def columns(positions: Sequence[int | Span], rows: Rows, width: int, spans: Spans | None = None) -> list[int] | Tensor:
    """The columns of positions in a value of `width` tokens.

    Returns:
        One list for all rows where they agree, else a tensor `[prompt, position]`.
    """
    found = [_column(position, rows, width, spans) for position in positions]
    if all(isinstance(column, int) for column in found):
        return [column for column in found if isinstance(column, int)]
    batch = max(len(column) for column in found if isinstance(column, list))
    return torch.tensor([[c] * batch if isinstance(c, int) else c for c in found]).T.contiguous()


def absolute(position: int | Span, lengths: Sequence[int], spans: Spans | None) -> list[int] | None:
    """The token number of a position in each prompt; None for a position of several tokens."""
    if isinstance(position, int):
        return [position if position >= 0 else length + position for length in lengths]
    if position.token is None or not spans or position.name not in spans:
        return None
    return [_in_span(position, bounds, row) for row, bounds in enumerate(spans[position.name])]


def _column(position: int | Span, rows: Rows, width: int, spans: Spans | None) -> int | list[int]:
    total = width if rows.width is None else rows.width
    if isinstance(position, Span):
        bounds = _bounds(position, spans)
        count = rows.batch if rows.starts is None else len(rows.starts)
        if count not in (None, len(bounds)):
            raise SpanError(f'span "{position.name}" is given for {len(bounds)} prompts, and the run has {count}')
        if not rows.known and rows.pads_left:
            raise _too_late(f"[{position}]")
        own = [_in_span(position, of, row) for row, of in enumerate(bounds)]
    elif rows.lengths is None:
        if not rows.known and (position >= 0) == rows.pads_left:
            raise _too_late(f"[{position}]")
        if not -total <= position < total:
            raise _short(position, total, None)
        own = [position]
    else:
        own = [position] * len(rows.lengths)
    starts, lengths = rows.starts or (0,) * len(own), rows.lengths or (total,) * len(own)
    # The value lacks earlier decode steps: it begins `seen` tokens into the row.
    seen = total - width
    found: list[int] = []
    for row, (p, start, length) in enumerate(zip(own, starts, lengths, strict=True)):
        if not -length <= p < length:
            raise _short(p, length, row)
        column = start + p % length - seen
        if column < 0:
            raise ShortRow(
                f"[{position}] was computed in an earlier step of the generation and is not in this one",
                expected=f"in this step, token {seen - start} or later, or [-1] for the newest",
            )
        found.append(column)
    return found[0] if len(set(found)) == 1 else found


def _bounds(span: Span, spans: Spans | None) -> Sequence[tuple[int, int]]:
    if spans is None or span.name not in spans:
        known = ", ".join(f'"{name}"' for name in spans or ()) or "none"
        raise SpanError(
            f'nobody said where the span "{span.name}" stands; spans given: {known}',
            expected=f'spans={{"{span.name}": [a text or (start, stop) for each prompt]}} where prompts are given, '
            "or at= a position where a run is written to",
        )
    return spans[span.name]


def _in_span(span: Span, bounds: tuple[int, int], row: int) -> int:
    start, stop = bounds
    token = span.token or 0
    if not start - stop <= token < stop - start:
        raise ShortRow(f'span "{span.name}" of row {row} has {stop - start} tokens, and [{token}] is past them')
    return (start if token >= 0 else stop) + token


def _short(position: int, length: int, row: int | None) -> ShortRow:
    where = "the prompt has" if row is None else f"row {row} has"
    return ShortRow(
        f"{where} {length} token{'s' * (length != 1)}, so there is no position [{position}]",
        expected=f"[0] to [{length - 1}], or [-{length}] to [-1]",
    )


def _too_late(text: str) -> LateUpdate:
    return LateUpdate(
        f"{text} depends on how the prompts were padded, and the run is already past the point that tells",
        expected="this call before the trace's other requests: it is asked once for each run, then remembered",
    )


def _some(numbers: Sequence[int]) -> str:
    shown = sorted(set(numbers))
    return ", ".join(map(str, shown[:6])) + (", ..." if len(shown) > 6 else "")
