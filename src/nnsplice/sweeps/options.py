"""Keyword options that a function passes on to others: unknown ones are reported by the function that was called."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from nnsplice.errors import BadType, closest

#: The options of `ns.run`, which `ns.ablate` and others pass on.
RUNNING = ("executor", "max_tokens", "journal", "progress")


def known_of(outer: Callable[..., Any], inner: Callable[..., Any], but: Collection[str] = ()) -> tuple[str, ...]:
    """The option names of a function: its own, those of the function it calls, and those of `ns.run`."""
    own, handed = (inspect.signature(function).parameters.values() for function in (outer, inner))
    named = [p.name for p in (*own, *handed) if p.kind is p.KEYWORD_ONLY and p.name not in but]
    return tuple(dict.fromkeys([*named, *RUNNING]))


def check_options(name: str, given: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raise for an unknown option.

    Raises:
        BadType: there is no such option; the message has the closest names, or all of them.
    """
    known = tuple(known)
    for option in given:
        if option not in known:
            raise BadType(f"{name} has no option {option}=", expected=closest(option, known, len(known)))
