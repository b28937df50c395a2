"""Options that are passed on: unknown ones are reported by the function that was called."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from nnsplice.errors import BadType, closest

#: Those of `ns.run`, which a question hands on to it.
RUNNING = ("executor", "max_tokens", "journal", "progress")


def known_of(outer: Callable[..., Any], inner: Callable[..., Any], but: Collection[str] = ()) -> tuple[str, ...]:
    """What a question can be given by name: what it has of its own, of what it hands on to, and of `ns.run`."""
    own, handed = (inspect.signature(function).parameters.values() for function in (outer, inner))
    named = [p.name for p in (*own, *handed) if p.kind is p.KEYWORD_ONLY and p.name not in but]
    return tuple(dict.fromkeys([*named, *RUNNING]))


def check_options(name: str, given: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raise for an option that there is not.

    Raises:
        BadType: with the options that are spelled most like it, or all where none is.
    """
    known = tuple(known)
    for option in given:
        if option not in known:
            raise BadType(f"{name} has no option {option}=", expected=closest(option, known, len(known)))
