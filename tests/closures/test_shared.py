"""What docs/reference/address.md says that heads share, measured on families of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import nnsplice as ns
from families.build import build, prompt
from zoo import tokenizer

_IDS = prompt(9)


def _family(name: str) -> Any:
    return ns.load(build(name), tokenizer=tokenizer(), task="text-generation")


def _value(model: Any, place: str) -> torch.Tensor:
    return ns.capture(model, _IDS, f"{place}[:]")[f"{place}[:]"][0]


@pytest.mark.parametrize(("name", "head", "group"), [("qwen3_next", 3, 1), ("qwen3_5_text", 0, 0), ("afmoe", 2, 1)])
def test_the_value_before_a_gate_is_what_the_head_mixed(name: str, head: int, group: int) -> None:
    model, at = _family(name), "layers[2]"
    place = f"{at}.heads[{head}]"
    before = _value(model, f"{place}.output") / _value(model, f"{place}.gate").sigmoid()
    mixed = _value(model, f"{place}.pattern") @ _value(model, f"{at}.groups[{group}].v")
    assert torch.allclose(before, mixed, rtol=1e-6, atol=1e-9)
    assert not torch.allclose(_value(model, f"{place}.output"), mixed, rtol=1e-2, atol=1e-3)


def test_a_closed_gate_silences_its_head_alone() -> None:
    model = _family("qwen3_next")
    heads = [f"layers[2].heads[{head}].output" for head in range(4)]
    closed = torch.full((1, 16), -1e4, dtype=torch.float64)
    gate = ns.SavedActivation.from_pairs(("layers[2].heads[1].gate[-1]", closed))
    seen: list[ns.SavedActivation] = []
    with model.trace(_IDS):
        gate.apply(model)
        seen.append(ns.save_activations(model, [f"{head}[-1]" for head in heads]))
    sizes = [float(seen[0][f"{head}[-1]"].abs().max()) for head in heads]
    assert sizes[1] == 0 and min(sizes[0], sizes[2], sizes[3]) > 0


def test_a_norm_over_all_heads_lets_one_query_move_the_others() -> None:
    """OLMo 2's does; Qwen 3's, which has a norm for each head, does not."""
    moved = {}
    for name in ("olmo2", "qwen3"):
        model = _family(name)
        other = ns.capture(model, _IDS, "layers[1].heads[0].q[-1]") * 3.0
        with model.trace(_IDS):
            other.apply(model)
            after = ns.save_activations(model, "layers[1].heads[3].output[-1]")
        before = ns.capture(model, _IDS, "layers[1].heads[3].output[-1]")
        key = "layers[1].heads[3].output[-1]"
        moved[name] = float((after[key] - before[key]).abs().max())
    assert moved["olmo2"] > 1e-6 and moved["qwen3"] < 1e-12


def test_a_layer_without_keys_says_whose_it_reads() -> None:
    model = _family("gemma4_text")
    with pytest.raises(ns.errors.RefusedPlace, match=r"layer 2 has no k of its own: .* of layer 0"):
        ns.capture(model, _IDS, "layers[2].groups[0].k[-1]")
    with pytest.raises(ns.errors.RefusedPlace, match=r"(?s)layer 3 has no v of its own.*write: layers\[1\].attn.v"):
        ns.weights.create_param_masks(model, "layers[3].attn.v")
    # It is so: another value of layer 1 moves the heads of layer 3 whatever its stream is.
    assert ns.Atlas.of(model).tower().blocks[3].kv_layer == 1
    stream = ns.capture(model, _IDS, "layers[3].input[:]")
    value = ns.capture(model, _IDS, "layers[1].groups[0].v[:]") * 2.0
    with model.trace(_IDS):
        (value | stream).apply(model)
        after = ns.save_activations(model, "layers[3].heads[0].output[-1]")
    before = ns.capture(model, _IDS, "layers[3].heads[0].output[-1]")
    key = "layers[3].heads[0].output[-1]"
    assert float((after[key] - before[key]).abs().max()) > 1e-6


@pytest.mark.parametrize("name", ["deepseek_v3", "afmoe"])
def test_circuits_refuse_attention_that_reads_more_than_they_can_name(name: str) -> None:
    with pytest.raises(ns.errors.RefusedPlace, match="reads more than queries, keys and values of its own"):
        ns.Circuit.full(_family(name))
