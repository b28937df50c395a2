"""Vectors and models that several tests use."""

from __future__ import annotations

from typing import Any

import torch

import nnsplice as ns
from zoo import wrap

PROMPTS = ["w3 w4 w5 w6 w7 w8", "w9 w10 w11", "w12 w13 w14 w15 w16"]


#: Families whose own masks overflow in float64, so that a padded batch is NaN there without any steering.
SINGLE = ("bloom", "gemma2")


def precise(family: str = "gpt2", **overrides: Any) -> Any:
    """A tiny model in float64, whose generation does not stop by itself."""
    model = wrap(family, **overrides)
    module = model._module if family in SINGLE else model._module.double()
    module.generation_config.eos_token_id = None
    module.generation_config.pad_token_id = 0
    return model


def vector(*layers: int, width: int = 16, seed: int = 0, site: str = "output", length: float = 3.0) -> Any:
    """A random direction for each layer."""
    drawn = torch.Generator().manual_seed(seed)
    pairs = []
    for layer in layers:
        tensor = torch.randn(1, width, dtype=torch.float64, generator=drawn)
        pairs.append((f"layers[{layer}].{site}[-1]", length * tensor / tensor.norm()))
    return ns.steering.SteeringVector.of(ns.SavedActivation.from_pairs(*pairs))


def ids(model: Any, prompts: list[str] = PROMPTS) -> list[list[int]]:
    """Token ids of prompts."""
    return [model.tokenizer(prompt)["input_ids"] for prompt in prompts]
