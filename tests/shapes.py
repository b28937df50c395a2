"""The shapes in nnsplice's signatures, checked whenever a test calls the function.

jaxtyping's import hook puts `checked` around every function of the modules listed in pyproject.toml
(`--jaxtyping-packages`).
"""

from __future__ import annotations

from beartype import beartype

SHAPED = ("Float[", "Int[", "Bool[", "Num[", "Shaped[", "Inexact[")


def checked(function):
    """`beartype`, for annotations that speak of shapes.

    The others belong to pyright: some name types that are only imported for it, which nothing can look up at run time.
    """
    shaped = {
        name: hint for name, hint in function.__annotations__.items() if any(kind in str(hint) for kind in SHAPED)
    }
    if not shaped:
        return function
    function.__annotations__ = shaped
    return beartype(function)
