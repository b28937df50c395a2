"""Bytes of a file as a tensor.

A large tensor is a private mapping of its own stretch of the file: nothing is read before it is looked at, a copy out
of it costs one copy, and its memory goes when it goes. Python's own mmap keeps a descriptor for each mapping, and
safetensors maps whole files, whose pages then stay; so this asks the C library. Small tensors are read.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from nnsplice.errors import FileError

if TYPE_CHECKING:
    from typing_extensions import Buffer

#: A mapping costs a few microseconds and whole pages.
SMALL = 1 << 16

_READ_WRITE, _PRIVATE, _FAILED = 3, 2, ctypes.c_void_p(-1).value


def _c_functions() -> tuple[Callable[..., Any], Callable[..., Any]] | None:
    """mmap and munmap, where the system has them."""
    if os.name != "posix":
        return None
    library = ctypes.CDLL(None, use_errno=True)
    size, number = ctypes.c_size_t, ctypes.c_int
    library.mmap.argtypes = [ctypes.c_void_p, size, number, number, number, ctypes.c_int64]
    library.mmap.restype = ctypes.c_void_p
    library.munmap.argtypes = [ctypes.c_void_p, size]
    return library.mmap, library.munmap


_C = _c_functions()


def buffer(tensor: Tensor) -> memoryview:
    """The memory of a dense tensor, as bytes."""
    return memoryview(cast("Buffer", tensor.reshape(-1).view(torch.uint8).numpy()))


def bytes_of(path: Path, start: int, length: int) -> Tensor:
    """A stretch of a file as a tensor of bytes, which may be changed without changing the file.

    Raises:
        FileError: the file ends before.
    """
    with path.open("rb", buffering=0) as file:
        if os.fstat(file.fileno()).st_size < start + length:
            raise FileError(f"{path} ends before byte {start + length}", expected="a whole file")
        mapped = _mapped(file.fileno(), start, length) if length >= SMALL else None
        return _read(file.fileno(), start, length) if mapped is None else mapped


def _mapped(descriptor: int, start: int, length: int) -> Tensor | None:
    if _C is None:
        return None
    before = start % mmap.ALLOCATIONGRANULARITY
    address = _C[0](None, length + before, _READ_WRITE, _PRIVATE, descriptor, start - before)
    if address is None or address == _FAILED:
        return None
    held = (ctypes.c_char * (length + before)).from_address(address)
    weakref.finalize(held, _C[1], address, length + before).atexit = False
    return torch.frombuffer(held, dtype=torch.uint8, offset=before, count=length)


def _read(descriptor: int, start: int, length: int) -> Tensor:
    found = torch.empty(length, dtype=torch.uint8)
    _fill(descriptor, start, buffer(found))
    return found


def _fill(descriptor: int, start: int, view: memoryview) -> None:
    while len(view):
        count = os.preadv(descriptor, [view], start)
        if count == 0:
            raise FileError("the file became shorter while it was read", expected="a file that stays as it is")
        view, start = view[count:], start + count


def block_of(path: Path, start: int, shape: Sequence[int], itemsize: int, ranges: Sequence[tuple[int, int]]) -> Tensor:
    """A block of an array in a file, as bytes: exactly its bytes are read, and no others.

    Args:
        start: where the array begins.
        shape: the array's shape; its items have `itemsize` bytes.
        ranges: `(start, stop)` for each dimension.
    """
    lengths = [stop - begin for begin, stop in ranges]
    # What follows the last dimension that is cut is one piece.
    cut = max((i for i, n in enumerate(shape) if lengths[i] != n), default=-1)
    strides = [itemsize * prod(shape[i + 1 :]) for i in range(len(shape))]
    piece = itemsize * prod(shape[cut + 1 :]) * (lengths[cut] if cut >= 0 else 1)
    found = torch.empty(itemsize * prod(lengths), dtype=torch.uint8)
    view, offsets = buffer(found), [start + (ranges[cut][0] * strides[cut] if cut >= 0 else 0)]
    for i in range(max(cut, 0)):
        offsets = [offset + index * strides[i] for offset in offsets for index in range(*ranges[i])]
    with path.open("rb", buffering=0) as file:
        for number, offset in enumerate(offsets if len(view) else ()):
            _fill(file.fileno(), offset, view[number * piece : (number + 1) * piece])
    return found
