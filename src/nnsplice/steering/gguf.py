"""Control vectors for llama.cpp, as GGUF files.

A control vector is a GGUF file with one-dimensional F32 tensors `direction.N`. llama.cpp adds tensor N to the output
of block N (counted from 0) at every position, and reads no tensor 0, so block 0 cannot be expressed.

What the format cannot express is refused.
"""

from __future__ import annotations

import math
import os
from typing import Any

import torch
from torch import Tensor

from nnsplice.activations import SavedActivation
from nnsplice.activations.access import site_of
from nnsplice.atlas import Atlas
from nnsplice.errors import BadArgument, BadType, FileError, RefusedPlace, circumstances, named
from nnsplice.gguf import read_file, write_file
from nnsplice.paths import Path, Step
from nnsplice.steering.about import About
from nnsplice.steering.block import Steering
from nnsplice.steering.rules import Rule
from nnsplice.steering.sites import vectors_of
from nnsplice.steering.vector import SteeringVector


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
        path: the file to write.
        coefficient: the factor of a vector; a steering has its own.
        model_hint: the architecture, by llama.cpp's name; taken from the vector if left out.

    Raises:
        RefusedPlace: a site that the format has no tensor for: block 0, or anything but the output of a block.
        BadArgument: a steering that does something other than add at all tokens.
        BadType: neither a vector nor a steering.
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
    """Read a llama.cpp control vector: `layers[N].output` for each `direction.N`.

    >>> from tempfile import TemporaryDirectory
    >>> vector = ns.steering.SteeringVector.of(ns.capture(model, "w3 w4", "layers[1:3].output[-1]"))
    >>> with TemporaryDirectory() as folder:
    ...     ns.steering.to_gguf(vector, f"{folder}/kind.gguf", coefficient=4.0)
    ...     ns.steering.from_gguf(f"{folder}/kind.gguf")
    SteeringVector: 2 sites, width 16, method given, unit as read, the coefficient multiplied in
      layers[1].output
      layers[2].output

    Args:
        path: the GGUF file.

    Returns:
        The vectors, with the coefficient already multiplied in.

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
    """The vector that a rule adds.

    Raises:
        BadArgument: it does something else.
    """
    reasons = {
        not rule.adds: f"llama.cpp adds control vectors, and this rule is {rule.name}",
        rule.where.kind != "all": f"llama.cpp adds at every position, and this rule says where {rule.where}",
        rule.when is not None: "llama.cpp has no conditions",
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
    """The block whose output a site is."""
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
    """The block of a native path, if it is located in a model."""
    if not place.native or place.site is None or place.value != "output" or place.item is not None:
        return None
    last = place.steps[-1]
    inner = [step for step in place.steps if step.index is not None]
    whole_output = site_of(place).columns is None and site_of(place).kind == "plain"
    return last.index if whole_output and inner == [last] and isinstance(last.index, int) else None
