"""Every parameter of an attention is a head's, all heads' alike, or named: by gradients of one head's slice."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import nnsplice as ns
import unusual
import zoo
from nnsplice.atlas import Atlas
from nnsplice.errors import RefusedPlace


def rows_with_gradient(module: nn.Module, layer: int, head: int) -> dict[str, set[int]]:
    """Parameters of a layer's attention -> their rows that the head's slice before the output projection depends on."""
    block = Atlas.of(module).towers["decoder"].blocks[layer]
    seen: list[torch.Tensor] = []
    hook = module.get_submodule(str(block.o)).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    module(input_ids=torch.tensor([[3, 9, 4, 7, 5, 8]]))
    hook.remove()
    part = seen[0][..., head * block.head_dim : (head + 1) * block.head_dim]
    names = [name for name, _ in module.named_parameters() if name.startswith(f"{block.attn}.")]
    grads = torch.autograd.grad(
        (part * torch.randn_like(part)).sum(), [module.get_parameter(name) for name in names], allow_unused=True
    )
    lines = {
        name: grad.reshape(len(grad), -1).any(1) for name, grad in zip(names, grads, strict=True) if grad is not None
    }
    return {name: set(rows.nonzero().flatten().tolist()) for name, rows in lines.items() if rows.any()}


#: Model -> a layer with attention, parameters that are a head's or its group's, and those that all heads share.
OWNED = {
    "beam": (0, ("gate_bias", "gate_proj.weight"), ("q_norm.weight", "k_norm.weight")),
    "inkling_text": (
        0,
        ("r_proj.weight", "k_sconv.conv1d.weight", "v_sconv.conv1d.weight"),
        ("q_norm.weight", "k_norm.weight", "rel_logits_proj.proj"),
    ),
    "laguna": (1, ("g_proj.weight",), ("q_norm.weight", "k_norm.weight")),
    "lfm3": (1, ("g_proj.weight",), ("q_norm.weight", "k_norm.weight")),
}


@pytest.mark.parametrize("name", OWNED)
def test_gates_and_what_else_is_a_heads_own_are_in_its_mask(name: str) -> None:
    module = unusual.build(name)
    layer, own, shared = OWNED[name]
    atlas = Atlas.of(module)
    attn = atlas.towers["decoder"].blocks[layer].attn
    for head in (0, 3):
        found = rows_with_gradient(module, layer, head)
        masks = atlas.resolve(f"layers[{layer}].heads[{head}]").masks()
        for part in ("q_proj.weight", "k_proj.weight", "v_proj.weight", *own):
            mask = masks[f"{attn}.{part}"]
            assert mask is not None
            rows = mask.flatten(1).any(1) if mask.dim() > 1 else mask
            assert set(rows.nonzero().flatten().tolist()) == found.pop(f"{attn}.{part}"), part
        assert set(found) == {f"{attn}.{part}" for part in shared}
    assert not atlas.unclaimed(layer)
    assert {f"{attn}.{part}" for part in own} <= set(atlas.resolve(f"layers[{layer}].attn"))


@pytest.mark.parametrize(
    ("name", "layer", "left", "path"),
    [
        ("kimi_linear", 1, "b_proj.weight", "layers[1].heads[0]"),
        ("kimi_linear", 1, "conv1d.weight", "layers[1].groups[0]"),
        ("doge", 0, "dt_proj.weight", None),
        ("diffllama", 0, "lambda_q1", None),
    ],
)
def test_what_no_head_is_known_to_own_is_listed_and_masks_of_heads_are_refused(
    name: str, layer: int, left: str, path: str | None
) -> None:
    atlas = Atlas.of(unusual.build(name))
    attn = atlas.towers["decoder"].blocks[layer].attn
    assert f"{attn}.{left}" in atlas.unclaimed(layer)
    assert f"{attn}.{left}" in atlas.resolve(f"layers[{layer}].attn")
    if path is not None:
        with pytest.raises(RefusedPlace, match=r"which parameters are one head's is not known in layer 1") as error:
            atlas.resolve(path)
        assert f"write: layers[{layer}].attn" in str(error.value)
        assert len(atlas.resolve("layers[1].heads[0].q")) == 1


def test_verify_lists_what_no_head_owns() -> None:
    module = zoo.build("llama")
    assert all(check.ok for check in Atlas.of(module).verify())
    module.model.layers[1].self_attn.extra = nn.Linear(3, 3)
    (check,) = (check for check in Atlas.of(module).verify() if not check.ok)
    assert (check.layer, check.role) == (1, "claims")
    assert check.detail.endswith("model.layers.1.self_attn.extra.weight, model.layers.1.self_attn.extra.bias")
    with pytest.raises(RefusedPlace):
        ns.weights.select(module, "l1h0")


def test_a_single_number_and_a_norm_are_all_heads_alike() -> None:
    module = zoo.build("qwen3")
    module.model.layers[0].self_attn.temperature = nn.Parameter(torch.ones(1))
    assert Atlas.of(module).unclaimed(0) == ()


@pytest.mark.parametrize(("name", "why"), [("diffllama", "attention is differential"), ("doge", "values of all heads")])
def test_heads_that_share_what_they_read_are_refused_by_name(name: str, why: str) -> None:
    module = unusual.build(name)
    atlas = Atlas.of(module)
    for place in ("heads[0].output", "heads[0].q", "heads[1].pattern", "groups[0].v", "groups[1].k"):
        with pytest.raises(RefusedPlace, match=why):
            atlas.expand(f"layers[0].{place}")
    for path in ("layers[0].heads[0]", "layers[0].heads[0].q", "layers[0].groups[0]"):
        with pytest.raises(RefusedPlace, match=why):
            atlas.resolve(path)
    assert atlas.expand("layers[0].attn.q.output[-1]")


def test_a_slice_of_differential_attention_does_read_several_heads() -> None:
    """The negative control: what the refusal says, measured."""
    module = unusual.build("diffllama")
    attn = module.model.layers[0].self_attn
    seen: list[torch.Tensor] = []
    hook = attn.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    module(input_ids=torch.tensor([[3, 9, 4, 7]]))
    hook.remove()
    grads = torch.autograd.grad(seen[0][..., :16].square().sum(), [attn.q_proj.weight, attn.v_proj.weight])
    queries, values = ({int(row) // 16 for row in grad.any(1).nonzero()} for grad in grads)
    assert (queries, values) == ({0, 2}, {0, 1})
