"""Attention patterns, single experts and the stream between attention and MLP: values without a tensor of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AttentionInterface

import nnsplice as ns
from activations.oracle import run, values
from families import build as families
from nnsplice.activations.access import site_of
from nnsplice.errors import RefusedPlace
from sweeps import test_towers as towers
from zoo import FAMILIES, SEQ2SEQ, build, inputs, wrap

SPARSE = ("mixtral", "qwen3_moe")
#: transformers rounds probabilities to float32 on the way, in float64 models too.
ROUNDED = 1e-5


def _double(family: str, **config: Any):
    """The model in float64, wrapped and bare."""
    model, module = wrap(family, **config), build(family, **config).double()
    model._module.double()
    return model, module


def _repeat(states: torch.Tensor, heads: int) -> torch.Tensor:
    return states.repeat_interleave(heads // states.shape[1], dim=1)


class _Edited:
    """Eager attention written out, with the probabilities of one layer's head put in at one query."""

    def __init__(self, layer: int, head: int, query: int, pattern: torch.Tensor) -> None:
        self.layer, self.head, self.query, self.pattern = layer, head, query, pattern
        self.seen: dict[int, torch.Tensor] = {}

    def __call__(self, module: nn.Module, query, key, value, attention_mask, scaling=None, **_: object):
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        key, value = _repeat(key, query.shape[1]), _repeat(value, query.shape[1])
        scores = query @ key.transpose(-1, -2) * scaling
        if attention_mask is not None:
            scores = scores + attention_mask
        weights = scores.softmax(-1)
        layer: Any = module.layer_idx
        if layer == self.layer:
            weights = weights.clone()
            weights[:, self.head, self.query] = self.pattern
        self.seen[layer] = weights
        return (weights @ value).transpose(1, 2).contiguous(), weights


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "mistral", "olmo2", "gpt_neox", "phi3"])
def test_a_written_pattern_does_what_edited_attention_does(family: str) -> None:
    model, module = _double(family, attn_implementation="eager")
    pattern = torch.tensor([0.0, 0.6, 0.4, 0.0, 0.0], dtype=torch.float64).repeat(2, 1)
    saved = ns.SavedActivation.from_pairs(("layers[1].heads[3].pattern[2]", pattern))
    given = inputs(family)
    with torch.no_grad():
        with model.trace(**given):
            saved.apply(model)
            logits = model.output.logits.save()
        edited = _Edited(1, 3, 2, pattern)
        AttentionInterface.register("edited", edited)
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

        AttentionMaskInterface.register("edited", ALL_MASK_ATTENTION_FUNCTIONS["eager"])
        module.set_attn_implementation("edited")
        expected = module(**given).logits
        seen = ns.capture(model, given["input_ids"], "layers[0].heads[:].pattern[:]")
    assert torch.allclose(logits, expected, atol=ROUNDED, rtol=0)
    for head in range(4):
        assert torch.allclose(seen[f"layers[0].heads[{head}].pattern[:]"], edited.seen[0][:, head], atol=ROUNDED)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in SEQ2SEQ])
def test_replaying_a_runs_own_patterns_changes_nothing(family: str) -> None:
    model, _ = _double(family, attn_implementation="eager")
    ids = inputs(family)["input_ids"]
    saved = ns.capture(model, ids, "layers[:].heads[:].pattern[:]")
    clean = ns.patched_logits(model, ids, saved * 1.0)
    with torch.no_grad(), model.trace(input_ids=ids):
        plain = model.output.logits.save()
    assert torch.allclose(clean, plain, atol=ROUNDED)
    rows = torch.stack([tensor.sum(-1) for _, tensor in saved.items()])
    assert torch.allclose(rows, torch.ones_like(rows))
    other = ns.patched_logits(model, ids, saved.map(lambda pattern: pattern.roll(1, dims=1)))
    assert not torch.allclose(other, plain, atol=1e-3)


def test_a_patterns_keys_count_the_prompts_own_tokens() -> None:
    model = wrap("llama", attn_implementation="eager")  # transformers' own mask is NaN for float64 with padding
    alone = ns.capture(model, "w3 w4 w5", "layers[1].heads[2].pattern[-1]")
    with torch.no_grad(), model.trace(["w3 w4 w5", "w6 w7 w8 w9 w10"]):
        padded = ns.save_activations(model, "layers[1].heads[2].pattern[-1]")
    row = padded["layers[1].heads[2].pattern[-1]"][0]
    assert torch.allclose(row[:3], alone["layers[1].heads[2].pattern[-1]"][0], atol=ROUNDED)
    assert torch.equal(row[3:], torch.zeros(2))
    # ... and the same when it is written.
    saved = ns.SavedActivation.from_pairs(("layers[1].heads[2].pattern[-1]", torch.tensor([[0.0, 1.0, 0.0]])))
    expected = ns.patched_logits(model, "w3 w4 w5", saved)[0, -1]
    with torch.no_grad(), model.trace(["w3 w4 w5", "w6 w7 w8 w9 w10"]):
        saved.apply(model)
        logits = model.output.logits.save()
    assert torch.allclose(logits[0, -1], expected, atol=ROUNDED)


def test_a_pattern_of_fused_attention_is_refused_before_the_run() -> None:
    model = wrap("llama")
    with pytest.raises(RefusedPlace, match=r"never makes the probabilities[\s\S]*eager"):
        ns.capture(model, "w3 w4", "layers[0].heads[0].pattern[-1]")


def test_a_pattern_cannot_be_updated_in_the_run_that_shows_it() -> None:
    model = wrap("llama", attn_implementation="eager")
    with pytest.raises(RefusedPlace, match="already been used"), model.trace("w3 w4 w5"):
        list(ns.updates(model, "layers[0].heads[0].pattern[-1]"))


@pytest.mark.parametrize("family", SPARSE)
def test_the_experts_of_a_layer_add_up_to_what_they_make_together(family: str) -> None:
    model, _ = _double(family)
    ids = inputs(family)["input_ids"]
    saved = ns.capture(model, ids, ["layers[1].experts[:].output[:]", "layers[1].mlp.output[:]"])
    parts = torch.stack([saved[f"layers[1].experts[{e}].output[:]"] for e in range(4)])
    assert torch.allclose(parts.sum(0), saved["layers[1].mlp.output[:]"], atol=1e-12)
    assert all(part.abs().max() > 0 for part in parts)


@pytest.mark.parametrize("family", SPARSE)
def test_an_expert_written_as_zero_is_an_expert_without_weights(family: str) -> None:
    model, module = _double(family)
    given = inputs(family)
    saved = ns.capture(model, given["input_ids"], "layers[1].experts[2].output[:]")
    with torch.no_grad():
        module.model.layers[1].mlp.experts.down_proj[2] = 0
        expected = module(**given).logits
    assert torch.allclose(ns.patched_logits(model, given["input_ids"], saved * 0), expected, atol=1e-12)
    assert not torch.allclose(ns.patched_logits(model, given["input_ids"], saved), expected, atol=1e-3)


@pytest.mark.parametrize("family", SPARSE)
def test_a_routers_logits_are_read_and_never_written(family: str) -> None:
    model, module = _double(family)
    given = inputs(family)
    kept: list[torch.Tensor] = []
    module.model.layers[1].mlp.gate.register_forward_hook(lambda _m, _a, out: kept.append(out[0].clone()))
    with torch.no_grad():
        module(**given)
    saved = ns.capture(model, given["input_ids"], "layers[1].mlp.router.output[:]")
    assert torch.equal(saved["layers[1].mlp.router.output[:]"].flatten(0, 1), kept[0])
    with pytest.raises(RefusedPlace, match="chosen inside the router"):
        ns.patched_logits(model, given["input_ids"], saved)
    with pytest.raises(RefusedPlace, match="chosen inside the router"):
        with model.trace(**given):
            ns.updates(model, "layers[1].mlp.router.output[0]")


@pytest.mark.parametrize("family", SPARSE)
def test_experts_are_updated_one_after_another(family: str) -> None:
    model, module = _double(family)
    given = inputs(family)
    keys = [f"layers[1].experts[{e}].output[{p}]" for e in (0, 2) for p in range(5)]
    with torch.no_grad():
        with model.trace(**given):
            for _, current, update in ns.updates(model, keys):
                update(current * 0)
            logits = model.output.logits.save()
        module.model.layers[1].mlp.experts.down_proj[[0, 2]] = 0
        assert torch.allclose(logits, module(**given).logits, atol=1e-12)


@pytest.mark.parametrize("family", SPARSE)
def test_one_prompts_expert_is_written_without_touching_the_other_prompt(family: str) -> None:
    model, _ = _double(family)
    saved = ns.capture(model, "w9 w8 w7", "layers[1].experts[0:3].output[-1]")
    with torch.no_grad():
        with model.trace() as tracer:
            with tracer.invoke("w3 w4 w5"):
                saved.apply(model)
                first = model.output.logits.save()
            with tracer.invoke("w6 w7 w8 w9"):
                second = model.output.logits.save()
        with model.trace("w6 w7 w8 w9"):
            alone = model.output.logits.save()
    assert torch.allclose(second, alone, atol=1e-12)
    assert torch.allclose(first[:, -1], ns.patched_logits(model, "w3 w4 w5", saved)[:, -1], atol=1e-12)


@pytest.mark.parametrize(
    "family", ["gpt2", "llama", "gemma2", "opt", "olmo2", "bloom", "qwen3_moe", "gpt_neo", "bert", "t5"]
)
def test_a_written_mid_moves_the_stream_and_what_the_mlp_reads(family: str) -> None:
    model, _ = _double(family)
    given = inputs(family)
    new = torch.linspace(-2, 2, 16, dtype=torch.float64)[None]
    saved = ns.SavedActivation.from_pairs(("layers[1].mid[2]", new))
    with torch.no_grad(), model.trace(**given):
        saved.apply(model)
        after = ns.save_activations(model, ["layers[1].mid[2]", "layers[1].mlp.output[2]", "layers[1].output[2]"])
    assert torch.equal(after["layers[1].mid[2]"], new.expand(2, -1))
    stream = after["layers[1].mid[2]"] + after["layers[1].mlp.output[2]"]
    if family == "bert":  # its stream is normalised after each addition
        with torch.no_grad():
            stream = model._module.bert.encoder.layer[1].output.LayerNorm(stream)
    assert torch.allclose(stream, after["layers[1].output[2]"], atol=1e-12)


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "bart"])
def test_a_pattern_mixes_the_values_that_are_written_beside_it(family: str) -> None:
    """In one capture, and as one set of a sweep; of two towers the attention between them."""
    if family in towers.FAMILIES:
        model, bare, (clean, corrupted), between = towers.load(family), towers.build(family), towers.pair(family), True
    else:
        model, bare, between = ns.load(families.build(family), tokenizer=False), families.build(family), False
        clean, corrupted = ({"input_ids": families.prompt(6, shift)} for shift in (0, 23))
    groups = len(ns.expand(model, f"layers[1].{'cross.' * between}groups[:].v"))
    place = f"layers[1].{'cross.' * between}"
    head, group = f"{place}heads[2]", 2 * groups // len(ns.expand(model, f"{place}heads[:].output"))
    pattern, value = f"{head}.pattern[-1]", f"{place}groups[{group}].v[1]"
    both = ns.capture(model, clean, [pattern, value])
    read, mixed = (site_of(ns.expand(model, path)[0]) for path in (value, f"{head}.output"))
    states = values(bare, corrupted, [read])[read][0].clone()
    states[1] = both[value][0]

    def written(tensor: torch.Tensor) -> torch.Tensor:
        tensor[0, 1] = both[value][0]
        return tensor

    def slices(tensor: torch.Tensor) -> torch.Tensor:
        tensor[0, -1] = both[pattern][0] @ states
        return tensor

    expected = run(bare, corrupted, {read: written, mixed: slices})
    torch.testing.assert_close(ns.patched_logits(model, corrupted, both), expected, rtol=0, atol=1e-11)
    metric = ns.logit_diff(7, 8)
    result = ns.sweep(model, clean, corrupted, [[pattern, value]], metric, progress=False)
    assert result.table.values[0].tolist() == pytest.approx([float(expected[0, -1, 7] - expected[0, -1, 8])], abs=1e-11)
    alone = ns.patched_logits(model, corrupted, both.subset(pattern))
    assert (alone - expected).abs().max() > 1e-6
