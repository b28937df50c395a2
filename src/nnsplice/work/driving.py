"""The driver of a run: starts workers, restarts dead ones, shows progress."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from nnsplice.errors import TeamError
from nnsplice.progress import bar
from nnsplice.work.run_folder import STRIKES, RunFolder
from nnsplice.work.worker import DONE, REFUSED

#: Seconds between two polls of the workers, and of the folder.
POLL_WORKERS, POLL_FOLDER = 0.05, 0.5


class WorkerHandle(Protocol):
    """A worker that an engine has started."""

    def poll(self) -> int | None:
        """The exit code; None while it runs or is queued."""
        ...

    def stop(self) -> None:
        """Stop it; it may finish its unit."""
        ...


def drive(folder: RunFolder, start: Callable[[int], WorkerHandle], workers: int, progress: bool) -> None:
    """Run all units with this many workers; failed units are in `folder.failures()`.

    Args:
        start: starts the worker with this number.

    Raises:
        FileError: another process drives this run.
        TeamError: units are left, and all workers failed.
    """
    folder.share()
    lock = folder.store.lock("driver")
    handles: dict[int, WorkerHandle] = {}
    try:
        folder.forgive()
        done = len(folder.done())
        with bar("units", folder.units, "unit", progress, done=done) as shown:
            for number in range(min(workers, folder.units - done)):
                handles[number] = start(number)
            starts_without_progress, before, polled = 0, _state(folder), time.monotonic()
            while handles:
                time.sleep(POLL_WORKERS)
                ended = {number: code for number, handle in handles.items() if (code := handle.poll()) is not None}
                if ended or time.monotonic() - polled > max(POLL_FOLDER, folder.store.pause):
                    now, polled = _state(folder), time.monotonic()
                    shown.update(now[0] - before[0])
                    starts_without_progress = 0 if now != before else starts_without_progress
                    before = now
                for number, code in ended.items():
                    del handles[number]
                    if code in (DONE, REFUSED) or before[0] + before[1] >= folder.units:
                        continue
                    starts_without_progress += 1
                    if starts_without_progress < STRIKES * max(workers, 1):
                        handles[number] = start(number)
                if before[0] + before[1] >= folder.units:
                    break  # queued workers are not needed any more
    finally:
        for handle in handles.values():
            handle.stop()
        lock.release()
    left = folder.units - len(folder.done()) - len(folder.failures())
    if left:
        reasons = dict.fromkeys(record["reason"] for _, record in folder.workers() if "reason" in record)
        lines = [f"  {line}" for reason in list(reasons)[-3:] for line in reason.splitlines()]
        raise TeamError(
            "\n".join([f"{left} of {folder.units} units were not run, as no worker could go on", *lines]),
            expected=f"workers that run; their logs are in {folder.store.at('workers')}",
            write="the same call again, which goes on from what is there",
        )


def command(folder: RunFolder) -> list[str]:
    """The command line of a worker."""
    where = folder.address if folder.store.folder is None else str(folder.store.folder.resolve())
    return [sys.executable, "-m", "nnsplice", "work", where]


def environment() -> dict[str, str]:
    """The environment of this process, with its module search path."""
    paths = [str(Path(path or ".").resolve()) for path in sys.path]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)), "NNSPLICE_PARENT": str(os.getpid())}


def _state(folder: RunFolder) -> tuple[int, int, int]:
    """The numbers of finished units, failed units and strikes: a change shows progress."""
    return len(folder.done()), len(folder.failures()), len(folder.store.names("strikes"))
