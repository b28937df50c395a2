"""Control vectors for llama.cpp: the GGUF format, as far as they need it.

A control vector is a GGUF file with one-dimensional F32 tensors `direction.N`. llama.cpp adds tensor N to the output
of block N (counted from 0) at every position, and reads no tensor 0, so block 0 cannot be expressed.

write_file, read_file     the format
to_gguf, from_gguf        vectors, with what cannot be expressed refused
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nnsplice.activations import SavedActivation
from nnsplice.activations.access import site_of
from nnsplice.atlas import Atlas
from nnsplice.errors import BadArgument, BadType, FileError, RefusedPlace, circumstances, named
from nnsplice.files import whole
from nnsplice.paths import Path, Step
from nnsplice.steering.block import Steering
from nnsplice.steering.rules import Rule
from nnsplice.steering.vector import About, SteeringVector, vectors_of

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
F32 = 0
#: The types of values in the header: the number of each, and how it is packed.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY, _U32, _F32 = 8, 9, 4, 6


def to_gguf(
    vector: SavedActivation | Steering,
    path: str | os.PathLike[str],
    *,
    coefficient: float = 1.0,
    model_hint: str | None = None,
) -> None:
    """Write a control vector for llama.cpp, in single precision, with the coefficient multiplied in.

    >>> from tempfile import TemporaryDirectory
    >>> acts = ns.capture(model, ["w3 w4", "w5 w6"], "layers[:].output[-1]")
    >>> vector = ns.steering.fit(acts.slice[0], acts.slice[1])
    >>> with TemporaryDirectory() as folder:
    ...     ns.steering.to_gguf(vector.at([1, 2]), f"{folder}/kind.gguf", coefficient=4.0)
    ...     ns.steering.from_gguf(f"{folder}/kind.gguf").keys()
    ['layers[1].output[-1]', 'layers[2].output[-1]']

    llama.cpp cannot steer block 0:

    >>> ns.steering.to_gguf(vector, "kind.gguf")
    Traceback (most recent call last):
    nnsplice.errors.RefusedPlace: llama.cpp's control vectors begin with block 1: direction.0 is rejected by its loader
        layers[0].output
      write: vector.at([n for n in vector.layers if n > 0])
      in: ns.steering.to_gguf

    Args:
        vector: directions for outputs of blocks, or a steering that adds such.
        coefficient: for a vector; a steering has its own.
        model_hint: the architecture, as llama.cpp's files name it; taken from the vector when left out.

    Raises:
        RefusedPlace: a place that the format has no tensor for: block 0, or no output of a block.
        BadArgument: a steering that does something else than add everywhere.
    """
    with circumstances("ns.steering.to_gguf"):
        if not math.isfinite(coefficient):
            raise BadArgument(f"coefficient={coefficient}", expected="a finite number")
        if isinstance(vector, Steering):
            if coefficient != 1.0:
                raise BadArgument("a steering has its own coefficient", write="ns.steering.to_gguf(vector, path, ...)")
            directions = [(rule.path, _expressible(rule)) for rule in vector.rules]
            model_hint = model_hint or Atlas.of(vector.model).tree.facts.get("model_type")
        elif isinstance(vector, SavedActivation):
            if vector.rows != 1:
                raise BadArgument(f"a capture of {vector.rows} rows is no one direction", write="vector.mean()")
            directions = [(place, float(coefficient) * direction.double()) for place, direction in vectors_of(vector)]
            model_hint = model_hint or (vector.about.model_type if isinstance(vector, SteeringVector) else None)
        else:
            raise BadType(f"{named(vector)} is no vector", expected="a steering vector, or a steering")
        tensors: dict[int, Tensor] = {}
        for place, direction in directions:
            block = _block(place)
            tensors[block] = tensors[block] + direction if block in tensors else direction
    arrays = {f"direction.{block}": tensors[block].detach().float().cpu().numpy() for block in sorted(tensors)}
    facts: dict[str, Any] = {
        "general.architecture": "controlvector",
        "controlvector.model_hint": model_hint or "unknown",
        "controlvector.layer_count": len(arrays),
    }
    if isinstance(vector, SteeringVector):
        facts["nnsplice.method"] = vector.method or "unknown"
        facts["nnsplice.coefficient"] = float(coefficient)
    write_file(path, facts, arrays)


def from_gguf(path: str | os.PathLike[str]) -> SteeringVector:
    """Read a control vector: `layers[N].output` for each `direction.N`.

    >>> from tempfile import TemporaryDirectory
    >>> vector = ns.steering.SteeringVector.of(ns.capture(model, "w3 w4", "layers[1:3].output[-1]"))
    >>> with TemporaryDirectory() as folder:
    ...     ns.steering.to_gguf(vector, f"{folder}/kind.gguf", coefficient=4.0)
    ...     ns.steering.from_gguf(f"{folder}/kind.gguf")
    SteeringVector: 2 places, width 16, method given, unit as read, the coefficient multiplied in
      layers[1].output
      layers[2].output

    Raises:
        FileError: the file is no control vector, or damaged.
    """
    facts, arrays = read_file(path)
    if facts.get("general.architecture") != "controlvector":
        raise FileError(
            f"{path} is a GGUF file of a {facts.get('general.architecture', 'model')}", expected="a control vector"
        )
    pairs: list[tuple[Path, Tensor]] = []
    for name, array in arrays.items():
        word, _, number = name.partition(".")
        if word != "direction" or not number.isdigit() or array.ndim != 1 or number == "0":
            raise FileError(f"{path} has a tensor {name} of shape {list(array.shape)}", expected="direction.1, .2, ...")
        place = Path((Step("layers", int(number)),), value="output", position=-1)
        pairs.append((place, torch.from_numpy(array.copy())[None]))
    if not pairs:
        raise FileError(f"{path} holds no direction")
    pairs.sort(key=lambda pair: pair[0].steps[0].index or 0)  # type: ignore[arg-type, return-value]  # a number each
    hint = facts.get("controlvector.model_hint")
    made = SteeringVector.of(SavedActivation.from_pairs(*pairs))
    method = facts.get("nnsplice.method")
    return made._with_about(
        About(
            method=str(method) if method else "read from GGUF",
            unit="as read, the coefficient multiplied in",
            model_type=hint if isinstance(hint, str) and hint != "unknown" else None,
        )
    )


def _expressible(rule: Rule) -> Tensor:
    """What a rule adds.

    Raises:
        BadArgument: it does something else.
    """
    reasons = {
        rule.name != "add": f"llama.cpp adds control vectors, and this rule is {rule.name}",
        rule.where.kind != "all": f"llama.cpp adds at every position, and this rule says where {rule.where}",
        rule.when is not None: "llama.cpp knows no condition",
        isinstance(rule.coefficient, tuple): "llama.cpp has one strength for all rows",
    }
    for found, reason in reasons.items():
        if found:
            raise BadArgument(
                f"{reason}, so a control vector cannot express it", path=rule, expected='operator="add", where="all"'
            )
    assert isinstance(rule.coefficient, float)
    return rule.coefficient * rule.vector.double()


def _block(place: Path) -> int:
    """The block whose output a place is."""
    steps = place.steps
    index = steps[0].index if steps else None
    named = len(steps) == 1 and steps[0].name == "layers" and not place.native and (place.value or "output") == "output"
    if not named or not isinstance(index, int) or place.tower == "encoder":
        index = _native_block(place)
    if index is None:
        raise RefusedPlace(
            "llama.cpp adds control vectors to the output of blocks, and this is no such output",
            path=place.place,
            write="a vector fitted on layers[:].output",
        )
    if index == 0:
        raise RefusedPlace(
            "llama.cpp's control vectors begin with block 1: direction.0 is rejected by its loader",
            path=place.place,
            write="vector.at([n for n in vector.layers if n > 0])",
        )
    if index < 0:
        raise RefusedPlace("a number from the end depends on the model", path=place.place, write="layers[11].output")
    return index


def _native_block(place: Path) -> int | None:
    """The block of a native path of a list of blocks, where a model has told what it is."""
    if not place.native or place.site is None or place.value != "output" or place.item is not None:
        return None
    last = place.steps[-1]
    inner = [step for step in place.steps if step.index is not None]
    whole_output = site_of(place).columns is None and site_of(place).kind == "plain"
    return last.index if whole_output and inner == [last] and isinstance(last.index, int) else None


# --- the format -------------------------------------------------------------------------------------------------------


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
        FilePath(temporary).write_bytes(head + bytes(-len(head) % ALIGNMENT) + b"".join(bodies))


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Any) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _text(value)
    if isinstance(value, float):
        return struct.pack("<If", _F32, value)
    return struct.pack("<II", _U32, value)


def read_file(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The facts and the F32 tensors of a GGUF file.

    Raises:
        FileError: no GGUF, a damaged one, or tensors of another type.
    """
    raw = FilePath(path).read_bytes()
    if raw[:4] != MAGIC:
        raise FileError(f"{path} is no GGUF file", expected="a file that begins with GGUF")
    try:
        reader = _Reader(raw, 4)
        (version,) = reader.take("<I")
        if version not in (2, 3):
            raise FileError(f"{path} has GGUF version {version}", expected="2 or 3")
        tensors, count = reader.take("<QQ")
        facts = {reader.text(): reader.value() for _ in range(count)}
        infos = []
        for _ in range(tensors):
            name, (dims,) = reader.text(), reader.take("<I")
            if dims > 4:
                raise FileError(f"{path} is damaged: {name} has {dims} axes")
            shape = reader.take(f"<{dims}Q")
            infos.append((name, shape, *reader.take("<IQ")))
        alignment = facts.get("general.alignment", ALIGNMENT)
        start = reader.at + -reader.at % alignment
        return facts, {name: _array(path, raw, start + at, name, shape, kind) for name, shape, kind, at in infos}
    except (
        struct.error,
        UnicodeDecodeError,
        KeyError,
        ValueError,
        TypeError,
        ZeroDivisionError,
        OverflowError,
    ) as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"{path} is damaged: {error}") from None


def _array(path: Any, raw: bytes, start: int, name: str, shape: Sequence[int], kind: int) -> np.ndarray:
    if kind != F32:
        raise FileError(f"{path} holds {name} as type {kind}", expected="F32, as control vectors are")
    count = int(np.prod(shape, dtype=object)) if shape else 1
    if start + 4 * count > len(raw):
        raise FileError(f"{path} is damaged: it ends before {name} does")
    return np.frombuffer(raw, "<f4", count, start).reshape(tuple(reversed(shape)))


class _Reader:
    """Reads one thing after another."""

    def __init__(self, raw: bytes, at: int) -> None:
        self.raw, self.at = raw, at

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
