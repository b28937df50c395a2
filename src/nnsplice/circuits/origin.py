"""The provenance of a circuit: its model's graph and weights, as plain data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from nnsplice import engine
from nnsplice.activations import features
from nnsplice.atlas import attached, unwrap
from nnsplice.circuits.shape import Shape
from nnsplice.circuits.wiring import wiring_of
from nnsplice.errors import KeyMismatch
from nnsplice.paths import Path, parse_path
from nnsplice.sweeps.identity import model_record

#: The keys of a provenance that describe the model.
OF_MODEL = ("model", "revision", "weights", "width")


def graph_of(model: Any) -> Shape:
    """All edges that a model has."""
    return wiring_of(engine.as_model(model)).shape


def provenance_of(model: Any, senders: Iterable[Path] = ()) -> dict[str, Any]:
    """The model's name, revision and weights, and the SAEs of those senders that are their features."""
    model = engine.as_model(model)
    found = model_record(model)
    held = attached(unwrap(model))
    saes = features.identities(model, (one for one in senders if one.sae is not None and one.sae.name in held))
    return {key: value for key, value in (found | ({"saes": saes} if saes else {})).items() if value is not None}


def saes_in(provenance: Mapping[str, Any], senders: Iterable[Path]) -> dict[str, Any]:
    """The SAEs in a provenance whose features are among these senders."""
    names = {one.sae.name for one in senders if one.sae is not None}
    found = provenance.get("saes")
    return {name: one for name, one in found.items() if name in names} if isinstance(found, Mapping) else {}


def check_model(provenance: Mapping[str, Any], model: Any, senders: Iterable[Path] = ()) -> None:
    """Raise for a model that something was not made of.

    Args:
        senders: its senders; their SAEs have to be the ones that it was made with.

    Raises:
        KeyMismatch: its weights are others.
        BadArgument: another SAE is attached to it.
    """
    features.check_identities(engine.as_model(model), saes_in(provenance, senders), "this")
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
