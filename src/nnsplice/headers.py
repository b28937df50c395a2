"""Headers of safetensors files: names, types, shapes and offsets; no tensor is read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, cast

import torch

from nnsplice.errors import FileError
from nnsplice.files import from_json, local_path
from nnsplice.shown import shown

#: The name of a type in a header -> its name in torch. Older versions of torch lack some of them.
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
#: The longest header that safetensors reads.
_LONGEST = 100_000_000


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file.

    Attributes:
        name: the name of the tensor.
        path: the file.
        kind: the number type, by its name in safetensors.
        shape: the shape, as torch has it.
        start: the offset of its bytes in the file.
        nbytes: the number of its bytes.
    """

    name: str
    path: Path
    kind: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    @property
    def dtype(self) -> torch.dtype:
        """The type of its numbers.

        Raises:
            FileError: this torch does not have it.
        """
        if self.kind not in DTYPES:
            what = f"{shown(self.name)} in {self.path} is of type {shown(self.kind)}"
            raise FileError(f"{what}, which torch {torch.__version__} lacks")
        return DTYPES[self.kind]


@dataclass(frozen=True, slots=True)
class Header:
    """The header of a file: its tensors and its metadata."""

    entries: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]


def header_shape(dtype: torch.dtype, shape: tuple[int, ...]) -> list[int]:
    """A tensor's shape as a header has it."""
    return [*shape[:-1], shape[-1] * 2] if NAMES[dtype] == _HALF and shape else list(shape)


def read_header(path: str | os.PathLike[str], *, local: Path | None = None) -> Header:
    """Read and check a header; files that safetensors refuses are refused.

    Args:
        path: the file, by the name that messages say.
        local: where it is on this machine, if it is elsewhere.

    Raises:
        FileError: no safetensors file, or a damaged one; the message names the tensor where it is about one.
        BadArgument: an address of an object store, where `local` is left out.
    """
    path = os.fspath(path)
    local = local_path(path) if local is None else local
    with local.open("rb") as file:
        first = file.read(8)
        length = int.from_bytes(first, "little")
        end = os.fstat(file.fileno()).st_size
        if len(first) < 8 or not 2 <= length <= min(_LONGEST, end - 8):
            raise FileError(
                f"{path} is cut off, damaged or no safetensors file: it has {end} bytes, its header {length}",
                expected="8 bytes of length, then a header",
            )
        raw = file.read(length)
    found = from_json(raw, f"the header of {path}")
    if not isinstance(found, dict):
        raise FileError(
            f"the header of {path} is damaged: it is a {type(found).__name__}", expected="an object in JSON"
        )
    tensors = cast("dict[str, Any]", found)
    metadata: Any = tensors.pop("__metadata__", None) or {}
    entries = {name: _entry(path, name, fields, 8 + length) for name, fields in tensors.items()}
    for entry in entries.values():
        if entry.start + entry.nbytes > end:
            raise FileError(
                f"{path} is cut off or damaged: {shown(entry.name)} ends at byte {entry.start + entry.nbytes}, "
                f"the file at {end}",
                expected="the whole file; download or copy it again",
            )
    _check(path, local, entries)
    return Header(entries, metadata)


def _check(path: str, local: Path, entries: Mapping[str, TensorEntry]) -> None:
    """Raise if safetensors refuses the header, for gaps, overlaps, repeated names or its JSON."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(os.fspath(local), framework="np"):
            pass
    except (SafetensorError, ValueError) as error:
        for entry in entries.values():
            if entry.kind not in DTYPES:
                raise FileError(
                    f"{shown(entry.name)} in {path} is of type {shown(entry.kind)}; safetensors says: {error}",
                    expected=f"one of {', '.join(DTYPES)}",
                ) from None
        raise FileError(f"{path} is damaged or no safetensors file: {error}", expected="a safetensors file") from None


def _entry(path: str, name: str, fields: Any, data: int) -> TensorEntry:
    try:
        begin, end = (_whole(offset) for offset in fields["data_offsets"])
        kind, shape = str(fields["dtype"]), tuple(_whole(length) for length in fields["shape"])
    except (ValueError, KeyError, TypeError) as error:
        raise FileError(
            f"the header of {path} is damaged: of {shown(name)} in {path} it says {_short(fields)}",
            path=_short(error),
            expected='{"dtype": ..., "shape": [...], "data_offsets": [begin, end]}',
        ) from None
    # torch multiplies lengths without regard to zeros among them.
    if prod(max(length, 1) for length in shape) >= 1 << 63:
        raise FileError(f"{shown(name)} in {path} is {_short(shape)}", expected="fewer than 2**63 numbers")
    count = prod(shape)
    if kind == _HALF and count % 2:
        raise FileError(f"{shown(name)} in {path} is {kind} {list(shape)}", expected="whole bytes, of two numbers each")
    if kind == _HALF and shape:
        shape = (*shape[:-1], shape[-1] // 2)
    nbytes = prod(shape) * DTYPES[kind].itemsize if kind in DTYPES else end - begin
    if not begin <= end or end - begin != nbytes:
        raise FileError(
            f"{shown(name)} in {path} is {kind} {list(shape)} and has {end - begin} bytes",
            expected=f"{nbytes} bytes",
        )
    return TensorEntry(name, Path(path), kind, shape, data + begin, nbytes)


def _whole(number: Any) -> int:
    if type(number) is not int or number < 0:
        raise ValueError(f"{_short(number)} is no length and no offset")
    return number


def _short(value: object) -> str:
    try:
        return shown(value)
    except ValueError:  # Python does not write a number of thousands of digits
        return "a number of thousands of digits"
