"""Functions that other processes import by name, in the tests of distributed sweeps."""

from __future__ import annotations

import time
from typing import Any

from torch import Tensor

from zoo import wrap


def tiny() -> Any:
    """The model of these tests."""
    return wrap("gpt2")


def other() -> Any:
    """The same with other weights."""
    return wrap("gpt2", seed=5)


def precise() -> Any:
    """The model in float64, whose generation does not stop by itself."""
    return _precise(tiny())


def precise_other() -> Any:
    """The other model in float64."""
    return _precise(other())


def _precise(model: Any) -> Any:
    model._module.double()
    model._module.generation_config.eos_token_id = None
    model._module.generation_config.pad_token_id = 0
    return model


def slow(logits: Tensor) -> Tensor:
    """A metric that takes so long that a process can be ended in the middle of it."""
    time.sleep(0.02 * len(logits))
    return logits[:, 7] - logits[:, 8]


def words(text: str) -> float:
    """A metric of texts."""
    return float(len(set(text.split())))


def pushed(h: Tensor, v: Tensor, c: Any) -> Tensor:
    """An operator of one's own."""
    return h + 2 * c * v


def largest(logits: Tensor) -> Tensor:
    """A metric of one's own."""
    return logits.max(-1).values


def halved(value: Tensor) -> Tensor:
    """An operation of one's own."""
    return value / 2


def with_sae() -> Any:
    """A model with an SAE of its own."""
    import nnsplice as ns
    from subspaces.test_packed_features import sae_of

    model = wrap("llama")
    model._module.double()
    ns.attach_sae(model, "layers[1].mlp.output", sae_of(), "s")
    return model
