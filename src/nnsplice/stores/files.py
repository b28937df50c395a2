"""Single files by their path or address: written whole, and read whole or only in ranges."""

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
    """A file that is read through a path on this machine."""

    @property
    def local(self) -> Path:
        """The local path. Of a file in an object store, parts that were not fetched are zeros."""
        ...

    def fetch(self, start: int, length: int) -> None:
        """Have these bytes at the path."""
        ...

    def is_same(self) -> bool:
        """Whether it is still the file that was opened."""
        ...


class _Local:
    def __init__(self, path: Path) -> None:
        self.local: Path = path
        self._before: object = self._stamp()

    def fetch(self, start: int, length: int) -> None:
        """They are there."""

    def is_same(self) -> bool:
        return self._stamp() == self._before

    def _stamp(self) -> object:
        found = self.local.stat()
        return found.st_ino, found.st_mtime_ns, found.st_size


@contextmanager
def opened(path: str | os.PathLike[str], *, header: bool = False) -> Iterator[Opened]:
    """Read a file through a path on this machine.

    Args:
        header: fetch only the header of a safetensors file in an object store; `fetch` fetches the rest.

    Raises:
        FileNotFoundError: it is not there.
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
    """A path on this machine to write under; the file takes its place when the block ends well."""
    if not is_address(path):
        with files.whole(path) as temporary:
            yield temporary
        return
    from nnsplice.stores.cloud import CloudStore

    parent, _, name = os.fspath(path).rpartition("/")
    with CloudStore.open(parent).writing(name) as temporary:
        yield temporary
