"""The operations of storage, and the store of an address."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from nnsplice.stores.addresses import is_address
from nnsplice.stores.local import LocalStore


class HeldLock(Protocol):
    """A lock that is held."""

    def release(self) -> None:
        """Let the next one take it."""
        ...


class Store(Protocol):
    """Files under one folder, or under one prefix of an object store, by their names (`units/000017.safetensors`)."""

    @property
    def address(self) -> str:
        """The text that means this store, in all processes."""
        ...

    @property
    def folder(self) -> Path | None:
        """The folder on this machine; None for an object store."""
        ...

    @property
    def inner(self) -> Any:
        """The same as an object of obstore; None for a folder."""
        ...

    @property
    def pause(self) -> float:
        """The least seconds between two looks at other processes: an object store takes time and money for each."""
        ...

    def make(self) -> None:
        """Make the folder; of an object store, find out whether it refuses a second writer.

        Raises:
            BadArgument: the store does not refuse a second writer.
        """
        ...

    def at(self, name: str) -> Path | str:
        """The path or address of a file."""
        ...

    def read(self, name: str) -> bytes:
        """The content of a file.

        Raises:
            FileNotFoundError: it is not there.
        """
        ...

    def write(self, name: str, data: bytes) -> None:
        """Write a file that appears whole, in place of one that may be there."""
        ...

    def create(self, name: str, data: bytes) -> bool:
        """Write a file that appears whole; False where there is one. Of several at once, one succeeds."""
        ...

    def writing(self, name: str) -> AbstractContextManager[Path]:
        """A path on this machine to write to; the file takes its place when the block ends well."""
        ...

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        ...

    def has(self, name: str) -> bool:
        """Whether a file is there."""
        ...

    def names(self, under: str = "") -> list[str]:
        """The names right under a folder, of files and of folders, in no order; none where there is no such folder."""
        ...

    def touch(self, name: str) -> None:
        """Give a sign of life: `age` begins anew. A file that is not there stays so."""
        ...

    def age(self, name: str) -> float:
        """Seconds since a file was written or touched, by the clock of the store.

        Raises:
            FileNotFoundError: it is not there.
        """
        ...

    def clear(self) -> None:
        """Remove all that is under it."""
        ...

    def append(self, name: str, text: str) -> None:
        """Append to a file that this process alone writes; an object store has it after `flush`."""
        ...

    def flush(self) -> None:
        """Write the appended text."""
        ...

    def lock(self, name: str) -> HeldLock:
        """Be the only one with this lock, among processes of all machines.

        Raises:
            FileError: another process has it.
        """
        ...


def store_of(path: str | os.PathLike[str]) -> Store:
    """The store that a path or an address means; nothing is made.

    Raises:
        BadArgument: an address of an unknown kind.
        MissingPackage: an address, and obstore is not installed.
    """
    if not is_address(path):
        return LocalStore(Path(path))
    from nnsplice.stores.cloud import CloudStore

    return CloudStore.open(os.fspath(path))
