"""Single files by path or address: written atomically, and read whole or in ranges."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from nnsplice import files
from nnsplice.stores.addresses import is_address


class Opened(Protocol):
    """A file that is open for reading, through a local path."""

    @property
    def local(self) -> Path:
        """The local path. For a file in an object store, ranges that were not fetched are zeros."""
        ...

    def fetch(self, start: int, length: int) -> None:
        """Fetch a range of bytes into the local file."""
        ...

    def is_same(self) -> bool:
        """Whether the file is unchanged since it was opened."""
        ...


class _Local:
    def __init__(self, path: Path) -> None:
        self.local: Path = path
        self._before: object = self._stamp()

    def fetch(self, start: int, length: int) -> None:
        """A local file has all bytes."""

    def is_same(self) -> bool:
        return self._stamp() == self._before

    def _stamp(self) -> object:
        found = self.local.stat()
        return found.st_ino, found.st_mtime_ns, found.st_size


@contextmanager
def opened(path: str | os.PathLike[str], *, header: bool = False) -> Iterator[Opened]:
    """Open a file for reading, through a local path.

    Args:
        header: of a safetensors file in an object store, fetch only the header; `fetch` fetches the rest.

    Raises:
        FileNotFoundError: there is no such file.
    """
    if not is_address(path):
        yield _Local(Path(path))
        return
    from nnsplice.stores.cloud import Ranged

    with tempfile.TemporaryDirectory(prefix="nnsplice-") as folder:
        found = Ranged.open(os.fspath(path), Path(folder))
        if header:
            found.fetch_header()
        else:
            found.fetch(0, found.size)
        yield found


@contextmanager
def whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A local path to write to; the file gets its name at the end of the block, unless it raises."""
    if not is_address(path):
        with files.whole(path) as temporary:
            yield temporary
        return
    from nnsplice.stores.cloud import CloudStore

    parent, _, name = os.fspath(path).rpartition("/")
    with CloudStore.open(parent).writing(name) as temporary:
        yield temporary
