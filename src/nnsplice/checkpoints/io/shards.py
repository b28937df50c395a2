"""Tensors to files, each as it comes, so that no file has to fit into memory.

A safetensors file begins with a header that lists what follows, and the list is not known before the end. So room for
it is left free, as much as the names still to come may need, and what remains of it is blanks, as the format allows.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from errno import EDQUOT, ENOSPC
from io import FileIO
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from nnsplice.checkpoints.io.mapping import buffer, bytes_of
from nnsplice.errors import BadType, MapperError, NnspliceError, WriteFailed
from nnsplice.headers import NAMES, header_shape

#: What a header has under this name is no tensor.
_NO_TENSOR = "__metadata__"
#: The least and the most room for a header. More names than that go into another file.
_LEAST_ROOM, _MOST_ROOM = 256, 8 << 20
#: What a header says about a tensor besides its name and shape, at most; and all but the name, about.
_PUNCTUATION, _PER_NAME = 85, 130
#: A tensor whose bytes are no multiple of this would push those after it from where processors like them.
_ALIGN = 8
#: Such tensors up to this size wait for the end of their file.
_WAITS = 1 << 20


@dataclass(frozen=True, slots=True)
class Shard:
    """A finished file. Its `file` is empty where all that it would hold is stored under other names."""

    file: str
    names: tuple[str, ...]
    tied: dict[str, str]
    #: Of the file, and of the tensors in it.
    size: int
    nbytes: int


@dataclass(slots=True)
class _Open:
    """The file that is being written."""

    path: Path
    file: FileIO
    room: int
    header: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    waiting: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    tied: dict[str, str] = field(default_factory=dict[str, str])
    #: What the header takes, and where the next tensor begins.
    used: int = 64
    end: int = 0
    nbytes: int = 0


class ShardWriter:
    """Writes tensors into files of about one size; what is larger gets a file of its own."""

    def __init__(
        self, folder: Path, prefix: str, limit: int, names: Iterable[str], finished: Callable[[Shard], None], first: int
    ) -> None:
        """Begin.

        Args:
            prefix: how the names of the files begin.
            limit: how many bytes of tensors a file should have at most.
            names: all names that may come.
            finished: called for each file that is on the disk for good.
            first: the number of the first file.
        """
        self._folder, self._prefix, self._limit, self._finished, self._number = folder, prefix, limit, finished, first
        self._to_come = sum(_room_for(name) for name in names)
        self._open: _Open | None = None
        self._same = _Same()
        # What is written gets to the disk while the next file is written.
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="nnsplice-fsync")
        self._settling: Future[None] | None = None

    def add(self, name: str, tensor: Tensor) -> None:
        """Write a tensor, or record that it is stored already under another name.

        Raises:
            WriteFailed: the disk did not take it.
        """
        plain = _plain(name, tensor)
        kept = self._same.kept(tensor, plain)
        if kept is not None:
            self._current(name, 0, 0).tied[name] = kept
            return
        current = self._current(name, plain.nbytes, plain.dim())
        shape = header_shape(plain.dtype, tuple(plain.shape))
        current.header[name] = {"dtype": NAMES[plain.dtype], "shape": shape}
        current.used += len(json.dumps(name)) + len(str(shape)) + _PUNCTUATION
        current.nbytes += plain.nbytes
        self._to_come -= _room_for(name)
        if plain.nbytes % _ALIGN and plain.nbytes <= _WAITS:
            # A copy: who offers it may use its memory for the next one.
            current.waiting[name] = plain.clone()
            self._same.remember(name, tensor, current.waiting[name])
        else:
            self._same.remember(name, tensor, (current.path, self._write(current, name, plain), plain.nbytes))

    def known(self, name: str, tensor: Tensor) -> None:
        """Remember a tensor that a finished file holds, so that its other names are not stored again."""
        self._same.remember(name, tensor, _plain(name, tensor).clone())

    def close(self) -> None:
        """Finish the last file, and wait until everything is on the disk."""
        self._finish()
        if self._settling is not None:
            self._settling.result()
        self._disk.shutdown()

    def abandon(self) -> None:
        """Close what is open, which is of no use; what is finished gets to the disk."""
        if self._open is not None:
            self._open.file.close()
        self._disk.shutdown()

    # -- one file ------------------------------------------------------------------------------------------------------

    def _current(self, name: str, nbytes: int, dims: int) -> _Open:
        current, more = self._open, _room_for(name) + 8 * dims
        if current is not None:
            full = current.nbytes and current.nbytes + nbytes > self._limit
            if not full and current.used + more <= current.room:
                return current
            self._finish()
        room = max(_LEAST_ROOM, min(64 + self._to_come + more, _MOST_ROOM))
        room = -(-room // 64) * 64 - 8  # the length before it has 8 bytes; tensors begin at a multiple of 64
        path = self._folder / f"{self._prefix}{self._number:05d}.safetensors"
        self._number += 1
        with disk(path, name):
            file = FileIO(path, "wb")
            self._open = _Open(path, file, room)
            file.seek(8 + room)
        return self._open

    def _write(self, current: _Open, name: str, tensor: Tensor) -> int:
        begin, start = current.end, 8 + current.room + current.end
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
            self._settle(Shard("", (), current.tied, 0, 0), None)
            return
        with current.file as file:
            # The widest numbers first, so that each lies at a multiple of its width.
            for name, tensor in sorted(current.waiting.items(), key=lambda pair: -pair[1].itemsize):
                self._write(current, name, tensor)
            with disk(current.path, "its header"):
                told = json.dumps({_NO_TENSOR: {"format": "pt"}, **current.header}, separators=(",", ":")).encode()
                if len(told) > current.room:
                    raise MapperError(f"the header of {current.path} does not fit: {len(told)} > {current.room}")
                file.seek(0)
                _write_all(file, memoryview(current.room.to_bytes(8, "little") + told.ljust(current.room)))
        size = 8 + current.room + current.end
        self._settle(Shard(current.path.name, tuple(current.header), current.tied, size, current.nbytes), current.path)

    def _settle(self, shard: Shard, path: Path | None) -> None:
        if self._settling is not None:
            self._settling.result()  # says here what the disk said about the file before

        def settle() -> None:
            with disk(path or self._folder, ", ".join(shard.names[:3]) or "names of tensors that are stored already"):
                if path is not None:
                    sync(path)
                self._finished(shard)

        self._settling = self._disk.submit(settle)


def sync(path: Path) -> None:
    """Have a file or a folder on the disk before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _room_for(name: str) -> int:
    return len(json.dumps(name)) + _PER_NAME


def _write_all(file: FileIO, view: memoryview) -> None:
    while len(view):
        view = view[file.write(view) or 0 :]


@contextmanager
def disk(path: Path, name: str) -> Generator[None]:
    """Say which file and which tensor it was that the disk did not take."""
    try:
        yield
    except OSError as error:
        if isinstance(error, NnspliceError):
            raise
        full = error.errno in (ENOSPC, EDQUOT)
        room = "room for the new checkpoint beside the old one, which stays until then"
        again = "resume=True   (goes on with the files that were finished, where there are any)"
        failed = WriteFailed(
            f"{path}: {error.strerror or error} while writing {name}",
            expected=room if full else None,
            write=again if full else None,
        )
        failed.errno = error.errno
        raise failed from error


def _plain(name: str, tensor: Tensor) -> Tensor:
    """The tensor as it is written: dense, in memory, contiguous."""
    if tensor.layout != torch.strided or tensor.is_meta:
        kind = "on the meta device, without numbers" if tensor.is_meta else f"a {tensor.layout} tensor"
        raise BadType(f"{name} is {kind}", expected="a dense tensor")
    if tensor.dtype not in NAMES:
        raise BadType(f"{name} is {tensor.dtype}, which safetensors does not have", write=f'Cast("{name}", dtype)')
    if name == _NO_TENSOR:
        raise MapperError(f"no tensor of a safetensors file can be called {name}", expected="another name")
    return tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()


# -- the same tensor by several names ----------------------------------------------------------------------------------

#: Where the bytes of a tensor are: in memory, or in a file.
_Where = Tensor | tuple[Path, int, int]


class _Same:
    """Which tensors were offered before by another name.

    The same memory is not enough: whoever offers tensors may fill one piece of memory again and again. So bytes are
    compared with those written, which is dear, and rarely needed.
    """

    def __init__(self) -> None:
        self._seen: dict[tuple[object, ...], tuple[str, _Where, object]] = {}

    def kept(self, tensor: Tensor, plain: Tensor) -> str | None:
        """The name that a tensor is stored by already, or None."""
        found = self._seen.get(_key(tensor)[0]) if tensor.nbytes else None
        if found is None:
            return None
        name, where, _ = found
        stored = where if isinstance(where, Tensor) else bytes_of(*where)
        same = torch.equal(stored.reshape(-1).view(torch.uint8), plain.reshape(-1).view(torch.uint8))
        return name if same else None

    def remember(self, name: str, tensor: Tensor, where: _Where) -> None:
        """Keep in mind where a tensor's bytes are."""
        if tensor.nbytes:
            key, alive = _key(tensor)
            self._seen[key] = (name, where, alive)


def _key(tensor: Tensor) -> tuple[tuple[object, ...], object]:
    from torch.multiprocessing import reductions

    # Holds the storage's place in memory, not its content, so that another one cannot come to lie there.
    weak = cast("Any", reductions).StorageWeakRef(tensor.untyped_storage())
    place: Sequence[object] = (weak.cdata, tensor.storage_offset(), tensor.dtype)
    return (*place, tuple(tensor.shape), tuple(tensor.stride())), weak
