"""Packed rows see what the model's own masks let them see: windows, chunks, documents, whatever stands in them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import nnsplice as ns
from hooked import build, by_hooks, wrapped
from nnsplice.packed import masks
from nnsplice.packed.indices import Indices
from nnsplice.packed.layout import AttentionGroup
from nnsplice.sweeps import plan_sweep, run
from zoo import _MODERN, _MOE, having

METRIC = ns.logit_diff(7, 8)
_LLAMA4 = {
    **_MODERN, "head_dim": 6, "intermediate_size_mlp": 32, "num_local_experts": 4, "attention_chunk_size": 3,
    "layer_types": ["chunked_attention", "full_attention", "chunked_attention"],
}  # fmt: skip
#: Families whose window stands in the mask alone, in chunks, or in a mask that attention computes.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "phimoe": ("PhimoeConfig", {**_MODERN, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 3}),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {
            **_MODERN, **_MOE, "shared_expert_intermediate_size": 8, "use_sliding_window": True, "sliding_window": 3,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        },
    ),
    "doge": ("DogeConfig", {**_MODERN, "sliding_window": 3}),
    "llama4": ("Llama4TextConfig", {**_LLAMA4, "attn_temperature_tuning": False}),
    # ... whose layers without rotary embeddings count the tokens that they are given as positions.
    "llama4_tuned": ("Llama4TextConfig", {**_LLAMA4, "floor_scale": 2, "attn_scale": 1.5, "no_rope_layers": [1, 0, 1]}),
}  # fmt: skip
CLEAN, CORRUPTED = [*range(3, 12)], [3, 40, 20, 6, 45, 8, 33, 10, 31]
#: Llama 4 turns its queries and keys in float32, whatever its dtype.
NEAR = {"llama4": 1e-6, "llama4_tuned": 1e-6}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", CONFIGS)
def test_prompts_longer_than_the_window_are_packed_right(family: str, attention: str) -> None:
    module = build(*CONFIGS[family], attention)
    model = wrapped(module)
    plan = plan_sweep(model, CLEAN, CORRUPTED, "layers[:].output", METRIC)
    expected = by_hooks(module, plan, CLEAN, CORRUPTED)
    for executor in ("packed", "auto"):
        result = run(plan, model, executor=executor, progress=False)
        assert np.abs(result.table.values[0] - expected).max() < NEAR.get(family, 1e-12)
        assert result.run.executor == "packed"
    assert len({round(value, 9) for value in expected}) > 8


@pytest.mark.parametrize("family", CONFIGS)
def test_prompts_of_several_lengths_share_a_pack_with_their_own_windows(family: str) -> None:
    model = wrapped(build(*CONFIGS[family]))
    clean, corrupted = [CLEAN, CLEAN[:2], CLEAN[:6]], [CORRUPTED, CORRUPTED[:2], CORRUPTED[:6]]
    sites = ["layers[:].output", "layers[:].attn.q", "layers[:].groups[:].v", "layers[:].heads[:].q[-1]"]
    plan = plan_sweep(model, clean, corrupted, having(model, sites), METRIC)
    packed, alone = (run(plan, model, executor=how, progress=False).table.values for how in ("packed", "reference"))
    assert np.nanmax(np.abs(packed - alone)) < NEAR.get(family, 1e-12)


def test_masks_of_several_prompts_become_one_table_where_they_agree() -> None:
    module, device = torch.nn.Identity(), torch.device("cpu")
    long, short = masks.causal(5, 2, device), masks.causal(3, 2, device)
    table = masks.tables([{module: long.expand(2, -1, -1, -1)}, {module: short}], [(2, 5), (1, 3)])[module]
    assert table is not None and torch.equal(table, long)
    assert masks.tables([{module: masks.causal(5, 9, device)}], [(4, 5)])[module] is None
    documents = masks.causal(3, None, device).clone()
    documents[..., 2, 1] = False
    table = masks.tables([{module: long}, {module: documents}], [(2, 5), (1, 3)])[module]
    assert table is not None and table.shape == (3, 1, 5, 5)
    assert torch.equal(table[:2], long.expand(2, -1, -1, -1)) and torch.equal(table[2:, :, :3, :3], documents)
    asks = np.array([[0, 1], [2, 3]])
    group = AttentionGroup.of(
        asks, np.array([[0, 1, 2], [5, 6, 7]]), np.array([[1, 2], [1, 2]]), np.array([0, 2]), Indices(device)
    )
    chosen = group.mask(table)
    assert chosen is not None
    assert chosen[:, 0].tolist() == [
        [[True, True, False], [False, True, True]], [[True, True, False], [True, False, True]],
    ]  # fmt: skip


def test_what_is_added_to_scores_is_kept_and_later_tokens_are_refused() -> None:
    module, bias = torch.nn.Identity(), torch.zeros(1, 2, 3, 3, dtype=torch.float64)
    bias = bias.masked_fill(~masks.causal(3, None, bias.device), torch.finfo(bias.dtype).min)
    assert masks.tables([{module: bias}], [(1, 3)])[module] is None
    bias[:, 1, 2, 0] = 0.5
    table = masks.tables([{module: bias}], [(1, 3)])[module]
    assert table is not None and table[0, :, 2, 0].tolist() == [0.0, 0.5] and table[0, 0, 0, 1] == float("-inf")
    prefix = masks.causal(3, None, bias.device).clone()
    prefix[..., 0, 1] = True
    with pytest.raises(NotImplementedError, match="see later ones"):
        masks.tables([{module: prefix}], [(1, 3)])
    with pytest.raises(NotImplementedError, match=r"shape \[1, 1, 3, 3\] for 4 tokens"):
        masks.tables([{module: prefix}], [(1, 4)])
