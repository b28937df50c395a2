"""Other weights for the length of a block: right inside, and every bit back afterwards, whatever happens."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import nn

import zoo
from nnsplice import weights as w
from nnsplice.atlas import Atlas
from nnsplice.errors import NnspliceError
from weights.oracle import IDS, bits, dense, own_masks

#: Fused and separate layouts, shared key/value heads, experts, two towers, transposed weights.
NAMES = ("gpt2", "llama", "qwen3_moe", "falcon", "bart")
PLACES = ("layers[1].heads[2]", "layers[0].mlp", ["layers[1].groups[0]", "embed"], "full", "layers[2].neurons[1:3]")


def pair(name: str, **overrides: Any) -> tuple[Any, Any]:
    return zoo.build(name, seed=1, **overrides), zoo.build(name, seed=2, **overrides)


def places(name: str) -> tuple[Any, ...]:
    return PLACES if name != "qwen3_moe" else (*PLACES[:-1], "layers[1].experts[2]")


# -- inside ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_inside_a_swap_the_selection_is_the_others_and_the_rest_is_not(name):
    base, other = pair(name)
    own, new = dict(base.named_parameters()), dict(other.named_parameters())
    for place in places(name):
        before, kept = copy.deepcopy(dict(own)), bits(base)
        masks = own_masks(base, 1, 2) if place == "layers[1].heads[2]" else w.create_param_masks(base, place)
        masks = dense(masks, own)
        with w.swap(base, other, place):
            for key, mask in masks.items():
                assert torch.equal(own[key], torch.where(mask, new[key], before[key])), (place, key)
        assert bits(base) == kept


def test_a_swap_of_everything_is_the_other_model():
    base, other = pair("llama")
    with torch.no_grad(), w.swap(base, other, "full"):
        assert torch.equal(base(IDS).logits, other(IDS).logits)
    assert not torch.equal(base(IDS).logits, other(IDS).logits)


def test_interpolation_is_a_straight_line_with_exact_ends():
    base, other = pair("llama")
    base, other = base.double(), other.double()
    name = "model.layers.0.mlp.up_proj.weight"
    weight, target = base.model.layers[0].mlp.up_proj.weight, other.model.layers[0].mlp.up_proj.weight
    before = weight.detach().clone()
    for t in (0.0, 0.3, 0.5, 0.9, 1.0, -0.5, 2.0):
        with w.interpolate(base, other, name, t):
            assert torch.allclose(weight, before + t * (target - before), rtol=0, atol=1e-15 * 8)
            assert t != 0 or torch.equal(weight, before)
            assert t != 1 or torch.equal(weight, target)
        assert torch.equal(weight, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_interpolation_of_half_precision_is_summed_in_single(dtype):
    base, other = (model.to(dtype) for model in pair("gpt2"))
    weight, target = base.transformer.wte.weight, other.transformer.wte.weight
    expected = torch.lerp(weight.float(), target.float(), 0.25).to(dtype)
    with w.interpolate(base, other, "embed", 0.25):
        assert torch.equal(weight, expected)


@pytest.mark.parametrize("name", ["gpt2", "opt", "falcon_mha", "codegen"])
def test_zero_ablation_of_a_head_is_a_run_without_its_slice(name):
    model = zoo.build(name).double()
    block = Atlas.of(model).towers["decoder"].blocks[1]
    assert block.o is not None and block.layout is not None
    start, stop = 2 * block.head_dim, 3 * block.head_dim

    def without(_, args):
        value = args[0].clone()
        value[..., start:stop] = 0
        return (value,)

    with torch.no_grad():
        handle = model.get_submodule(block.o).register_forward_pre_hook(without)
        expected = model(IDS).logits
        handle.remove()
        with w.ablate(model, "l1h2"):
            found = model(IDS).logits
        assert (found - expected).abs().max() < 1e-12
        assert (found - model(IDS).logits).abs().max() > 1e-3


def test_mean_ablation_is_the_mean_of_what_is_selected():
    model = zoo.build("llama").double()
    weight = model.model.layers[1].self_attn.q_proj.weight
    rows = weight.detach()[12:18].clone()
    with w.ablate(model, "layers[1].heads[2].q", operation="mean"):
        assert torch.allclose(weight[12:18], rows.mean().expand_as(rows), rtol=0, atol=1e-15)
        assert len(weight[12:18].unique()) == 1
    assert torch.equal(weight[12:18], rows)


# -- afterwards --------------------------------------------------------------------------------------------------------

CONTEXTS = {
    "swap": lambda base, other, place: w.swap(base, other, place),
    "interpolate": lambda base, other, place: w.interpolate(base, other, place, 0.3),
    "zero": lambda base, other, place: w.ablate(base, place),
    "mean": lambda base, other, place: w.ablate(base, place, operation="mean"),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", CONTEXTS)
def test_every_bit_comes_back(name, kind):
    base, other = pair(name)
    with torch.no_grad():  # bits that arithmetic would lose
        first = next(base.parameters()).flatten()
        first[:3] = torch.tensor([-0.0, float("nan"), float("inf")])
    kept, theirs = bits(base), bits(other)
    for place in places(name):
        with CONTEXTS[kind](base, other, place):
            assert bits(base) != kept
        assert bits(base) == kept
        with pytest.raises(KeyError, match="mine"), CONTEXTS[kind](base, other, place):
            raise KeyError("mine")
        assert bits(base) == kept
    assert bits(other) == theirs


def test_every_bit_comes_back_after_training_inside():
    base, other = pair("llama")
    kept = bits(base)
    with w.swap(base, other, "full"):
        optimizer = torch.optim.SGD(base.parameters(), lr=0.1)
        base(IDS, labels=IDS).loss.backward()
        optimizer.step()
    assert bits(base) == kept


def test_nested_blocks_come_off_in_turn():
    base, other = pair("llama")
    kept = bits(base)
    with w.swap(base, other, "l1"):
        inner = bits(base)
        with w.ablate(base, "l1h0"), w.interpolate(base, other, "l1 mlp", 0.5):
            assert bits(base) != inner
        assert bits(base) == inner
    assert bits(base) == kept


def test_a_tied_tensor_is_written_once_and_restored():
    base, other = pair("gpt2")
    assert base.lm_head.weight is base.transformer.wte.weight
    kept = bits(base)
    with w.swap(base, other, "embed"):
        assert torch.equal(base.lm_head.weight, other.lm_head.weight)
    assert bits(base) == kept and base.lm_head.weight is base.transformer.wte.weight
    with pytest.warns(UserWarning, match="tied"), w.ablate(base, "unembed"):
        assert not base.transformer.wte.weight.any()
    assert bits(base) == kept


def test_layers_of_one_model_change_places():
    # The mapping's tensors are the model's own, so what is written first would be read by what comes after.
    base = zoo.build("llama")
    kept, own = bits(base), dict(base.named_parameters())
    first, second = (base.model.layers[i].mlp.up_proj.weight.detach().clone() for i in (0, 1))
    exchanged = {name: own[name.translate({ord("0"): "1", ord("1"): "0"})] for name in own if ".2." not in name}
    with w.swap(base, exchanged, ["layers[0]", "layers[1]"]):
        assert torch.equal(base.model.layers[0].mlp.up_proj.weight, second)
        assert torch.equal(base.model.layers[1].mlp.up_proj.weight, first)
    assert bits(base) == kept


def test_flags_and_gradients_are_left_alone():
    base, other = pair("gpt2")
    base.transformer.h[0].requires_grad_(False)
    base(IDS, labels=IDS).loss.backward()
    before = [(p.requires_grad, None if p.grad is None else p.grad.clone()) for p in base.parameters()]
    identity = [id(p) for p in base.parameters()]
    with w.swap(base, other, "full"), torch.inference_mode():
        base(IDS)
    assert identity == [id(p) for p in base.parameters()]
    for parameter, (flag, grad) in zip(base.parameters(), before, strict=True):
        assert parameter.requires_grad == flag and (grad is None or torch.equal(parameter.grad, grad))


# -- what is taken -----------------------------------------------------------------------------------------------------


def test_wrapped_models_state_dicts_selections_and_masks_are_taken():
    base, other = pair("llama")
    kept = bits(base)
    selection = w.select(base, "l1g1")
    masks = w.create_param_masks(base, "l1g1")
    dense_masks = {name: None if mask is None else mask.clone() for name, mask in masks.items()}
    compiled: Any = torch.compile(base, backend="eager")
    outer = w.create_param_masks(compiled, "l1g1")
    expected: dict[str, bytes] = {}
    for model, given, what in (
        (base, other, "l1g1"),
        (base, other.state_dict(), "l1g1"),
        (base, nn.DataParallel(other), selection),
        (base, other, masks),
        (base, other, dense_masks),
        (compiled, other, outer),
        (compiled, other, "l1g1"),
    ):
        with w.swap(model, given, what):
            expected = expected or bits(base)
            assert bits(base) == expected != kept
        assert bits(base) == kept


def test_any_mask_will_do():
    base, other = pair("gpt2")
    name = "transformer.h.0.mlp.c_fc.weight"
    weight, target = base.transformer.h[0].mlp.c_fc.weight, other.transformer.h[0].mlp.c_fc.weight
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.3
    before, kept = weight.detach().clone(), bits(base)
    with w.swap(base, other, {name: mask}):
        assert torch.equal(weight, torch.where(mask, target, before))
    assert bits(base) == kept


def test_other_dtypes_are_cast():
    base, other = pair("gpt2")
    other = other.to(torch.bfloat16)
    with w.swap(base, other, "l0"):
        assert torch.equal(base.transformer.h[0].ln_1.weight, other.transformer.h[0].ln_1.weight.float())


def _mismatched() -> Any:
    return zoo.build("llama", hidden_size=32)


def _enter(manager: AbstractContextManager) -> None:
    with manager:
        pass


MISTAKES: Mapping[str, tuple[Any, str]] = {
    "the same model": (lambda b, o: w.swap(b, b, "l0"), "same model"),
    "the same model, wrapped": (lambda b, o: w.swap(b, nn.DataParallel(b), "l0"), "same model"),
    "another family": (lambda b, o: w.swap(b, zoo.build("gpt2"), "l0"), "has no model.layers"),
    "another shape": (lambda b, o: w.swap(b, _mismatched(), "l0"), r"has shape \[24, 32\] in the other"),
    "meta": (lambda b, o: w.swap(b, copy.deepcopy(o).to("meta"), "l0"), "meta"),
    "base on meta": (lambda b, o: w.swap(copy.deepcopy(b).to("meta"), o, "l0"), "meta"),
    "no site": (lambda b, o: w.swap(b, o, w.select(b, "l0") - w.select(b, "l0")), "no parameter"),
    "no mask": (lambda b, o: w.swap(b, o, {}), "no parameter"),
    "an unknown name": (lambda b, o: w.swap(b, o, {"nothing.weight": None}), "no parameter nothing"),
    "an empty mask": (
        lambda b, o: w.swap(b, o, {"model.norm.weight": torch.zeros(16, dtype=torch.bool)}), "selects nothing"),
    "a mask of numbers": (lambda b, o: w.swap(b, o, {"model.norm.weight": torch.ones(16)}), "bool"),
    "a mask of another shape": (
        lambda b, o: w.swap(b, o, {"model.norm.weight": torch.ones(3, dtype=torch.bool)}), r"\[3\]"),
    "a layer too many": (lambda b, o: w.ablate(b, "l7"), "out of range"),
    "an unknown ablation": (lambda b, o: w.ablate(b, "l0", operation="median"), "operation='median'"),
    "no number": (lambda b, o: w.interpolate(b, o, "l0", float("nan")), "t=nan"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_answered_and_change_nothing(mistake):
    base, other = pair("llama")
    kept = bits(base)
    make, message = MISTAKES[mistake]
    with pytest.raises((NnspliceError), match=message):
        _enter(make(base, other))
    assert bits(base) == kept


def test_models_that_tie_differently_do_not_mix():
    base, other = zoo.build("gpt2", seed=1), zoo.build("gpt2", seed=2, tie_word_embeddings=False)
    with pytest.raises(ValueError, match="tied"):
        _enter(w.swap(base, other, "embed"))
    with w.swap(other, base, "embed"):  # loose takes from tied: only the embedding changes
        assert torch.equal(other.transformer.wte.weight, base.transformer.wte.weight)
        assert not torch.equal(other.lm_head.weight, base.lm_head.weight)


def test_signatures_are_those_of_the_contract():
    assert list(inspect.signature(w.swap).parameters) == ["base", "other", "selection"]
    assert list(inspect.signature(w.interpolate).parameters) == ["base", "other", "selection", "t"]
    assert list(inspect.signature(w.ablate).parameters) == ["model", "selection", "operation"]
    assert list(inspect.signature(w.freeze_except).parameters) == ["model", "selection"]
