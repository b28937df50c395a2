"""The current thread and task, and whether it only probes a model."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

ThreadAndTask = tuple[int, object]


def current_task() -> ThreadAndTask:
    """The thread, and the task of its event loop if there is one."""
    try:
        task: object = asyncio.current_task()
    except RuntimeError:
        task = None
    return threading.get_ident(), task


class _Probing(threading.local):
    now: bool = False


_probing = _Probing()


@contextmanager
def probing() -> Iterator[None]:
    """Run a model only to measure it: steering blocks of this thread do not apply."""
    before, _probing.now = _probing.now, True
    try:
        yield
    finally:
        _probing.now = before


def is_probing() -> bool:
    """Whether this thread only measures a model."""
    return _probing.now
