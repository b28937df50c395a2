"""Warnings that point at the user's line."""

from __future__ import annotations

import contextlib
import sys
import warnings
from pathlib import Path

_HERE = str(Path(__file__).parent)


def warn_caller(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn on behalf of the line that called into nnsplice, so that each such line is told once.

    >>> import warnings
    >>> from nnsplice.warn import warn_caller
    >>> with warnings.catch_warnings(record=True) as caught:
    ...     warnings.simplefilter("always")
    ...     warn_caller("the bar is short")
    >>> print(caught[0].message)
    the bar is short
    """
    # The caller of the outermost of our frames: those of other libraries, such as decorators, stand between them. The
    # caller of a context manager of ours is the `with` behind contextlib.
    level, depth, frame = 1, 1, sys._getframe()
    while frame is not None:
        depth += 1
        file = frame.f_code.co_filename
        if file.startswith(_HERE) or (file == contextlib.__file__ and level == depth - 1):
            level = depth
        frame = frame.f_back
    warnings.warn(message, category, stacklevel=level)
