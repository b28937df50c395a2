"""Selecting rows of the batch: `saved.slice[0:4]`, `saved.slice[0:2, 5, 7:9]`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import index
from typing import Generic, SupportsIndex, TypeVar

from nnsplice.errors import BadArgument, BadType, ShortRow

T = TypeVar("T")
Selector = SupportsIndex | slice | range


class RowSlicer(Generic[T]):
    """The value of `saved.slice`: rows by number, slice, range, or several of these in order."""

    __slots__ = ("_count", "_take")

    def __init__(self, count: int, take: Callable[[Sequence[int]], T]) -> None:
        self._count, self._take = count, take

    def __getitem__(self, selector: Selector | tuple[Selector, ...]) -> T:
        count = self._count
        chosen: list[int] = []
        for part in selector if isinstance(selector, tuple) else (selector,):
            chosen += _rows(part, count)
        # Without rows a mistake would only be noticed later. An empty capture has none to select.
        if not chosen and count:
            raise BadArgument(f"slice[{_text(selector)}] selects none of the {count} rows")
        return self._take(chosen)


def _rows(part: object, count: int) -> list[int]:
    if isinstance(part, slice):
        return list(range(*part.indices(count)))
    if isinstance(part, range):
        numbers = list(part)
    else:
        numbers = [_number(part)]
    for number in numbers:
        if not -count <= number < count:
            raise ShortRow(
                f"row {number} of a capture with {count} rows",
                expected=f"[0] to [{count - 1}], or [-{count}] to [-1]" if count else None,
            )
    return [number % count for number in numbers]


def _number(part: object) -> int:
    try:
        if not isinstance(part, bool):
            return index(part)  # type: ignore[arg-type]  # also numbers of numpy and torch
    except TypeError:
        pass
    raise BadType(
        f"{part!r} selects no rows", expected="a number, a slice or a range, or several of them: slice[0:2, 5]"
    )


def _text(selector: Selector | tuple[Selector, ...]) -> str:
    """The text between the brackets."""
    if isinstance(selector, tuple):
        return ", ".join(map(_text, selector)) or "()"
    if isinstance(selector, slice):
        bounds = [selector.start, selector.stop, *([] if selector.step is None else [selector.step])]
        return ":".join("" if bound is None else str(bound) for bound in bounds)
    return str(selector)
