"""Heads that share keys and values (grouped queries): what acts on the weights of one head leaves the others alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

import nnsplice as ns
import zoo
from nnsplice import weights as w
from nnsplice.atlas import Atlas
from nnsplice.atlas.layouts import Layout
from weights.oracle import IDS, bits, own_masks, same

#: Separate and fused projections, one key/value head for all, norms of heads, experts; sinks where heads have them.
GROUPED = ("llama", "qwen2", "qwen3", "gemma2", "phi3", "falcon", "falcon_mqa", "gpt_bigcode", "mixtral", "gpt_oss")
GROUPED = tuple(name for name in GROUPED if name in zoo.FAMILIES)
PLAIN = ("gpt2", "falcon_mha")


def layout(model: Any) -> Layout:
    found = Atlas.of(model).towers["decoder"].blocks[1].layout
    assert found is not None
    return found


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def without(model: Any, layer: int, heads: Sequence[int]) -> torch.Tensor:
    """A run in which a torch hook makes the slices of some heads zero in front of the output projection."""
    block = Atlas.of(model).towers["decoder"].blocks[layer]
    assert block.o is not None

    def zero(_: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        value = args[0].clone()
        for head in heads:
            value[..., head * block.head_dim : (head + 1) * block.head_dim] = 0
        return (value, *args[1:])

    handle = model.get_submodule(block.o).register_forward_pre_hook(zero)
    try:
        return logits(model)
    finally:
        handle.remove()


@pytest.mark.parametrize("name", [*GROUPED, *PLAIN])
def test_taking_out_a_head_is_a_run_without_its_slice(name):
    model = zoo.build(name).double()
    kept = bits(model)
    for head in range(4):
        with w.ablate(model, f"l1h{head}"):
            found = logits(model)
        assert (found - without(model, 1, [head])).abs().max() < 1e-12
        assert (found - logits(model)).abs().max() > 1e-4
    assert bits(model) == kept


@pytest.mark.parametrize("name", GROUPED)
def test_a_whole_group_has_its_keys_and_values_however_it_is_said(name):
    model = zoo.build(name).double()
    heads = list(layout(model).heads_of(0))
    group = w.select(model, "l1g0")
    lists = ([f"l1h{head}" for head in heads], f"layers[1].heads[{heads[0]}:{heads[-1] + 1}]")
    for what in lists:
        assert w.select(model, what, own=True) == group
    with w.ablate(model, lists[0]):
        assert (logits(model) - without(model, 1, heads)).abs().max() < 1e-12
    with w.ablate(model, "l1g0"):
        assert (logits(model) - without(model, 1, heads)).abs().max() < 1e-12


@pytest.mark.parametrize("name", GROUPED)
def test_own_and_shared_make_the_mask(name):
    """The contract of masks is what it was: a head's mask has the keys and values that it reads."""
    model = zoo.build(name)
    for head in range(4):
        own, whole = w.select(model, f"l1h{head}", own=True), w.select(model, f"l1h{head}")
        group = layout(model).group_of(head)
        left = w.select(model, [f"layers[1].groups[{group}].k", f"layers[1].groups[{group}].v"])
        assert own | left == whole and not len(own & left)
        expected = own_masks(model, 1, head)
        assert same(own.masks(), expected)
    assert w.select(model, "layers[:].heads[:]", own=True) == w.select(model, "layers[:].heads[:]")


def test_shared_weights_that_are_asked_for_by_themselves_are_taken():
    model = zoo.build("llama")
    key = "model.layers.1.self_attn.k_proj.weight"
    for more in ("layers[1].attn.k", "l1 attn", key):
        assert w.select(model, ["l1h2", more], own=True).parts[key] is None  # all of it
    assert w.select(model, ["l1h2", "l1g1"], own=True) == w.select(model, "l1g1")
    names = w.select(model, ["l1h2", "l2h0", "l1h2"], own=True).names
    assert not any("k_proj" in name or "v_proj" in name for name in names) and len(names) == 4
    assert w.select(model, ns.parse_path("l1h2"), own=True) == w.select(model, "decoder.layers[1].heads[2]", own=True)


@pytest.mark.parametrize("value", ["k", "v"])
def test_what_is_no_heads_own_is_refused_with_the_group(value):
    model = zoo.build("llama")
    with pytest.raises(ns.errors.BadArgument, match=rf"write: layers\[1\]\.groups\[1\]\.{value}"):
        with w.ablate(model, f"layers[1].heads[2].{value}"):
            pass
    with w.ablate(model, f"layers[1].heads[2:4].{value}"):
        assert not getattr(model.model.layers[1].self_attn, f"{value}_proj").weight[6:12].any()
    with w.ablate(zoo.build("gpt2"), f"layers[1].heads[2].{value}"):  # where a head has its own
        pass


@pytest.mark.parametrize(
    "change",
    [
        lambda base, other, what: w.swap(base, other, what),
        lambda base, other, what: w.interpolate(base, other, what, 0.5),
        lambda base, other, what: w.ablate(base, what),
        lambda base, other, what: w.ablate(base, what, operation="mean"),
    ],
)
def test_shared_keys_and_values_stay_to_the_bit(change: Callable[..., Any]):
    base, other = zoo.build("llama", seed=1), zoo.build("llama", seed=2)
    kept = bits(base)
    with change(base, other, "l1h2"):
        changed = {name for name, value in bits(base).items() if value != kept[name]}
    assert changed == {f"model.layers.1.self_attn.{part}_proj.weight" for part in "qo"}


def test_training_a_head_leaves_shared_keys_and_values():
    model = zoo.build("llama")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with w.freeze_except(model, "l1h2") as parameters:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            model(IDS, labels=IDS).loss.backward()
            assert model.model.layers[1].self_attn.k_proj.weight.grad is None
            optimizer.step()
    assert len(parameters) == 2
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {f"model.layers.1.self_attn.{part}_proj.weight" for part in "qo"}
    rows = (model.model.layers[1].self_attn.q_proj.weight != before["model.layers.1.self_attn.q_proj.weight"]).any(1)
    assert rows.nonzero().flatten().tolist() == list(range(12, 18))


def test_masks_and_selections_that_move_other_heads_are_said_so():
    model = zoo.build("llama")
    masks = w.create_param_masks(model, "l1h2")
    dense = {name: mask.clone() for name, mask in masks.items() if mask is not None}
    said = r"layers\[1\]\.groups\[1\] has keys and values that heads 2 and 3 read together"
    for what in (masks, dense, w.select(model, "l1h2")):
        with pytest.warns(UserWarning, match=said) as seen, w.ablate(model, what):
            assert not model.model.layers[1].self_attn.k_proj.weight[6:12].any()  # taken to the number
        assert [one.filename for one in seen] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for silent in ("l1g1", "l1 attn", "layers[1].groups[1].k", ["l1h0", "l1h1", "l2 mlp"], "full"):
            with w.ablate(model, w.create_param_masks(model, silent)), w.ablate(model, silent):
                pass
        with w.ablate(model, w.select(model, "l1h2", own=True)):
            pass


def test_the_preview_says_what_other_heads_read(capsys):
    model = zoo.build("llama")
    w.preview_weight_restriction(model, w.create_param_masks(model, "l1h2"))
    note = capsys.readouterr().out.splitlines()[-1]
    assert note.startswith("note: layers[1].groups[1]") and "with head 2 only" in note
    for quiet in ("l1g1", "full", "l1 mlp"):
        w.preview_weight_restriction(model, w.create_param_masks(model, quiet))
        assert "note" not in capsys.readouterr().out
    w.preview_weight_restriction(model, w.create_param_masks(model, "l1h2"), plain=True)
    assert "note" not in capsys.readouterr().out


def test_a_selection_cannot_be_asked_for_what_is_its_own():
    model = zoo.build("llama")
    with pytest.raises(ns.errors.BadArgument, match="own=True is for addresses"):
        w.select(model, w.select(model, "l1h2"), own=True)
