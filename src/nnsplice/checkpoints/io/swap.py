"""Two folders exchanged in one step, where the system can do it."""

from __future__ import annotations

import ctypes
import os
from errno import EINVAL, ENOSYS, ENOTSUP
from pathlib import Path

#: Linux: the current folder, and the flag that says exchange.
_HERE, _EXCHANGE = -100, 2


def exchange(new: Path, dest: Path, aside: Path) -> None:
    """Put `new` where `dest` is; the old one is then at `new`, or at `aside` where two steps were needed."""
    if _exchanged(new, dest):
        return
    # Some network file systems, and other systems than Linux. Whoever writes next repairs a stop between the two.
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
    if function(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (EINVAL, ENOSYS, ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(other))
