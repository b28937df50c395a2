"""From characters of a text to its tokens."""

from __future__ import annotations

from collections.abc import Sequence


def covered(offsets: Sequence[tuple[int, int]], first: int, last: int) -> tuple[int, int] | None:
    """The tokens, `(start, stop)`, of which each shares a character with `first` to `last`; None where none does.

    >>> from nnsplice.activations.offsets import covered
    >>> covered([(0, 0), (0, 3), (3, 9)], 4, 9)   # a token without characters, as a special one, never does
    (2, 3)
    """
    inside = [n for n, (start, stop) in enumerate(offsets) if start < last and stop > first and stop > start]
    return (inside[0], inside[-1] + 1) if inside else None
