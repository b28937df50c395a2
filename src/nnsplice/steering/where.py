"""The tokens that are steered, counted from each prompt's first token, for any padding and cache.

"all"                  every token (of padding too, which has no effect)
"prompt"               the prompt's tokens
"generated"            those after it
from_token(p)          token p and all after it; from_token(-1) is the prompt's last and all after it
span(start, stop)      a range, the same in every row or one for each
mask(rows)             any tokens, as booleans for each row
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from nnsplice.engine import ForwardCall
from nnsplice.errors import BadArgument, BadType, ShapeError

#: The tokens of a pass: all, none, or booleans `[row or 1, token]`.
Chosen = bool | Tensor
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Where:
    """A rule for tokens, as a value; `str()` is how it is written."""

    kind: str
    start: tuple[int, ...] = ()
    stop: tuple[int, ...] = ()
    mask: tuple[tuple[bool, ...], ...] = ()

    def __str__(self) -> str:
        if self.kind == "from":
            return f"from_token({self.start[0]})"
        if self.kind == "span":
            pairs = [f"({a}, {b})" for a, b in zip(self.start, self.stop, strict=True)]
            return f"span{pairs[0]}" if len(pairs) == 1 else f"span([{', '.join(pairs)}])"
        return f"mask({len(self.mask)} rows)" if self.kind == "mask" else self.kind

    @property
    def rows(self) -> int:
        """The number of rows that it is given for; 1 if it is for all rows."""
        return max(len(self.mask), len(self.start), 1)

    def of(self, prompts: Sequence[int]) -> Where:
        """The rule for rows that belong to these prompts."""
        if self.rows == 1:
            return self
        return Where(self.kind, _taken(self.start, prompts), _taken(self.stop, prompts), _taken(self.mask, prompts))

    def chosen(self, call: ForwardCall) -> Chosen:
        """The tokens of a pass that are steered."""
        return _CHOOSE[self.kind](self, call)


def _taken(each: tuple[T, ...], prompts: Sequence[int]) -> tuple[T, ...]:
    return tuple(each[prompt] for prompt in prompts) if each else each


#: The rules without numbers.
NAMED = {name: Where(name) for name in ("all", "prompt", "generated")}


def from_token(position: int) -> Where:
    """Steer from token `position` of each row on.

    A negative position counts from the prompt's end. `from_token(-1)` includes the state that predicts the first
    generated token.

    >>> toy = ns.load("toy")
    >>> vector = ns.steering.SteeringVector.of(ns.capture(toy, "I adored it", "layers[1].output[-1]"))
    >>> ns.steering.steer(toy, vector, where=ns.steering.from_token(3)).show("I thought the film was")
    layers[1].output  add 1, where from_token(3)
      <|endoftext|> I thought [the] [film] [was]   (3 of 6 tokens, by 0.67 to 0.99 of the norm)

    Args:
        position: the number of the first token that is steered.

    Returns:
        The choice of tokens, for `where=`.

    Raises:
        BadType: a position that is no whole number.
    """
    if not isinstance(position, int) or isinstance(position, bool):
        raise BadType(f"from_token({position!r})", expected="the number of a token")
    return Where("from", (position,))


def span(start: int | Sequence[tuple[int, int]], stop: int | None = None) -> Where:
    """Steer tokens `start` to `stop` (not included).

    Negative numbers count from the prompt's end.

    >>> toy = ns.load("toy")
    >>> vector = ns.steering.SteeringVector.of(ns.capture(toy, "I adored it", "layers[1].output[-1]"))
    >>> last_two = ns.steering.span(-2, 9)
    >>> ns.steering.steer(toy, vector, where=last_two).show(["I thought the film was", "The hotel"])
    layers[1].output  add 1, where span(-2, 9)
      <|endoftext|> I thought the [film] [was]   (2 of 6 tokens, by 0.67 to 0.99 of the norm)
      <|endoftext|> [The] [hotel]   (2 of 3 tokens, by 0.88 to 0.93 of the norm)
    >>> print(ns.steering.span([(0, 2), (3, 4)]))   # for two prompts
    span([(0, 2), (3, 4)])

    Args:
        start: the first token; or a list of (start, stop), one for each row.
        stop: the token after the last.

    Returns:
        The choice of tokens, for `where=`.

    Raises:
        BadType: bounds that are no whole numbers.
        BadArgument: an empty span.
    """
    pairs: list[tuple[Any, Any]] = [(start, stop)] if isinstance(start, int) else list(start)
    if not pairs or any(not isinstance(n, int) or isinstance(n, bool) for pair in pairs for n in pair):
        raise BadType(f"a span of {start!r}, {stop!r}", expected="span(2, 5), or span([(2, 5), (3, 4)]) for two rows")
    for a, b in pairs:
        if (a < 0) == (b < 0) and a >= b:
            raise BadArgument(f"tokens {a} to {b} are none", expected="start < stop")
    return Where("span", tuple(a for a, _ in pairs), tuple(b for _, b in pairs))


def mask(rows: Sequence[bool] | Sequence[Sequence[bool]] | np.ndarray | Tensor) -> Where:
    """Steer the tokens at which `rows[row][token]` is True; generated tokens are not steered.

    >>> toy = ns.load("toy")
    >>> vector = ns.steering.SteeringVector.of(ns.capture(toy, "I adored it", "layers[1].output[-1]"))
    >>> second_and_fourth = ns.steering.mask([False, True, False, True])
    >>> ns.steering.steer(toy, vector, where=second_and_fourth).show("I thought the film was")
    layers[1].output  add 1, where mask(1 rows)
      <|endoftext|> [I] thought [the] film was   (2 of 6 tokens, by 0.71 to 0.87 of the norm)

    Args:
        rows: booleans, `[row, token]`, or `[token]` for all rows.

    Returns:
        The choice of tokens, for `where=`.

    Raises:
        ShapeError: rows of different lengths, or values that are not booleans.
        BadArgument: a mask without any True.
    """
    lengths = sorted({len(row) for row in rows if isinstance(row, Sequence)}) if isinstance(rows, Sequence) else []
    if len(lengths) > 1:
        raise ShapeError(
            f"the rows of this mask have {' and '.join(map(str, lengths))} tokens",
            expected="rows of one length: a shorter prompt's row ends in False",
            write="[row + [False] * (width - len(row)) for row in rows]",
        )
    found = torch.as_tensor(rows)
    found = found[None] if found.dim() == 1 else found
    if found.dim() != 2 or found.dtype != torch.bool:
        raise ShapeError(
            f"a mask of shape {list(found.shape)} and {found.dtype}", expected="booleans [token] or [row, token]"
        )
    if not bool(found.any()):
        raise BadArgument("this mask chooses no token", expected="at least one")
    return Where("mask", mask=tuple(tuple(row) for row in found.tolist()))


def read(where: str | Where) -> Where:
    """The rule of a name; a rule is returned as it is."""
    if isinstance(where, Where):
        return where
    if not isinstance(where, str) or where not in NAMED:
        raise BadArgument(
            f"where={where!r}",
            expected=f"{', '.join(map(repr, NAMED))}, or ns.steering.from_token(p), span(start, stop), mask(rows)",
        )
    return NAMED[where]


# --- one function for each kind ---------------------------------------------------------------------------------------


def _prompt(_where: Where, call: ForwardCall) -> Chosen:
    begun = call.prompt_columns - call.cached
    return begun >= call.new or (begun > 0 and _columns(call) < begun)


def _generated(_where: Where, call: ForwardCall) -> Chosen:
    begun = call.prompt_columns - call.cached
    return begun <= 0 or (begun < call.new and _columns(call) >= begun)


def _columns(call: ForwardCall) -> Tensor:
    return torch.arange(call.new, device=call.device)[None]


def _from(where: Where, call: ForwardCall) -> Chosen:
    (start,) = where.start
    return (call.positions >= _counted(start, call)) & (call.positions >= 0)


def _span(where: Where, call: ForwardCall) -> Chosen:
    start, stop = (torch.tensor(numbers, device=call.device)[:, None] for numbers in (where.start, where.stop))
    lengths = call.prompt_lengths[:, None] if min(where.start + where.stop) < 0 else torch.zeros_like(start[:1])
    start, stop = (per_row(numbers, call, "where") for numbers in (start, stop))
    start, stop = (torch.where(numbers < 0, numbers + lengths, numbers) for numbers in (start, stop))
    return (call.positions >= start) & (call.positions < stop) & (call.positions >= 0)


def _mask(where: Where, call: ForwardCall) -> Chosen:
    width = max(map(len, where.mask))
    rows = torch.tensor([[*row, *[False] * (width - len(row) + 1)] for row in where.mask], device=call.device)
    positions = call.positions.expand(call.rows, -1)
    # Padding (-1) and tokens after the mask read the added last column, which is False.
    return (
        per_row(rows, call, "where")
        .expand(call.rows, -1)
        .gather(1, positions.masked_fill(positions < 0, width).clamp(max=width))
    )


def _counted(position: int, call: ForwardCall) -> int | Tensor:
    return position if position >= 0 else call.prompt_lengths[:, None] + position


def per_row(values: Tensor, call: ForwardCall, what: str) -> Tensor:
    """Values given for each prompt, `[prompt or 1, ...]`, for the rows of a pass: `[row or 1, ...]`.

    In a beam search a prompt has several rows.

    Raises:
        ShapeError: another number of rows than the run has.
    """
    given = values.shape[0]
    if given in (1, call.rows):
        return values
    if call.generation.rows == given and call.rows % given == 0:
        return values.repeat_interleave(call.rows // given, 0)
    raise ShapeError(
        f"{what} is given for {given} rows, and the run has {call.rows}",
        expected="one for all rows, or one for each prompt of the batch",
    )


_CHOOSE = {
    "all": lambda _where, _call: True,
    "prompt": _prompt,
    "generated": _generated,
    "from": _from,
    "span": _span,
    "mask": _mask,
}
