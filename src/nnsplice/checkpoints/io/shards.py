"""safetensors files written tensor by tensor, so that no file has to fit into memory.

A safetensors file begins with a header that lists its tensors, and the list is known only at the end. So the space that
the names still to come may need is reserved, and what is left of it is filled with blanks, as the format allows.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from errno import EACCES, EDQUOT, ENOSPC, EPERM, EROFS
from io import FileIO
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from nnsplice.checkpoints.io.mapping import buffer, bytes_of
from nnsplice.errors import BadType, MapperError, NnspliceError, WriteFailed
from nnsplice.headers import NAMES, header_shape

#: The key of a header that is no tensor.
_METADATA = "__metadata__"
#: The least and the most bytes reserved for a header. More names than that go into another file.
_LEAST_RESERVED, _MOST_RESERVED = 256, 8 << 20
#: Bytes of a header for each tensor: at most, without its name and shape; and about, without its name.
_PUNCTUATION, _PER_NAME = 85, 130
#: Tensors begin at multiples of this, so that they are aligned.
_ALIGN = 8
#: A tensor of another length, up to this one, is written last in its file.
_LAST_UP_TO = 1 << 20


@dataclass(frozen=True, slots=True)
class ShardFile:
    """A finished file.

    Attributes:
        file: its name; empty if all of its tensors are stored under other names.
        names: the tensors in it.
        tied: other names of tensors, with the name under which each is stored.
        size: the bytes of the file.
        nbytes: the bytes of the tensors.
    """

    file: str
    names: tuple[str, ...]
    tied: dict[str, str]
    size: int
    nbytes: int


@dataclass(slots=True)
class _OpenFile:
    """The file that is being written."""

    path: Path
    file: FileIO
    reserved: int
    header: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    waiting: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    tied: dict[str, str] = field(default_factory=dict[str, str])
    #: The bytes of the header so far, and the offset of the next tensor.
    used: int = 64
    end: int = 0
    nbytes: int = 0


class ShardWriter:
    """Writes tensors into files of about one size; what is larger gets a file of its own."""

    def __init__(
        self,
        folder: Path,
        prefix: str,
        limit: int,
        names: Iterable[str],
        finished: Callable[[ShardFile], None],
        first: int,
    ) -> None:
        """Begin.

        Args:
            prefix: the beginning of the names of the files.
            limit: the most bytes of tensors in a file.
            names: all names that may come.
            finished: called for each file that is synced to the disk.
            first: the number of the first file.
        """
        self._folder, self._prefix, self._limit, self._finished, self._number = folder, prefix, limit, finished, first
        self._to_come = sum(_header_bytes(name) for name in names)
        self._open: _OpenFile | None = None
        self._seen = _SeenTensors()
        # A file is synced while the next one is written.
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="nnsplice-fsync")
        self._syncing: Future[None] | None = None

    def add(self, name: str, tensor: Tensor) -> None:
        """Write a tensor, or record that it is stored already under another name.

        Raises:
            WriteFailed: the disk did not take it.
        """
        plain = _plain(name, tensor)
        kept = self._seen.stored_name(tensor, plain)
        if kept is not None:
            self._current(name, 0, 0).tied[name] = kept
            return
        current = self._current(name, plain.nbytes, plain.dim())
        shape = header_shape(plain.dtype, tuple(plain.shape))
        current.header[name] = {"dtype": NAMES[plain.dtype], "shape": shape}
        current.used += len(json.dumps(name)) + len(str(shape)) + _PUNCTUATION
        current.nbytes += plain.nbytes
        self._to_come -= _header_bytes(name)
        if plain.nbytes % _ALIGN and plain.nbytes <= _LAST_UP_TO:
            # A copy: the caller may reuse the memory for the next tensor.
            current.waiting[name] = plain.clone()
            self._seen.remember(name, tensor, current.waiting[name])
        else:
            self._seen.remember(name, tensor, (current.path, self._write(current, name, plain), plain.nbytes))

    def remember(self, name: str, tensor: Tensor) -> None:
        """Remember a tensor that a finished file holds, so that its other names are not stored again."""
        self._seen.remember(name, tensor, _plain(name, tensor).clone())

    def close(self) -> None:
        """Finish the last file, and wait until all files are synced."""
        self._finish()
        if self._syncing is not None:
            self._syncing.result()
        self._disk.shutdown()

    def abandon(self) -> None:
        """Close the unfinished file; finished ones are synced."""
        if self._open is not None:
            self._open.file.close()
        self._disk.shutdown()

    # -- one file ------------------------------------------------------------------------------------------------------

    def _current(self, name: str, nbytes: int, dims: int) -> _OpenFile:
        current, more = self._open, _header_bytes(name) + 8 * dims
        if current is not None:
            full = current.nbytes and current.nbytes + nbytes > self._limit
            if not full and current.used + more <= current.reserved:
                return current
            self._finish()
        reserved = max(_LEAST_RESERVED, min(64 + self._to_come + more, _MOST_RESERVED))
        reserved = -(-reserved // 64) * 64 - 8  # after the 8 bytes of its length; tensors begin at a multiple of 64
        path = self._folder / f"{self._prefix}{self._number:05d}.safetensors"
        self._number += 1
        with disk(path, name):
            file = FileIO(path, "wb")
            self._open = _OpenFile(path, file, reserved)
            file.seek(8 + reserved)
        return self._open

    def _write(self, current: _OpenFile, name: str, tensor: Tensor) -> int:
        begin, start = current.end, 8 + current.reserved + current.end
        current.end += tensor.nbytes
        current.header[name]["data_offsets"] = [begin, current.end]
        with disk(current.path, name):
            _write_all(current.file, buffer(tensor))
        return start

    def _finish(self) -> None:
        current, self._open = self._open, None
        if current is None:
            return
        if not current.header:
            current.file.close()
            current.path.unlink()
            self._sync_later(ShardFile("", (), current.tied, 0, 0), None)
            return
        with current.file as file:
            # The widest numbers first, so that each tensor is aligned.
            for name, tensor in sorted(current.waiting.items(), key=lambda pair: -pair[1].itemsize):
                self._write(current, name, tensor)
            with disk(current.path, "its header"):
                header = json.dumps({_METADATA: {"format": "pt"}, **current.header}, separators=(",", ":")).encode()
                if len(header) > current.reserved:
                    raise MapperError(f"the header of {current.path} does not fit: {len(header)} > {current.reserved}")
                file.seek(0)
                _write_all(file, memoryview(current.reserved.to_bytes(8, "little") + header.ljust(current.reserved)))
        size = 8 + current.reserved + current.end
        self._sync_later(
            ShardFile(current.path.name, tuple(current.header), current.tied, size, current.nbytes), current.path
        )

    def _sync_later(self, shard: ShardFile, path: Path | None) -> None:
        if self._syncing is not None:
            self._syncing.result()  # raises the error of the file before

        def sync_file() -> None:
            with disk(path or self._folder, ", ".join(shard.names[:3]) or "names of tensors that are stored already"):
                if path is not None:
                    sync(path)
                self._finished(shard)

        self._syncing = self._disk.submit(sync_file)


def sync(path: Path) -> None:
    """Wait until a file or a folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _header_bytes(name: str) -> int:
    return len(json.dumps(name)) + _PER_NAME


def _write_all(file: FileIO, view: memoryview) -> None:
    while len(view):
        view = view[file.write(view) or 0 :]


_FULL = (
    "room for the new checkpoint beside the old one, which stays until then",
    "resume=True   (goes on with the files that were finished, where there are any)",
)
_DENIED = (
    "a destination in a folder that may be written to, as the new checkpoint is made beside the old one",
    "another destination, such as a folder below $HOME",
)
#: The number of an OSError -> what is expected, and what to write instead.
_ADVICE = {**dict.fromkeys((ENOSPC, EDQUOT), _FULL), **dict.fromkeys((EACCES, EPERM, EROFS), _DENIED)}


@contextmanager
def disk(path: Path, name: str) -> Generator[None]:
    """Raise an OSError as WriteFailed, with the file and the tensor."""
    try:
        yield
    except OSError as error:
        if isinstance(error, NnspliceError):
            raise
        expected, write = _ADVICE.get(error.errno or 0, (None, None))
        failed = WriteFailed(f"{path}: {error.strerror or error} while writing {name}", expected=expected, write=write)
        failed.errno = error.errno
        raise failed from error


def _plain(name: str, tensor: Tensor) -> Tensor:
    """The tensor as it is written: dense, on the CPU, contiguous."""
    if tensor.layout != torch.strided or tensor.is_meta:
        kind = "on the meta device, without numbers" if tensor.is_meta else f"a {tensor.layout} tensor"
        raise BadType(f"{name} is {kind}", expected="a dense tensor")
    if tensor.dtype not in NAMES:
        raise BadType(f"{name} is {tensor.dtype}, which safetensors does not have", write=f'Cast("{name}", dtype)')
    if name == _METADATA:
        raise MapperError(f"no tensor of a safetensors file can be called {name}", expected="another name")
    return tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()


# -- the same tensor by several names ----------------------------------------------------------------------------------

#: The bytes of a tensor: in memory, or a path with offset and length.
_Bytes = Tensor | tuple[Path, int, int]


class _SeenTensors:
    """The tensors written so far, to find tied ones.

    The same memory is not enough, as the caller may reuse memory. So the bytes are compared with those written, which
    is slow and rarely needed.
    """

    def __init__(self) -> None:
        self._seen: dict[tuple[object, ...], tuple[str, _Bytes, object]] = {}

    def stored_name(self, tensor: Tensor, plain: Tensor) -> str | None:
        """The name under which a tensor is stored already, or None."""
        found = self._seen.get(_key(tensor)[0]) if tensor.nbytes else None
        if found is None:
            return None
        name, where, _ = found
        stored = where if isinstance(where, Tensor) else bytes_of(*where)
        same = torch.equal(stored.reshape(-1).view(torch.uint8), plain.reshape(-1).view(torch.uint8))
        return name if same else None

    def remember(self, name: str, tensor: Tensor, where: _Bytes) -> None:
        """Record the bytes of a tensor."""
        if tensor.nbytes:
            key, alive = _key(tensor)
            self._seen[key] = (name, where, alive)


def _key(tensor: Tensor) -> tuple[tuple[object, ...], object]:
    from torch.multiprocessing import reductions

    # A weak reference keeps the address of the storage, not its content, so no other storage gets the same key.
    weak = cast("Any", reductions).StorageWeakRef(tensor.untyped_storage())
    place: Sequence[object] = (weak.cdata, tensor.storage_offset(), tensor.dtype)
    return (*place, tuple(tensor.shape), tuple(tensor.stride())), weak
