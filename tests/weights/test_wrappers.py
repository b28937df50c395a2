"""Models in wrappers, bare backbones, experts in both spellings, and trees of TransformerLens' shape."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import zoo
from nnsplice import weights as w
from nnsplice.atlas import Atlas
from weights import long_table
from weights.hooked import HEADS, HookedTransformer
from weights.oracle import dense, same, support

# -- wrappers ----------------------------------------------------------------------------------------------------------


class Distributed(nn.Module):
    """What DistributedDataParallel looks like from outside (the real one needs a process group)."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def compiled(model: Any) -> Any:
    return torch.compile(model, backend="eager")


def in_parts(model: Any) -> Any:
    """Each layer compiled by itself."""
    for i, layer in enumerate(model.model.layers):
        model.model.layers[i] = compiled(layer)
    return model


WRAPPERS = {
    "nothing": lambda model: model,
    "compile": compiled,
    "compiled layers": in_parts,
    "ddp": Distributed,
    "ddp of compile": lambda model: Distributed(compiled(model)),
    "compile of ddp": lambda model: compiled(Distributed(model)),
    "data parallel": nn.DataParallel,
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("restriction", ["l1h2", "l2g1", "l0 mlp", "embed", "full", ["l1h2", "l1h3", "unembed"]])
def test_names_are_those_of_the_wrapped_model(wrapper, restriction):
    plain = w.create_param_masks(zoo.build("llama"), restriction)
    model = WRAPPERS[wrapper](zoo.build("llama"))
    masks = w.create_param_masks(model, restriction)
    parameters = dict(model.named_parameters())
    assert masks.keys() <= parameters.keys()
    bare = {name.replace("_orig_mod.", "").replace("module.", ""): mask for name, mask in masks.items()}
    assert same(bare, plain)
    assert all(mask is None or mask.shape == parameters[name].shape for name, mask in masks.items())


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_exact_names_inside_and_outside_of_a_wrapper(wrapper):
    model = WRAPPERS[wrapper](zoo.build("llama"))
    for name, parameter in model.named_parameters():
        assert w.create_param_masks(model, f" {name} ") == {name: None}
        assert w.select(model, name).numel() == parameter.numel()


def test_nnsight_models_are_their_modules():
    wrapped = zoo.wrap("gpt2")
    masks = w.create_param_masks(wrapped, "l1h2")
    assert list(masks) == list(w.create_param_masks(wrapped._module, "l1h2"))
    assert masks.keys() <= dict(wrapped._module.named_parameters()).keys()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks transformers for it
def test_peft_models_have_their_adapters_in_the_masks():
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(zoo.build("llama"), LoraConfig(r=2, target_modules=["q_proj", "o_proj", "up_proj"]))
    masks = w.create_param_masks(adapted, "l1h3")
    parameters = dict(adapted.named_parameters())
    assert masks.keys() <= parameters.keys()
    front = "base_model.model.model.layers.1.self_attn."
    rows = {"q_proj.base_layer.weight": 18, "q_proj.lora_B.default.weight": 18, "k_proj.weight": 6, "v_proj.weight": 6}
    for name, start in rows.items():
        assert dict(w.select(adapted, "l1h3").parts)[(front + name).removeprefix("base_model.model.")] == (
            0,
            ((start, start + 6),),
        )
        mask = masks[front + name]
        assert mask is not None and mask.any(1).nonzero().flatten().tolist() == list(range(start, start + 6))
    assert w.create_param_masks(adapted, "full").keys() == parameters.keys()
    mlp = w.create_param_masks(adapted, "l1 mlp")
    assert f"{front.replace('self_attn', 'mlp')}up_proj.lora_A.default.weight" in mlp


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks transformers for it
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_an_expert_has_its_share_of_factors_that_hold_all_experts(name):
    from peft import LoraConfig, get_peft_model

    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    adapted = get_peft_model(
        zoo.build(name), LoraConfig(r=2, target_modules=["q_proj"], target_parameters=targets, init_lora_weights=False)
    )
    changed = copy.deepcopy(adapted)
    masks = dense(w.create_param_masks(adapted, "layers[1].experts[2]"), dict(adapted.named_parameters()))
    assert sum(bool(mask.any()) for key, mask in masks.items() if "lora_" in key) == 4
    with torch.no_grad():
        for key, parameter in changed.named_parameters():
            parameter[masks[key]] += 1.0
    before, after = (dict(one.merge_and_unload().named_parameters()) for one in (adapted, changed))
    for key, parameter in before.items():
        moved = [i for i, (a, b) in enumerate(zip(parameter, after[key], strict=True)) if not torch.equal(a, b)]
        assert moved == ([2] if "layers.1.mlp.experts" in key else [])


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks transformers for it
def test_full_has_what_a_wrapper_adds_of_its_own():
    from peft import PromptTuningConfig, TaskType, get_peft_model

    adapted = get_peft_model(zoo.build("llama"), PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=2))
    masks = w.create_param_masks(adapted, "full")
    assert list(masks) == [name for name, _ in adapted.named_parameters()]
    assert any("prompt_encoder" in name for name in masks)


@pytest.mark.parametrize("name", ["gpt2", "llama", "falcon", "gpt_neox", "opt", "bert", "bloom"])
def test_bare_backbones(name):
    whole = zoo.build(name)
    prefix = whole.base_model_prefix
    bare = getattr(whole, prefix)
    for restriction in ("l1h2", "l1g0", "l2 attn", "l0 mlp", "l1", "embed"):
        inside = w.create_param_masks(bare, restriction)
        outside = w.create_param_masks(whole, restriction)
        assert same({f"{prefix}.{name}": mask for name, mask in inside.items()}, outside)
    if prefix != "bert":
        with pytest.raises(ValueError, match="no unembed"):
            w.create_param_masks(bare, "unembed")


# -- experts -----------------------------------------------------------------------------------------------------------


class Expert(nn.Module):
    def __init__(self, names: tuple[str, str, str], width: int, inner: int) -> None:
        super().__init__()
        for name, shape in zip(names, ((width, inner), (width, inner), (inner, width)), strict=True):
            setattr(self, name, nn.Linear(*shape, bias=False))


SPELLINGS: dict[str, tuple[str, str, str]] = {
    "mixtral": ("w1", "w3", "w2"),
    "qwen2_moe": ("gate_proj", "up_proj", "down_proj"),
    "qwen3_moe": ("gate_proj", "up_proj", "down_proj"),
}


@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.parametrize("split", [False, True], ids=["fused", "a module each"])
def test_one_expert_and_the_router(name, split):
    model = long_table.build(name)
    front = "model.layers.0.mlp."
    if split:
        for layer in model.model.layers:
            inner = layer.mlp.experts.down_proj.shape[2]
            layer.mlp.experts = nn.ModuleList(Expert(SPELLINGS[name], 16, inner) for _ in range(4))
    expert = w.create_param_masks(model, "layers[0].experts[2]")
    if split:
        assert expert == {f"{front}experts.2.{part}.weight": None for part in SPELLINGS[name]}
    else:
        assert list(expert) == [f"{front}experts.gate_up_proj", f"{front}experts.down_proj"]
        assert all(mask is not None and mask[2].all() and not mask[[0, 1, 3]].any() for mask in expert.values())
    assert w.create_param_masks(model, "layers[0].mlp.router") == {f"{front}gate.weight": None}
    whole = w.create_param_masks(model, "l0 mlp")
    assert set(whole.values()) == {None}
    assert whole.keys() == {n for n, _ in model.named_parameters() if n.startswith(front)}
    rest = w.select(model, "l0 mlp") - w.select(model, ["layers[0].experts[:]", "layers[0].mlp.router"])
    assert all(".shared_expert" in name for name in rest) and bool(len(rest)) == (name == "qwen2_moe")


# -- TransformerLens ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [HEADS, 2])
def test_hooked_transformer_heads_are_what_the_gradients_say(groups):
    model: Any = HookedTransformer(groups).double()
    seen: list[torch.Tensor] = []
    model.blocks[11].attn.hook_z.register_forward_hook(lambda _, args, out: seen.append(out))
    model(torch.tensor([[3, 10, 17, 21]]))
    inside = {name: p for name, p in model.named_parameters() if name.startswith("blocks.11.attn.")}
    for head in range(HEADS):
        masks = dense(w.create_param_masks(model, f"l11h{head}"), inside)
        needed = support(seen[0][:, :, head], inside)
        for name, mask in masks.items():
            if name.endswith("W_O"):
                assert mask[head].all() and int(mask.sum()) == mask[head].numel()
            elif name.endswith("b_K"):
                assert not (needed[name] & ~mask).any()  # the softmax ignores what all keys have in common
            else:
                assert torch.equal(needed[name], mask), name


def test_hooked_transformer_under_grouped_queries():
    masks = w.create_param_masks(HookedTransformer(groups=2), "l1h3")
    names = ["W_Q", "W_O", "_W_K", "_b_K", "_W_V", "_b_V", "b_Q"]
    found = {name.removeprefix("blocks.1.attn."): mask for name, mask in masks.items() if mask is not None}
    rows = {name: mask.flatten(1).any(1).nonzero().flatten().tolist() for name, mask in found.items()}
    assert rows == {name: [1] if name.startswith("_") else [3] for name in names}


def test_hooked_transformer_parts():
    model = HookedTransformer()
    assert list(w.create_param_masks(model, "embed")) == ["embed.W_E"]
    assert list(w.create_param_masks(model, "unembed")) == ["unembed.W_U", "unembed.b_U"]
    attn, mlp = w.create_param_masks(model, "l2 attn"), w.create_param_masks(model, "l2 mlp")
    assert set(attn.values()) == {None} == set(mlp.values())
    assert {name.rpartition(".")[2] for name in attn} == {"W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O"}
    assert {name.rpartition(".")[2] for name in mlp} == {"W_in", "W_out", "b_in", "b_out"}
    layer = w.create_param_masks(model, "l2")
    assert {name.rpartition(".")[0] for name in layer.keys() - attn.keys() - mlp.keys()} == {
        "blocks.2.ln1",
        "blocks.2.ln2",
    }
    neuron = w.select(model, "layers[2].neurons[4]").parts
    assert neuron["blocks.2.mlp.W_in"] == (1, ((4, 5),)) and neuron["blocks.2.mlp.W_out"] == (0, ((4, 5),))
    assert list(w.create_param_masks(model, "layers[2].mlp.up")) == ["blocks.2.mlp.W_in", "blocks.2.mlp.b_in"]
    assert w.select(model, "layers[2].heads[:]") | w.select(model, "blocks.2.attn.b_O") == w.select(model, "l2 attn")
    numbers = [int(name.split(".")[1]) for name in w.create_param_masks(model, ["l11", "l10", "l2"])]
    assert numbers == sorted(numbers) and set(numbers) == {2, 10, 11}


def test_hooked_transformer_of_attention_alone():
    model = HookedTransformer(mlp=False)
    assert len(w.create_param_masks(model, "l1h0")) == 7
    with pytest.raises(ValueError, match="no parameters"):
        w.create_param_masks(model, "l1 mlp")


def test_hooked_transformer_activations_are_refused_and_not_misread():
    atlas = Atlas.of(HookedTransformer())
    assert str(atlas.expand("layers[1].attn.output")[0]) == "layers[1].attn.output"
    for text in ("layers[1].heads[0].output", "layers[1].attn.q.output", "layers[1].neurons[0].output"):
        with pytest.raises(ValueError, match=r"parameters of blocks\.1\.\w+ itself"):
            atlas.expand(text)
