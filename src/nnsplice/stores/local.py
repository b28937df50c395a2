"""The store of a folder."""

from __future__ import annotations

import os
import shutil
import uuid
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path

from nnsplice import files
from nnsplice.locks import Lock, age_of


@dataclass(frozen=True)
class LocalStore:
    """A folder of a file system; `Store` documents the methods."""

    folder: Path
    inner: None = None
    pause: float = 0.0

    @property
    def address(self) -> str:
        """The folder."""
        return str(self.folder)

    def make(self) -> None:
        """Make the folder."""
        self.folder.mkdir(parents=True, exist_ok=True)

    def at(self, name: str) -> Path:
        """The path of a file."""
        return self.folder / name

    def read(self, name: str) -> bytes:
        """The content of a file."""
        return (self.folder / name).read_bytes()

    def write(self, name: str, data: bytes) -> None:
        """Write a file atomically."""
        with self.writing(name) as temporary:
            temporary.write_bytes(data)

    def create(self, name: str, data: bytes) -> bool:
        """Write a new file, as a hard link to a complete one, so that no process reads a part of it."""
        path = self.folder / name
        if path.exists():  # the usual case for a worker that looks for free units
            return False
        own = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        with self._new_file(own) as file:
            file.write(data)
        try:
            os.link(own, path)
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links, where the file is empty for a moment
            try:
                with self._new_file(path) as file:
                    file.write(data)
            except FileExistsError:
                return False
        finally:
            own.unlink(missing_ok=True)
        return True

    def writing(self, name: str) -> AbstractContextManager[Path]:
        """A path to write to."""
        path = self.folder / name
        if not path.parent.is_dir():
            path.parent.mkdir(parents=True, exist_ok=True)
        return files.whole(path)

    def remove(self, name: str) -> None:
        """Remove a file."""
        (self.folder / name).unlink(missing_ok=True)

    def has(self, name: str) -> bool:
        """Whether a file is there."""
        return (self.folder / name).exists()

    def names(self, under: str = "") -> list[str]:
        """The names right under a folder."""
        with suppress(FileNotFoundError, NotADirectoryError):
            return os.listdir(self.folder / under)  # noqa: PTH208 (names alone, of many)
        return []

    def touch(self, name: str) -> None:
        """Set the modification time to now."""
        with suppress(FileNotFoundError):
            os.utime(self.folder / name)

    def age(self, name: str) -> float:
        """Seconds since the modification time."""
        return age_of(self.folder / name)

    def clear(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def append(self, name: str, text: str) -> None:
        """Append to a file."""
        with (self.folder / name).open("a", encoding="utf-8") as file:
            file.write(text)

    def flush(self) -> None:
        """Appended text is written at once."""

    def lock(self, name: str) -> Lock:
        """Take a lock."""
        return Lock(self.folder / name)

    @staticmethod
    def _new_file(path: Path):
        return os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644), "wb")
