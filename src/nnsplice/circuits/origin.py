"""The provenance of a circuit: its model's graph and weights, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nnsplice import engine
from nnsplice.circuits.shape import Shape
from nnsplice.circuits.wiring import wiring_of
from nnsplice.errors import KeyMismatch
from nnsplice.paths import Path, parse_path

#: What of a circuit's provenance is about its model.
OF_MODEL = ("model", "revision", "weights", "width")


def graph_of(model: Any) -> Shape:
    """All edges that a model has."""
    return wiring_of(engine.as_model(model)).shape


def provenance_of(model: Any) -> dict[str, Any]:
    """The model's name, revision and weights."""
    model = engine.as_model(model)
    name, revision = engine.name_of(model)
    told = {"model": name, "revision": revision, "weights": engine.weights_digest(model)}
    return {key: value for key, value in told.items() if value is not None}


def check_model(provenance: Mapping[str, Any], model: Any) -> None:
    """Raise for a model that something was not made of.

    Raises:
        KeyMismatch: its weights are others.
    """
    weights = provenance.get("weights")
    model = engine.as_model(model)
    if weights is not None and weights != engine.weights_digest(model):
        raise KeyMismatch(
            f"this was made of {provenance.get('model')} with other weights than this model has",
            expected="the model that it was made of",
            write="circuit.on(model)   (takes it over to this model)",
        )


def expanded(model: Any, path: str | Path) -> list[str]:
    """The senders that a path means in a model."""
    given = parse_path(path)
    found = engine.expand(engine.as_model(model), given.place)
    return [str(one.at(given.position)) for one in found]
