"""The portable sites that a model has, for tests over all families."""

from __future__ import annotations

from typing import Any

import nnsplice as ns
from nnsplice.errors import NnspliceError

PLACES = (
    "embed.output",
    "layers[:].input",
    "layers[:].output",
    "layers[:].mid",
    "layers[:].attn.output",
    "layers[:].mlp.output",
    "layers[:].heads[:].output",
    "layers[:].heads[:].q",
    "layers[:].groups[:].k",
    "layers[:].groups[:].v",
    "layers[:].mlp.up.output",
    "layers[:].neurons[3].output",
    "final_norm.output",
    "unembed.output",
    "encoder.layers[:].output",
    "encoder.layers[:].heads[:].output",
    "encoder.layers[:].mlp.output",
)


def places_of(model: Any) -> list[ns.Path]:
    """Every single site of the list that this model has and does not refuse, in execution order."""
    found: list[ns.Path] = []
    for place in PLACES:
        try:
            found += ns.expand(model, place)
        except NnspliceError:
            continue
    return ns.expand(model, found)
