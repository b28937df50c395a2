"""Object stores, through obstore; the only file that imports it.

Conditional puts, which fail if the object exists, decide between several processes: for claims, for locks, and for
values that workers agree on. Credentials come from the environment, as obstore reads it (`AWS_ACCESS_KEY_ID`,
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

#: The least seconds between two reads of other processes' files, and between two writes of a log.
PAUSE = 2.0
#: Seconds after which the store's clock is read again.
_CLOCK = 300.0


@dataclass(frozen=True)
class CloudStore:
    """The objects under one prefix of an object store; `Store` documents the methods."""

    address: str
    #: The store object of obstore.
    inner: Any = field(repr=False)
    folder: None = None
    pause: float = PAUSE
    #: The logs of this process, and those with text that is not uploaded yet.
    _logs: dict[str, str] = field(default_factory=dict, repr=False)
    _unwritten: set[str] = field(default_factory=set, repr=False)
    #: The store's clock minus the monotonic clock of this process, and the monotonic time of that measurement.
    _clock: list[float] = field(default_factory=list, repr=False)

    @classmethod
    def open(cls, address: str) -> CloudStore:
        """The store of an address; no request is sent yet.

        Raises:
            MissingPackage: obstore is not installed.
            BadArgument: an invalid address, or invalid settings in the environment.
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
        """Check that the store has conditional puts."""
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
        """Write a file; a put is atomic."""
        with self._wrapped_errors():
            self.inner.put(name, data)

    def create(self, name: str, data: bytes) -> bool:
        """Write a new file; the data must be unique to this caller."""
        if self._created(name, data):
            return True
        # obstore repeats a put whose response was lost, which then finds its own object.
        with suppress(FileNotFoundError):
            return self.read(name) == data
        return False

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """A local path to write to; the file is uploaded at the end of the block, unless it raises."""
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
        """Write the same data again, unless another process has written meanwhile."""
        with suppress(FileNotFoundError), self._wrapped_errors():
            found = self.inner.get(name)
            self._replaced(name, bytes(found.bytes()), found.meta)

    def age(self, name: str) -> float:
        """Seconds since the file was written, by the store's clock, which counts whole seconds."""
        last = self._head(name)["last_modified"].timestamp()
        now = time.monotonic()
        if not self._clock or now - self._clock[1] > _CLOCK:
            beside = f".{uuid.uuid4().hex}.now"
            self.write(beside, b"")
            self._clock[:] = [self._head(beside)["last_modified"].timestamp() - now, now]
            self.remove(beside)
        return self._clock[0] + now - last

    def append(self, name: str, text: str) -> None:
        """Append to a log, which `flush` uploads."""
        self._logs[name] = self._logs.get(name, "") + text
        self._unwritten.add(name)

    def flush(self) -> None:
        """Upload the logs."""
        while self._unwritten:
            name = self._unwritten.pop()
            self.write(name, self._logs[name].encode())

    def lock(self, name: str) -> CloudLock:
        """Take a lock."""
        return CloudLock(self, f"{name}.lock")

    def clear(self) -> None:
        """Remove all objects under the prefix."""
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
        """Write if the object still has this version; returns whether it was written."""
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
        """Raise errors of obstore as errors of files."""
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
            raise FileNotFoundError(f"{self.address}: {_first_line(error)}") from None
        except AlreadyExistsError as error:
            raise FileExistsError(f"{self.address}: {_first_line(error)}") from None
        except BaseError as error:
            raise StoreError(
                f"{self.address} does not answer as it should: {_first_line(error)}",
                expected="credentials, region and address in the environment (AWS_ACCESS_KEY_ID, AWS_REGION, ...)",
            ) from error


class CloudLock:
    """A lock in an object store, until `release`."""

    def __init__(self, store: CloudStore, name: str) -> None:
        """Take the lock, also from a process that is dead.

        Raises:
            FileError: another process holds it.
        """
        self._store, self._name = store, name
        self._content = json.dumps({**this_process(), "lock": uuid.uuid4().hex}).encode()
        while not store.create(name, self._content):
            try:
                with store._wrapped_errors():
                    found = store.inner.get(name)
                content = bytes(found.bytes())
                if holder := _holder(content, store, name):
                    raise FileError(
                        f"{store.at(name.removesuffix('.lock'))} is being written by {holder}",
                        expected="one process at a time",
                    )
            except FileNotFoundError:
                continue  # it was released meanwhile
            # Of several processes that see the dead lock, one replaces it.
            with store._wrapped_errors():
                if store._replaced(name, self._content, found.meta):
                    break
        self._heartbeat = Heartbeat(lambda: store.touch(name), LEASE / 12)

    def release(self) -> None:
        """Release the lock."""
        self._heartbeat.stop()
        with suppress(FileNotFoundError):
            if self._store.read(self._name) == self._content:
                self._store.remove(self._name)


@dataclass
class Ranged:
    """A file in an object store, fetched by ranges; `Opened` documents the methods."""

    store: CloudStore
    name: str
    #: A local sparse file of the same size.
    local: Path
    size: int
    _stamp: object

    @classmethod
    def open(cls, address: str, folder: Path) -> Ranged:
        """The file of an address; no content is fetched yet."""
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
        """Fetch a range of bytes into the local file."""
        if length <= 0:
            return
        with self.store._wrapped_errors():
            data = bytes(self.store.inner.get_range(self.name, start=start, length=length))
        with self.local.open("r+b") as file:
            file.seek(start)
            file.write(data)

    def is_same(self) -> bool:
        """Whether the object is unchanged since it was opened."""
        head = self.store._head(self.name)
        return (head["e_tag"], head["size"]) == self._stamp


def _holder(content: bytes, store: CloudStore, name: str) -> str | None:
    """The process that holds a lock, for a message; None if it is dead."""
    try:
        claim = json.loads(content)
        gone, who = is_gone(claim), f"process {int(claim['pid'])} on {str(claim['host']).partition(' ')[0]}"
    except (ValueError, TypeError, KeyError):
        return None
    if gone is None:
        return who if store.age(name) < LEASE else None
    return None if gone else who


def _first_line(error: Exception) -> str:
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
