"""Headers of safetensors files: what is in a file and where, without touching a tensor."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from nnsplice.errors import FileError

#: A type's name in a header -> its name in torch. Older versions of torch lack some of them.
_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
    "C64": "complex64", "F8_E4M3": "float8_e4m3fn", "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz", "F8_E8M0": "float8_e8m0fnu", "F4": "float4_e2m1fn_x2",
}  # fmt: skip
DTYPES: Mapping[str, torch.dtype] = {
    name: getattr(torch, attribute) for name, attribute in _NAMES.items() if hasattr(torch, attribute)
}
NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}
#: Two numbers share a byte: the header counts numbers, torch counts bytes.
_HALF = "F4"
#: What safetensors itself refuses to read.
_LONGEST = 100_000_000


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file."""

    name: str
    path: Path
    kind: str
    #: As torch has it.
    shape: tuple[int, ...]
    #: In the file, header included.
    start: int
    nbytes: int

    @property
    def dtype(self) -> torch.dtype:
        """The type of its numbers.

        Raises:
            FileError: this torch does not have it.
        """
        if self.kind not in DTYPES:
            raise FileError(f"{self.name} in {self.path} is of type {self.kind}, which torch {torch.__version__} lacks")
        return DTYPES[self.kind]


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says about itself."""

    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]


def header_shape(dtype: torch.dtype, shape: tuple[int, ...]) -> list[int]:
    """A tensor's shape as a header has it."""
    return [*shape[:-1], shape[-1] * 2] if NAMES[dtype] == _HALF and shape else list(shape)


def read_header(path: Path) -> Header:
    """Read and check a header.

    Raises:
        FileError: no safetensors file, or a damaged one; the message names the tensor where it is about one.
    """
    with path.open("rb") as file:
        first = file.read(8)
        length = int.from_bytes(first, "little")
        end = path.stat().st_size
        if len(first) < 8 or not 2 <= length <= min(_LONGEST, end - 8):
            raise FileError(f"{path} is cut off or no safetensors file", expected="8 bytes of length, then a header")
        raw = file.read(length)
    try:
        found: Any = json.loads(raw)
        metadata: dict[str, str] = found.pop("__metadata__", None) or {}
        entries = {name: _entry(path, name, told, 8 + length) for name, told in found.items()}
    except FileError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileError(f"the header of {path} is damaged: {error!r}", expected="a safetensors file") from None
    for entry in entries.values():
        if entry.start + entry.nbytes > end:
            raise FileError(
                f"{path} is cut off: {entry.name} ends at byte {entry.start + entry.nbytes}, the file at {end}",
                expected="the whole file; download or copy it again",
            )
    return Header(entries, metadata)


def _entry(path: Path, name: str, told: Any, data: int) -> Entry:
    begin, end = (int(offset) for offset in told["data_offsets"])
    kind, shape = str(told["dtype"]), tuple(int(length) for length in told["shape"])
    if kind == _HALF and shape:
        shape = (*shape[:-1], shape[-1] // 2)
    nbytes = prod(shape) * DTYPES[kind].itemsize if kind in DTYPES else end - begin
    if not 0 <= begin <= end or end - begin != nbytes or min(shape, default=0) < 0:
        raise FileError(
            f"{name} in {path} is {kind} {list(shape)} and has {end - begin} bytes",
            expected=f"{nbytes} bytes",
        )
    return Entry(name, path, kind, shape, data + begin, nbytes)
