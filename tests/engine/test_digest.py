"""The digest of a model's weights: another one for any other number, the same wherever and however they are stored."""

from __future__ import annotations

import pytest
import torch

from nnsplice import engine
from zoo import wrap


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_number_of_a_model_counts(dtype: torch.dtype) -> None:
    model = wrap("llama")
    model._module.to(dtype)
    before = engine.weights_digest(model)
    for name, parameter in model._module.named_parameters():
        flat = parameter.data.view(-1)
        for at in (0, 17 % len(flat), len(flat) - 1):
            held = flat[at].clone()
            flat[at] = held + 1
            assert engine.weights_digest(model) != before, (name, at)
            flat[at] = held
    assert engine.weights_digest(model) == before
    weight = model._module.model.layers[1].self_attn.o_proj.weight
    weight.data = weight.data.t().contiguous().t()  # the same numbers, stored otherwise
    assert engine.weights_digest(model) == before
    weight.data = weight.data[:, [4, 5, 6, 7, 0, 1, 2, 3, *range(8, 16)]]  # two heads exchanged
    assert engine.weights_digest(model) != before
