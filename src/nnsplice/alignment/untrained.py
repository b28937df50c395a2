"""The control of random weights: the same architecture, initialised anew."""

from __future__ import annotations

import copy
from typing import Any

import torch

from nnsplice import engine
from nnsplice.atlas import unwrap
from nnsplice.errors import BadArgument
from nnsplice.models import load


def untrained(model: engine.Model, seed: int) -> engine.Model:
    """A model of the same class and config, with weights as they are before training.

    Raises:
        BadArgument: the model has no config to be built from.
    """
    root: Any = unwrap(model)
    config = getattr(root, "config", None)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            twin = type(root)(copy.deepcopy(config))
    except Exception as error:
        raise BadArgument(
            f"no twin with random weights can be made of this {type(root).__name__}: {error}",
            expected="a model that is made of its config, or the twin itself",
            write="random_model=ns.load(module_with_random_weights, tokenizer)",
        ) from None
    like = next(p for p in root.parameters() if p.is_floating_point())
    twin = twin.to(like.device, like.dtype).eval()
    processor = model.__dict__.get("processor")  # of images, which has a tokenizer of its own
    if processor is not None:
        return load(twin, processor=processor)
    return load(twin, engine.tokenizer_of(model) or False)
