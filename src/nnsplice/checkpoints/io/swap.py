"""Two folders exchanged in one step, where the system supports it."""

from __future__ import annotations

import ctypes
import os
from errno import EINVAL, ENOSYS, ENOTSUP
from pathlib import Path

#: Linux: AT_FDCWD and RENAME_EXCHANGE.
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def exchange(new: Path, dest: Path, aside: Path) -> None:
    """Put `new` where `dest` is; the old one is then at `new`, or at `aside` where two steps were needed."""
    if _exchanged(new, dest):
        return
    # Some network file systems, and systems other than Linux. If the process ends between the two renames, the next
    # `Staging` puts the old folder back.
    dest.rename(aside)
    try:
        new.rename(dest)
    except OSError:
        aside.rename(dest)
        raise


def _exchanged(one: Path, other: Path) -> bool:
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    if function is None:
        return False
    if function(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (EINVAL, ENOSYS, ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(other))
