"""Bytes of a file as a tensor.

A large tensor is a private memory map of its byte range: pages are read when they are used, and freed with the tensor.
Python's own mmap keeps a file descriptor for each map, and safetensors maps whole files, whose pages then stay; so this
calls the C library. Small tensors are read.
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

#: Shorter ranges are read: a map costs a few microseconds and whole pages.
SMALL = 1 << 16

_READ_WRITE, _PRIVATE, _FAILED = 3, 2, ctypes.c_void_p(-1).value


def _mmap_functions() -> tuple[Callable[..., Any], Callable[..., Any]] | None:
    """mmap and munmap of the C library; None on Windows."""
    if os.name != "posix":
        return None
    library = ctypes.CDLL(None, use_errno=True)
    size, number = ctypes.c_size_t, ctypes.c_int
    library.mmap.argtypes = [ctypes.c_void_p, size, number, number, number, ctypes.c_int64]
    library.mmap.restype = ctypes.c_void_p
    library.munmap.argtypes = [ctypes.c_void_p, size]
    return library.mmap, library.munmap


_MMAP = _mmap_functions()


def buffer(tensor: Tensor) -> memoryview:
    """The memory of a dense tensor, as bytes."""
    return memoryview(cast("Buffer", tensor.reshape(-1).view(torch.uint8).numpy()))


def bytes_of(path: Path, start: int, length: int) -> Tensor:
    """A byte range of a file as a tensor of bytes; changes do not reach the file.

    Raises:
        FileError: the file is shorter.
    """
    with path.open("rb", buffering=0) as file:
        if os.fstat(file.fileno()).st_size < start + length:
            raise FileError(f"{path} ends before byte {start + length}", expected="a whole file")
        mapped = _mapped(file.fileno(), start, length) if length >= SMALL else None
        return _read(file.fileno(), start, length) if mapped is None else mapped


def _mapped(descriptor: int, start: int, length: int) -> Tensor | None:
    if _MMAP is None:
        return None
    before = start % mmap.ALLOCATIONGRANULARITY
    address = _MMAP[0](None, length + before, _READ_WRITE, _PRIVATE, descriptor, start - before)
    if address is None or address == _FAILED:
        return None
    held = (ctypes.c_char * (length + before)).from_address(address)
    weakref.finalize(held, _MMAP[1], address, length + before).atexit = False
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
    """A block of an array in a file, as bytes; only its bytes are read.

    Args:
        start: where the array begins.
        shape: the array's shape; its items have `itemsize` bytes.
        ranges: `(start, stop)` for each dimension.
    """
    lengths = [stop - begin for begin, stop in ranges]
    # The dimensions after the last one that is cut are contiguous, so they are read as one piece.
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
