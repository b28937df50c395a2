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
    """The names most like `name`, as text for a message; all of them when there are few and none is close."""
    names = list(dict.fromkeys(names))
    near = get_close_matches(name, names, n=n, cutoff=0.5)
    chosen = near or names[: 2 * n]
    more = "" if near or len(names) <= 2 * n else f", ... ({len(names)} in all)"
    return ", ".join(map(shown, chosen)) + more if chosen else "nothing"
