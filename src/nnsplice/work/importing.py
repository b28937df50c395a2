"""Functions by name: `module:function`, which other processes can import."""

from __future__ import annotations

import importlib
from typing import Any

from nnsplice.errors import BadArgument


def imported(name: str) -> Any:
    """Import the function that `module:function` names.

    Raises:
        BadArgument: there is no such function.
    """
    module, _, function = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in function.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise BadArgument(
            f"{name!r} cannot be imported here: {error}",
            expected="module:function, of a module that every worker finds (PYTHONPATH, or an installed package)",
        ) from error
    return found


def named(function: Any, what: str) -> str:
    """The name `module:function` of a function.

    Args:
        what: the role of the function, for the message.

    Raises:
        BadArgument: other processes cannot import it: a lambda, or a function of a notebook or of another function.
    """
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    shown = f"{what} is {getattr(function, '__name__', function)!r}"
    if not module or not name or module == "__main__" or "<" in name:
        raise BadArgument(
            f"{shown}, which other processes cannot find",
            expected="a function in a file that can be imported",
            write="in my_module.py: def my_function(...): ...   then my_module.my_function, or 'my_module:my_function'",
        )
    if imported(f"{module}:{name}") is not function:
        raise BadArgument(f"{shown}, and {module}:{name} is another one", expected="a function by its own name")
    return f"{module}:{name}"
