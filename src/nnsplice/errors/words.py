"""Words that messages are made of."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from nnsplice.shown import shown


def named(value: object) -> str:
    """What a value is, with its article: `"an int"`, `"a Tensor"`."""
    name = type(value).__name__
    return f"{'an' if name[0] in 'AEIOaeio' else 'a'} {name}"


def closest(name: str, names: Iterable[str], n: int = 3) -> str:
    """The names most like `name`, as text for a message; all names if there are few.

    >>> from nnsplice.errors import closest
    >>> closest("outptu", ["input", "output"])
    'output, input'
    >>> closest("outptu", ["input", "output", "q", "k", "v", "gate", "pattern"])
    'output, ... (7 in all)'
    """
    names = list(dict.fromkeys(names))
    near = get_close_matches(name, names, n=n, cutoff=0.5)
    chosen = list(dict.fromkeys([*near, *names])) if len(names) <= 2 * n else near or names[: 2 * n]
    more = f", ... ({len(names)} in all)" if len(chosen) < len(names) else ""
    return ", ".join(map(shown, chosen)) + more if chosen else "nothing"
