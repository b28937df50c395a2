"""How many tokens run at once."""

from __future__ import annotations

import pytest
import torch

from nnsplice.engine import memory
from zoo import wrap


def test_on_a_gpu_the_free_memory_says_how_many_tokens_run_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrap("llama")
    block = model._module.model.layers[0]
    # One token's queries, keys, values, attention, gate, up, down and norms, four times, and 64 logits: all in float32.
    linear = sum(layer.out_features for layer in block.modules() if isinstance(layer, torch.nn.Linear))
    assert linear * 4 * 4 < memory.bytes_per_token(model) < 2 * linear * 4 * 4
    needs = memory.bytes_per_token(model)
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (needs * 100, needs * 1000))
    assert memory.room(model) == 50
    model._module.double()
    assert memory.room(model) == 25
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (0, 0))
    assert memory.room(model) == 1
