"""Locks: a file beside another that names the process that writes it.

The file outlives a process that was killed, so it says enough to be judged by the next one: the process number, the
machine, and when the process began, since numbers come again. A process on another machine cannot be asked; so whoever
holds a lock renews it every few seconds, and one that was not renewed for `LEASE` seconds is taken over.
"""

from __future__ import annotations

import json
import os
import platform
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from nnsplice.errors import FileError

#: After how many seconds without a sign a lock of another machine is taken over.
LEASE = 120.0
#: The locks of this process.
_held: set[str] = set()


class Lock:
    """The lock of one file; `release` gives it back."""

    def __init__(self, of: Path) -> None:
        """Take the lock, if need be from a process that is gone.

        Raises:
            FileError: another process holds it.
        """
        self.path: Path = of.with_name(f"{of.name}.lock")
        self._words, self._process = _words(), os.getpid()
        for _ in range(8):
            _held.add(self._words)  # before it is there, so that no other thread takes it for a dead one's
            if _made(self.path, self._words):
                self._beat = Heartbeat(lambda: os.utime(self.path), LEASE / 12)
                return
            _held.discard(self._words)
            self._take_over(of)
        raise FileError(f"{of} is being opened by several processes", expected="one process at a time")

    def release(self) -> None:
        """Let the next one write."""
        if self._words in _held and self._process == os.getpid():  # a fork has not taken what its parent holds
            self._beat.stop()
            _held.discard(self._words)
            if _read(self.path) == self._words:
                self.path.unlink(missing_ok=True)

    def _take_over(self, of: Path) -> None:
        # Two that judge the same dead lock at once would remove each other's new one.
        with _exclusive(self.path.parent):
            there = _read(self.path)
            if there is None:
                return  # given back just now
            if holder := _holder(there, self.path):
                raise FileError(
                    f"{of} is being written by {holder}",
                    expected="one process at a time",
                    write=f"rm {self.path}   (when that process is gone)",
                )
            self.path.unlink(missing_ok=True)


@contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """One process at a time on this machine, if the system can lock folders; a killed process leaves no lock."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems cannot
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


class Heartbeat:
    """A thread that signals every few seconds that its process is alive, until `stop`."""

    def __init__(self, sign: Callable[[], object], every: float) -> None:
        """Begin.

        Args:
            sign: gives one; that it cannot be given now is passed over.
            every: seconds between two signs.
        """
        self._sign, self._every, self._stopped = sign, every, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopped.wait(self._every):
            with suppress(OSError):
                self._sign()

    def stop(self) -> None:
        """Give no more signs."""
        self._stopped.set()


def this_process() -> dict[str, Any]:
    """The identity of this process, as plain data."""
    own = os.getpid()
    return {"pid": own, "host": _machine(), "began": _began(own)}


def is_gone(identity: Mapping[str, Any]) -> bool | None:
    """Whether a process is gone, by its identity from `this_process`; None for a process of another machine.

    Raises:
        KeyError, ValueError, TypeError: this is no such identity.
    """
    process, host, began = int(identity["pid"]), str(identity["host"]), identity["began"]
    return None if host != _machine() else not (_lives(process) and began == _began(process))


def age_of(path: Path) -> float:
    """Seconds since a file was touched, by the clock of its own file system."""
    beside = path.with_name(f".{uuid.uuid4().hex}.now")
    beside.touch()
    try:
        return beside.stat().st_mtime - path.stat().st_mtime
    finally:
        beside.unlink()


def _machine() -> str:
    """The machine, and within it the numbers that processes have: containers of one name count their own."""
    try:
        return f"{platform.node()} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return platform.node()


def _words() -> str:
    return json.dumps({**this_process(), "lock": uuid.uuid4().hex})


def _made(path: Path, words: str) -> bool:
    """Make the lock, complete at once; False where there is one."""
    own = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    with os.fdopen(os.open(own, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644), "w", encoding="utf-8") as file:
        file.write(words)
        file.flush()
        os.fsync(file.fileno())
    try:
        os.link(own, path)  # fails where the lock is there, and nobody ever sees half of it
    except FileExistsError:
        return False
    except OSError:  # a file system without links; there the lock is empty for a moment
        try:
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(words)
    finally:
        own.unlink(missing_ok=True)
    return True


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None


def _holder(words: str, path: Path) -> str | None:
    """Who holds a lock, or None for a process that is gone."""
    try:
        holder = json.loads(words)
        gone, process, host = is_gone(holder), int(holder["pid"]), str(holder["host"]).partition(" ")[0]
    except (ValueError, TypeError, KeyError):
        return None  # a lock is never seen half written
    if gone is None:  # on another machine
        return f"process {process} on {host}" if age_of(path) < LEASE else None
    if process == os.getpid():
        return f"process {process}, this one" if words in _held else None
    return None if gone else f"process {process}"


def _lives(process: int) -> bool:
    if os.name == "nt":
        return True  # asking with a signal would end it there
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _began(process: int) -> str | None:
    """When a process began, in the system's own count; None where the system does not tell."""
    try:
        # The name in brackets may hold blanks and brackets of its own.
        return (
            Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]
        )
    except (OSError, IndexError):
        return None
