"""Old names of arguments: accepted for one version, with a warning that gives the new name."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from nnsplice.errors import BadType
from nnsplice.warn import warn_caller

P = ParamSpec("P")
R = TypeVar("R")


def renamed(**names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let a function take arguments by their old names: `@renamed(paths="sites")`.

    >>> import warnings
    >>> from nnsplice.deprecated import renamed
    >>> @renamed(paths="sites")
    ... def count(sites):
    ...     return len(sites)
    >>> with warnings.catch_warnings(record=True) as caught:
    ...     warnings.simplefilter("always")
    ...     print(count(paths=["embed"]), caught[0].message)
    1 count(paths=...) is now count(sites=...); the old name goes with the next version

    Raises:
        BadType: (when called) the old and the new name were both given.
    """

    def wrap(function: Callable[P, R]) -> Callable[P, R]:
        name = function.__name__
        parameters = list(inspect.signature(function).parameters)

        @functools.wraps(function)
        def called(*args: P.args, **kwargs: P.kwargs) -> R:
            for old in [old for old in names if old in kwargs]:
                new = names[old]
                if new in kwargs or new in parameters[: len(args)]:
                    raise BadType(f"{name} was given {new} and {old}=", expected=f"{new} alone")
                renamed_to(f"{name}({old}=...)", f"{name}({new}=...)")
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return called

    return wrap


def renamed_to(old: str, new: str) -> None:
    """Warn of an old spelling."""
    warn_caller(f"{old} is now {new}; the old name goes with the next version", DeprecationWarning)
