"""The operations of storage, and the store of an address."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from nnsplice.stores.addresses import is_address
from nnsplice.stores.local import LocalStore


class HeldLock(Protocol):
    """A lock that this process has taken."""

    def release(self) -> None:
        """Release the lock."""
        ...


class Store(Protocol):
    """Files under one folder, or under one prefix of an object store, by their names (`units/000017.safetensors`)."""

    @property
    def address(self) -> str:
        """The path or address of the store, valid in all processes."""
        ...

    @property
    def folder(self) -> Path | None:
        """The local folder; None for an object store."""
        ...

    @property
    def inner(self) -> Any:
        """The store object of obstore; None for a folder."""
        ...

    @property
    def pause(self) -> float:
        """The least seconds between two reads of other processes' files, as requests to object stores cost money."""
        ...

    def make(self) -> None:
        """Make the folder; for an object store, check that it has conditional puts.

        Raises:
            BadArgument: the store has no conditional puts.
        """
        ...

    def at(self, name: str) -> Path | str:
        """The path or address of a file."""
        ...

    def read(self, name: str) -> bytes:
        """The content of a file.

        Raises:
            FileNotFoundError: there is no such file.
        """
        ...

    def write(self, name: str, data: bytes) -> None:
        """Write a file atomically; an existing file is replaced."""
        ...

    def create(self, name: str, data: bytes) -> bool:
        """Write a new file atomically; False if it exists. Of several processes, one succeeds."""
        ...

    def writing(self, name: str) -> AbstractContextManager[Path]:
        """A local path to write to; the file gets its name at the end of the block, unless it raises."""
        ...

    def remove(self, name: str) -> None:
        """Remove a file, if it exists."""
        ...

    def has(self, name: str) -> bool:
        """Whether a file exists."""
        ...

    def names(self, under: str = "") -> list[str]:
        """The names of files and folders directly in a folder, in no order; empty if it does not exist."""
        ...

    def touch(self, name: str) -> None:
        """Set the `age` of a file to 0; does nothing if it does not exist."""
        ...

    def age(self, name: str) -> float:
        """Seconds since a file was written or touched, by the clock of the store.

        Raises:
            FileNotFoundError: it is not there.
        """
        ...

    def clear(self) -> None:
        """Remove all files."""
        ...

    def append(self, name: str, text: str) -> None:
        """Append to a file that only this process writes; in an object store, `flush` uploads it."""
        ...

    def flush(self) -> None:
        """Write the appended text."""
        ...

    def lock(self, name: str) -> HeldLock:
        """Take a lock, exclusive among processes on all machines.

        Raises:
            FileError: another process has it.
        """
        ...


def store_of(path: str | os.PathLike[str]) -> Store:
    """The store of a path or address; nothing is created.

    Raises:
        BadArgument: an address with an unknown scheme.
        MissingPackage: an address, but obstore is not installed.
    """
    if not is_address(path):
        return LocalStore(Path(path))
    from nnsplice.stores.cloud import CloudStore

    return CloudStore.open(os.fspath(path))
