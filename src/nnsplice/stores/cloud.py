"""Object stores, through obstore; the only file that imports it.

A put that fails where something is there is what makes one of several processes the first: for claims, for locks, and
for what workers agree on. Credentials come from the environment, as obstore reads it (`AWS_ACCESS_KEY_ID`,
`AWS_REGION`, `AWS_ENDPOINT_URL`, `GOOGLE_APPLICATION_CREDENTIALS`, ...), or from the machine.
"""

from __future__ import annotations

import json
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nnsplice.errors import BadArgument, FileError, MissingPackage, StoreError
from nnsplice.locks import LEASE, Heartbeat, is_gone, this_process
from nnsplice.stores.addresses import split

#: Seconds between two looks at other processes, and between two writes of a log.
PAUSE = 2.0
#: Seconds after which the clock of the store is read again.
_CLOCK = 300.0


@dataclass(frozen=True)
class CloudStore:
    """The objects under one prefix of an object store; `Store` documents the methods."""

    address: str
    #: obstore's own.
    inner: Any = field(repr=False)
    folder: None = None
    pause: float = PAUSE
    #: Logs of this process, as far as they are written.
    _logs: dict[str, str] = field(default_factory=dict, repr=False)
    _unwritten: set[str] = field(default_factory=set, repr=False)
    #: The store's clock minus the monotonic one of this process, and when that was found out.
    _clock: list[float] = field(default_factory=list, repr=False)

    @classmethod
    def open(cls, address: str) -> CloudStore:
        """The store of an address; nothing is asked of it yet.

        Raises:
            MissingPackage: obstore is not installed.
            BadArgument: no address, or settings of the environment that obstore does not take.
        """
        bucket, prefix = split(address)
        url = f"{bucket}/{prefix}" if prefix else bucket
        from_url = _obstore(url).store.from_url
        try:
            return cls(url, from_url(url))
        except Exception as error:
            raise BadArgument(
                f"{url} cannot be used: {error}", expected="credentials and region in the environment (AWS_REGION, ...)"
            ) from error

    def make(self) -> None:
        """Find out whether a second writer is refused."""
        name = f".first.{uuid.uuid4().hex}"
        try:
            with self._wrapped_errors():
                self.inner.put(name, b"1", mode="create")
            if self._created(name, b"2"):
                raise BadArgument(
                    f"{self.address} takes a second writer of one file, so two workers could not be told apart",
                    expected="a store with conditional puts, as S3 and GCS are",
                )
        finally:
            with suppress(OSError):
                self.remove(name)

    def at(self, name: str) -> str:
        """The address of a file."""
        return f"{self.address}/{name}" if name else self.address

    def read(self, name: str) -> bytes:
        """The content of a file."""
        with self._wrapped_errors():
            return bytes(self.inner.get(name).bytes())

    def write(self, name: str, data: bytes) -> None:
        """Write a file; of an object others see the whole or nothing."""
        with self._wrapped_errors():
            self.inner.put(name, data)

    def create(self, name: str, data: bytes) -> bool:
        """Write a file that is not there; the data have to be those of this caller alone."""
        if self._created(name, data):
            return True
        # A put whose answer was lost is sent again, and then finds its own object.
        with suppress(FileNotFoundError):
            return self.read(name) == data
        return False

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """A path to write to, whose file is sent when the block ends well."""
        with tempfile.TemporaryDirectory(prefix="nnsplice-") as folder:
            path = Path(folder) / name.rpartition("/")[2]
            yield path
            with self._wrapped_errors():
                self.inner.put(name, path)

    def remove(self, name: str) -> None:
        """Remove a file."""
        with suppress(FileNotFoundError), self._wrapped_errors():
            self.inner.delete(name)

    def has(self, name: str) -> bool:
        """Whether a file is there."""
        try:
            self._head(name)
        except FileNotFoundError:
            return False
        return True

    def names(self, under: str = "") -> list[str]:
        """The names right under a prefix."""
        with self._wrapped_errors():
            found = self.inner.list_with_delimiter(under or None)
        paths = [one["path"] for one in found["objects"]] + list(found["common_prefixes"])
        return [path.rpartition("/")[2] for path in paths]

    def touch(self, name: str) -> None:
        """Write the same again, unless another process has written meanwhile."""
        with suppress(FileNotFoundError), self._wrapped_errors():
            found = self.inner.get(name)
            self._replaced(name, bytes(found.bytes()), found.meta)

    def age(self, name: str) -> float:
        """Seconds since it was written; the store counts whole seconds."""
        last = self._head(name)["last_modified"].timestamp()
        now = time.monotonic()
        if not self._clock or now - self._clock[1] > _CLOCK:
            beside = f".{uuid.uuid4().hex}.now"
            self.write(beside, b"")
            self._clock[:] = [self._head(beside)["last_modified"].timestamp() - now, now]
            self.remove(beside)
        return self._clock[0] + now - last

    def append(self, name: str, text: str) -> None:
        """Append to a log in memory."""
        self._logs[name] = self._logs.get(name, "") + text
        self._unwritten.add(name)

    def flush(self) -> None:
        """Write the logs."""
        while self._unwritten:
            name = self._unwritten.pop()
            self.write(name, self._logs[name].encode())

    def lock(self, name: str) -> CloudLock:
        """Be the only one."""
        return CloudLock(self, f"{name}.lock")

    def clear(self) -> None:
        """Remove all that is under the prefix."""
        with self._wrapped_errors():
            for some in self.inner.list():
                self.inner.delete([one["path"] for one in some])

    # --- inside

    def _created(self, name: str, data: bytes) -> bool:
        try:
            with self._wrapped_errors():
                self.inner.put(name, data, mode="create")
        except FileExistsError:
            return False
        return True

    def _replaced(self, name: str, data: bytes, version: Any) -> bool:
        """Write, if the file still has this version (e_tag and version of its metadata)."""
        from obstore.exceptions import PreconditionError  # pyright: ignore[reportMissingImports]  (an extra)

        try:
            known = {key: version[key] for key in ("e_tag", "version") if version[key] is not None}
            self.inner.put(name, data, mode=known)
        except (PreconditionError, FileNotFoundError):
            return False
        return True

    def _head(self, name: str) -> Any:
        with self._wrapped_errors():
            return self.inner.head(name)

    @contextmanager
    def _wrapped_errors(self) -> Iterator[None]:
        """Errors of obstore as those of files."""
        from obstore.exceptions import (  # pyright: ignore[reportMissingImports]  (an extra)
            AlreadyExistsError,
            BaseError,
        )

        try:
            yield
        except FileNotFoundError as error:
            if "NoSuchBucket" in str(error):
                raise StoreError(
                    f"{self.address} is in a bucket that is not there", expected="one that exists"
                ) from None
            raise FileNotFoundError(f"{self.address}: {_first(error)}") from None
        except AlreadyExistsError as error:
            raise FileExistsError(f"{self.address}: {_first(error)}") from None
        except BaseError as error:
            raise StoreError(
                f"{self.address} does not answer as it should: {_first(error)}",
                expected="credentials, region and address in the environment (AWS_ACCESS_KEY_ID, AWS_REGION, ...)",
            ) from error


class CloudLock:
    """A lock in an object store; `release` gives it back."""

    def __init__(self, store: CloudStore, name: str) -> None:
        """Take the lock, if need be from a process that is gone.

        Raises:
            FileError: another process holds it.
        """
        self._store, self._name = store, name
        self._words = json.dumps({**this_process(), "lock": uuid.uuid4().hex}).encode()
        while not store.create(name, self._words):
            try:
                with store._wrapped_errors():
                    found = store.inner.get(name)
                words = bytes(found.bytes())
                if holder := _holder(words, store, name):
                    raise FileError(
                        f"{store.at(name.removesuffix('.lock'))} is being written by {holder}",
                        expected="one process at a time",
                    )
            except FileNotFoundError:
                continue  # given back just now
            # Of several that judge the same dead lock, one replaces it.
            with store._wrapped_errors():
                if store._replaced(name, self._words, found.meta):
                    break
        self._beat = Heartbeat(lambda: store.touch(name), LEASE / 12)

    def release(self) -> None:
        """Let the next one take it."""
        self._beat.stop()
        with suppress(FileNotFoundError):
            if self._store.read(self._name) == self._words:
                self._store.remove(self._name)


@dataclass
class Ranged:
    """A file in an object store, fetched by ranges; `Opened` documents the methods."""

    store: CloudStore
    name: str
    #: A sparse file of the whole size.
    local: Path
    size: int
    _stamp: object

    @classmethod
    def open(cls, address: str, folder: Path) -> Ranged:
        """The file of an address; nothing of it is fetched yet."""
        parent, _, name = address.rpartition("/")
        store = CloudStore.open(parent)
        try:
            head = store._head(name)
        except FileNotFoundError:
            raise FileNotFoundError(f"there is no {address}") from None
        path = folder / name
        with path.open("wb") as file:
            file.truncate(head["size"])
        return cls(store, name, path, head["size"], (head["e_tag"], head["size"]))

    def fetch_header(self) -> None:
        """Fetch the header of a safetensors file: its length, then its bytes."""
        self.fetch(0, min(8, self.size))
        with self.local.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
        self.fetch(8, min(length, self.size - 8))

    def fetch(self, start: int, length: int) -> None:
        """Have these bytes at the path."""
        if length <= 0:
            return
        with self.store._wrapped_errors():
            data = bytes(self.store.inner.get_range(self.name, start=start, length=length))
        with self.local.open("r+b") as file:
            file.seek(start)
            file.write(data)

    def is_same(self) -> bool:
        """Whether it is still the file that was opened."""
        head = self.store._head(self.name)
        return (head["e_tag"], head["size"]) == self._stamp


def _holder(words: bytes, store: CloudStore, name: str) -> str | None:
    """The process that holds a lock; None if it is gone."""
    try:
        claim = json.loads(words)
        gone, who = is_gone(claim), f"process {int(claim['pid'])} on {str(claim['host']).partition(' ')[0]}"
    except (ValueError, TypeError, KeyError):
        return None
    if gone is None:
        return who if store.age(name) < LEASE else None
    return None if gone else who


def _first(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _obstore(url: str) -> Any:
    try:
        import obstore  # pyright: ignore[reportMissingImports]  (an extra)
        import obstore.store  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingPackage(
            f"{url} is in an object store, which is reached through obstore", write='pip install "nnsplice[cloud]"'
        ) from error
    return obstore
