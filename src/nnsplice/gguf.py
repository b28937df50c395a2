"""The GGUF format: headers, tensors in F32, and writing.

write_file, read_file     facts and F32 tensors
read_gguf_header          facts, and the name, shape and type of every tensor, without their numbers
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nnsplice.errors import FileError
from nnsplice.files import local_path, whole

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
F32 = 0
#: The types of values in the header: the number of each, and how it is packed.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY, _U32, _F32 = 8, 9, 4, 6
#: What reading a damaged header ends in.
_DAMAGE = (struct.error, UnicodeDecodeError, KeyError, ValueError, TypeError, ZeroDivisionError, OverflowError)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a file, by its header."""

    name: str
    #: As numpy has it: the last axis is the one whose numbers are neighbours.
    shape: tuple[int, ...]
    #: The number of its type in ggml: 0 for F32.
    kind: int
    #: In the file, header included.
    start: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """The header of a file."""

    facts: Mapping[str, Any]
    tensors: tuple[TensorInfo, ...]


def write_file(path: str | os.PathLike[str], facts: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Write a GGUF file of texts, whole numbers, fractions, and F32 tensors; whole, or not at all."""
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(arrays), len(facts))]
    for name, value in facts.items():
        parts += [_text(name), _value(value)]
    at, bodies = 0, []
    for name, array in arrays.items():
        body = np.ascontiguousarray(array, dtype="<f4").tobytes()
        parts += [_text(name), struct.pack("<I", array.ndim), struct.pack(f"<{array.ndim}Q", *reversed(array.shape))]
        parts.append(struct.pack("<IQ", F32, at))
        bodies.append(body + bytes(-len(body) % ALIGNMENT))
        at += len(bodies[-1])
    head = b"".join(parts)
    with whole(path) as temporary:
        Path(temporary).write_bytes(head + bytes(-len(head) % ALIGNMENT) + b"".join(bodies))


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Any) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _text(value)
    if isinstance(value, float):
        return struct.pack("<If", _F32, value)
    return struct.pack("<II", _U32, value)


def read_gguf_header(path: str | os.PathLike[str]) -> GgufHeader:
    """The facts of a GGUF file, and where its tensors are.

    Raises:
        FileError: no GGUF, or a damaged one.
    """
    with Path(path).open("rb") as file:
        if file.read(4) != MAGIC:
            raise FileError(f"{path} is no GGUF file", expected="a file that begins with GGUF")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as raw:
            return _outline(path, raw)


def read_file(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The facts and the F32 tensors of a GGUF file.

    Raises:
        FileError: no GGUF, a damaged one, or tensors of another type.
    """
    raw = local_path(path).read_bytes()
    if raw[:4] != MAGIC:
        raise FileError(f"{path} is no GGUF file", expected="a file that begins with GGUF")
    outline = _outline(path, raw)
    try:
        return dict(outline.facts), {tensor.name: _array(path, raw, tensor) for tensor in outline.tensors}
    except _DAMAGE as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"{path} is damaged: {error}") from None


def _outline(path: Any, raw: bytes | mmap.mmap) -> GgufHeader:
    try:
        reader = _Reader(raw)
        (version,) = reader.take("<I")
        if version not in (2, 3):
            raise FileError(f"{path} has GGUF version {version}", expected="2 or 3")
        tensors, count = reader.take("<QQ")
        facts = {reader.text(): reader.value() for _ in range(count)}
        infos: list[tuple[str, Sequence[int], int, int]] = []
        for _ in range(tensors):
            name, (dims,) = reader.text(), reader.take("<I")
            if dims > 4:
                raise FileError(f"{path} is damaged: {name} has {dims} axes")
            infos.append((name, reader.take(f"<{dims}Q"), *reader.take("<IQ")))
        alignment = facts.get("general.alignment", ALIGNMENT)
        start = reader.at + -reader.at % alignment
        return GgufHeader(
            facts, tuple(TensorInfo(name, tuple(reversed(shape)), kind, start + at) for name, shape, kind, at in infos)
        )
    except _DAMAGE as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"{path} is damaged: {error}") from None


def _array(path: Any, raw: bytes, tensor: TensorInfo) -> np.ndarray:
    if tensor.kind != F32:
        raise FileError(f"{path} holds {tensor.name} as type {tensor.kind}", expected="F32, as control vectors are")
    count = int(np.prod(tensor.shape, dtype=object)) if tensor.shape else 1
    if tensor.start + 4 * count > len(raw):
        raise FileError(f"{path} is damaged: it ends before {tensor.name} does")
    return np.frombuffer(raw, "<f4", count, tensor.start).reshape(tensor.shape)


class _Reader:
    """Reads one thing after another."""

    def __init__(self, raw: bytes | mmap.mmap) -> None:
        self.raw, self.at = raw, 4  # behind the magic number

    def take(self, form: str) -> tuple[Any, ...]:
        """Numbers, packed as `struct` says."""
        found = struct.unpack_from(form, self.raw, self.at)
        self.at += struct.calcsize(form)
        return found

    def text(self) -> str:
        """A text after its length."""
        (length,) = self.take("<Q")
        if self.at + length > len(self.raw):
            raise ValueError("a text is longer than the file")
        self.at += length
        return self.raw[self.at - length : self.at].decode()

    def value(self, kind: int | None = None) -> Any:
        """A fact, after the number of its type."""
        if kind is None:
            (kind,) = self.take("<I")
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            of, length = self.take("<IQ")
            if length > len(self.raw):
                raise ValueError("a list is longer than the file")
            return [self.value(of) for _ in range(length)]
        return self.take(f"<{_SCALARS[int(kind or 0)]}")[0]
