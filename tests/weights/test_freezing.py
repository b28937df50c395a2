"""Training restricted to a selection: nothing else moves by one bit, whatever the optimizer does by itself."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import zoo
from nnsplice import weights as w
from weights.oracle import IDS, bits, dense, own_masks

OPTIMIZERS: dict[str, Any] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1),
    "AdamW, loop": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1, foreach=False),
    "AdamW, amsgrad": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1, amsgrad=True),
    "SGD, momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1, nesterov=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, weight_decay=0.1),
}


def train(model: Any, optimizer: Any, steps: int, *, to_none: bool = True) -> None:
    for step in range(steps):
        optimizer.zero_grad(set_to_none=to_none)
        ids = (IDS + step) % zoo.VOCAB
        model(
            ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}), labels=ids
        ).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def check(model: Any, before: dict[str, torch.Tensor], selection: Any) -> None:
    """The selection moved, and only the selection: every other bit is what it was."""
    parameters = dict(model.named_parameters())
    own = own_masks(model, 1, 2) if selection == "l1h2" else w.create_param_masks(model, selection)
    masks = dense(own, parameters)
    for name, mask in masks.items():
        moved = parameters[name].detach().view(torch.int32) != before[name].view(torch.int32)
        assert not (moved & ~mask).any(), f"{name} moved outside of the selection"
        if mask.any() and not name.endswith("k_proj.bias"):
            assert moved.any(), f"{name} did not move at all"


def snapshot(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


SELECTIONS: tuple[Any, ...] = ("layers[1].heads[2]", ["layers[0].mlp", "layers[2].neurons[3]"], "embed")


@pytest.mark.parametrize(
    ("optimizer", "selection", "to_none"),
    [*((name, SELECTIONS[0], False) for name in OPTIMIZERS), *(("AdamW", one, True) for one in SELECTIONS)],
)
def test_nothing_else_moves_in_ten_steps(optimizer, selection, to_none):
    model = zoo.build("gpt2").train(False)
    before = snapshot(model)
    with w.freeze_except(model, selection):
        train(model, OPTIMIZERS[optimizer](model.parameters()), 10, to_none=to_none)
    check(model, before, selection)


@pytest.mark.parametrize("name", ["llama", "falcon", "codegen", "qwen2", "phi3", "bart"])
def test_families(name):
    model = zoo.build(name)
    before = snapshot(model)
    with w.freeze_except(model, "layers[1].groups[0]") as parameters:
        train(model, OPTIMIZERS["AdamW"](parameters), 10)
    check(model, before, "layers[1].groups[0]")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_momentum_from_before_does_not_move_what_is_frozen(optimizer):
    """An optimizer that trained everything has momentum everywhere."""
    model = zoo.build("llama")
    trainer = OPTIMIZERS[optimizer](model.parameters())
    train(model, trainer, 3)
    before = snapshot(model)
    with w.freeze_except(model, "l1h2"):
        train(model, trainer, 10)
    check(model, before, "l1h2")
    train(model, trainer, 1)  # and afterwards everything moves again
    moved = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert len(moved) == len(before)


def test_gradients_outside_are_zero_and_do_not_count_for_clipping():
    model = zoo.build("llama")
    parameters = dict(model.named_parameters())
    with w.freeze_except(model, "l1h2"):
        model(IDS, labels=IDS).loss.backward()
        masks = dense(own_masks(model, 1, 2), parameters)
        for name, mask in masks.items():
            grad = parameters[name].grad
            assert (grad is None) == (not mask.any()) and (grad is None or not grad[~mask].any())
            assert grad is None or grad[mask].any()


@pytest.mark.filterwarnings("ignore:.* is tied in this model")
def test_tied_weights_train_once():
    model = zoo.build("gpt2")
    before = snapshot(model)
    with w.freeze_except(model, "unembed") as parameters:
        assert [id(p) for p in parameters] == [id(model.transformer.wte.weight)]
        train(model, OPTIMIZERS["AdamW"](model.parameters()), 10)
    assert model.lm_head.weight is model.transformer.wte.weight
    check(model, before, "embed")


def test_masks_by_both_names_of_a_tied_tensor_are_one():
    model = zoo.build("gpt2")
    before = snapshot(model)
    rows = torch.zeros(2, *model.lm_head.weight.shape, dtype=torch.bool)
    rows[0, 3] = rows[1, 5] = True
    with w.freeze_except(model, {"transformer.wte.weight": rows[0], "lm_head.weight": rows[1]}) as parameters:
        train(model, torch.optim.SGD(parameters, lr=0.1), 2)
    moved = model.lm_head.weight != before["transformer.wte.weight"]
    assert moved.any(1).nonzero().flatten().tolist() == [3, 5]


def test_after_an_exception_everything_is_as_it_was():
    model = zoo.build("gpt2")
    model.transformer.h[2].requires_grad_(False)
    model(IDS, labels=IDS).loss.backward()
    flags = [p.requires_grad for p in model.parameters()]
    frozen = model.transformer.h[0].mlp.c_fc.weight
    grad = frozen.grad
    before = snapshot(model)
    with pytest.raises(KeyError, match="mine"), w.freeze_except(model, "l1h2"):
        assert not frozen.requires_grad and frozen.grad is None
        train(model, OPTIMIZERS["AdamW"](model.parameters()), 2)
        with torch.no_grad():
            model.transformer.h[1].attn.c_attn.weight.add_(1.0)  # not by an optimizer
        raise KeyError("mine")
    assert [p.requires_grad for p in model.parameters()] == flags and frozen.grad is grad
    check(model, before, "l1h2")
    assert not any(p._backward_hooks or p._post_accumulate_grad_hooks for p in model.parameters())


def test_a_step_that_fails_half_way_leaves_nothing_behind():
    class Broken(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            raise RuntimeError("mine")

    model = zoo.build("gpt2")
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="mine"), w.freeze_except(model, "l1h2"):
        train(model, Broken(model.parameters(), lr=0.1, weight_decay=0.5), 1)
    check(model, before, "l1h2")


def test_other_models_train_freely_meanwhile():
    model, other = zoo.build("gpt2"), zoo.build("gpt2", seed=3)
    before = snapshot(other)
    with w.freeze_except(model, "l1h2"):
        train(other, OPTIMIZERS["AdamW"](other.parameters()), 1)
    assert all(not torch.equal(p, before[name]) for name, p in other.named_parameters())


def test_masks_and_selections_are_taken():
    base = zoo.build("llama")
    results = []
    masks = w.create_param_masks(base, "l1g1")
    dense_masks = {name: None if mask is None else mask.clone() for name, mask in masks.items()}
    for what in ("l1g1", ["l1h2", "l1h3"], w.select(base, "l1g1"), masks, dense_masks):
        model = copy.deepcopy(base)
        with w.freeze_except(model, what):
            train(model, OPTIMIZERS["AdamW"](model.parameters()), 3)
        results.append(bits(model))
    assert all(result == results[0] for result in results) and results[0] != bits(base)


def test_nothing_to_train_is_an_error():
    model = zoo.build("gpt2").requires_grad_(False)
    with pytest.raises(ValueError, match="nothing would be trained"), w.freeze_except(model, "l0"):
        pass


def test_without_the_block_weight_decay_moves_everything():
    """The negative control: masking gradients alone would fail the tests above."""
    model = zoo.build("gpt2")
    before = snapshot(model)
    optimizer = OPTIMIZERS["AdamW"](model.parameters())
    masks = dense(w.create_param_masks(model, "l1h2"), dict(model.named_parameters()))
    model(IDS, labels=IDS).loss.backward()
    for name, parameter in model.named_parameters():
        parameter.grad *= masks[name]
    optimizer.step()
    with pytest.raises(AssertionError, match="moved outside"):
        check(model, before, "l1h2")
