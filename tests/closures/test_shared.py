"""What docs/reference/address.md says that heads share, measured on families of transformers."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
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


@pytest.mark.parametrize("site", ["heads[0].q", "groups[1].k"])
def test_writes_before_a_norm_over_all_heads_are_told(site: str) -> None:
    words = "queries of all heads" if site.endswith("q") else "keys of all groups"
    metric, told = (
        ns.logit_diff(7, 8),
        rf"(?s)layers\[1\].{site[:5]}.* before a norm over the {words}.*{site[-1]}_norm",
    )
    for name in ("olmo2", "qwen3"):
        model = _family(name)
        saved = ns.capture(model, _IDS, f"layers[1].{site}[-1]")
        asked: list[Callable[[], object]] = [
            lambda m=model: ns.sweep(m, prompt(9, 23), _IDS, f"layers[1].{site}[-1]", metric, progress=False),
            lambda m=model: ns.ablate(m, _IDS, f"layers[1].{site}[-1]", metric, progress=False),
            lambda m=model, s=saved: ns.patched_logits(m, _IDS, s),
            lambda m=model: ns.path_patch(
                m, prompt(9, 23), _IDS, "layers[0].mlp", f"layers[1].{site}", metric, progress=False
            ),
        ]
        for ask in asked:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                ask()
            found = [str(one.message) for one in seen if "norm over" in str(one.message)]
            assert bool(found) is (name == "olmo2") and all(re.search(told, text) for text in found)


def test_which_norms_are_over_all_heads() -> None:
    for name, count in {"olmo2": 2, "minimax_m2": 2, "olmoe": 2, "qwen3": 0, "gemma3_text": 0, "qwen3_next": 0}.items():
        blocks = ns.Atlas.of(build(name)).tower().blocks
        assert {len(block.joint_norms) for block in blocks} == {count}, name


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


@pytest.mark.parametrize(("name", "head", "group"), [("qwen3_next", 3, 1), ("qwen3_5_text", 0, 0), ("afmoe", 2, 1)])
def test_a_slice_before_its_gate_has_an_address(name: str, head: int, group: int) -> None:
    model, at = _family(name), "layers[2]"
    place = f"{at}.heads[{head}]"
    mixed = _value(model, f"{place}.pattern") @ _value(model, f"{at}.groups[{group}].v")
    assert torch.allclose(_value(model, f"{place}.ungated"), mixed, rtol=1e-6, atol=1e-9)
    # Together with the gate and the slice behind it, and at single tokens.
    kinds = ("output", "ungated", "gate")
    saved = ns.capture(model, _IDS, [f"{place}.{kind}[2,-1]" for kind in kinds])
    behind, before, gate = (torch.stack([saved[f"{place}.{kind}[{n}]"][0] for n in (2, -1)]) for kind in kinds)
    assert torch.allclose(before * gate.sigmoid(), behind, rtol=1e-12, atol=0)


def test_a_slice_is_written_before_its_gate() -> None:
    model, bare = _family("qwen3_next"), build("qwen3_next")
    place, new = "layers[2].heads[1]", torch.linspace(-1, 1, 16, dtype=torch.float64)
    saved = ns.SavedActivation.from_pairs((f"{place}.ungated[4]", new[None]))
    gate = _value(model, f"{place}.gate")[4]

    def behind(_: Any, args: tuple) -> tuple:
        slices = args[0].clone()
        slices[0, 4, 16:32] = new * gate.sigmoid()
        return (slices,)

    hook = bare.model.layers[2].self_attn.o_proj.register_forward_pre_hook(behind)
    with torch.no_grad():
        expected = bare(_IDS).logits
    hook.remove()
    assert torch.allclose(ns.patched_logits(model, _IDS, saved), expected, rtol=0, atol=1e-12)
    # A run's own values change nothing, and a sweep measures what the slice behind the gate would have had.
    own = ns.capture(model, _IDS, "layers[2].heads[:].ungated[:]")
    with torch.no_grad():
        plain = bare(_IDS).logits
    assert torch.allclose(ns.patched_logits(model, _IDS, own), plain, rtol=0, atol=1e-12)
    assert float((expected - plain).abs().max()) > 1e-6


@pytest.mark.parametrize("name", ["qwen3_next", "afmoe"])
def test_a_slice_is_written_behind_the_gate_that_is_written_beside_it(name: str) -> None:
    model, place = _family(name), "layers[2].heads[1]"
    both = ns.capture(model, prompt(9, 23), [f"{place}.gate[4]", f"{place}.ungated[4]"])
    behind = ns.capture(model, prompt(9, 23), f"{place}.output[4]")
    expected = ns.patched_logits(model, _IDS, behind)
    torch.testing.assert_close(ns.patched_logits(model, _IDS, both), expected, rtol=0, atol=1e-11)
    alone = ns.patched_logits(model, _IDS, both.subset(f"{place}.ungated[4]"))
    assert float((alone - expected).abs().max()) > 1e-6


def test_a_sweep_of_slices_before_their_gates_leaves_the_gates() -> None:
    model, bare = _family("qwen3_next"), build("qwen3_next")
    other = prompt(9, 23)
    result = ns.sweep(model, other, _IDS, "layers[2].heads[:].ungated[-1]", ns.logit_diff(7, 8), progress=False)
    mixed = [_of(model, other, f"layers[2].heads[{head}].ungated")[-1] for head in range(4)]
    gates = [_value(model, f"layers[2].heads[{head}].gate")[-1] for head in range(4)]
    for head in range(4):

        def behind(_: Any, args: tuple, head: int = head) -> tuple:
            slices = args[0].clone()
            slices[0, -1, 16 * head : 16 * (head + 1)] = mixed[head] * gates[head].sigmoid()
            return (slices,)

        hook = bare.model.layers[2].self_attn.o_proj.register_forward_pre_hook(behind)
        with torch.no_grad():
            logits = bare(_IDS).logits[0, -1]
        hook.remove()
        assert float(result.table.values[0, head]) == pytest.approx(float(logits[7] - logits[8]), abs=1e-12)


def _of(model: Any, ids: torch.Tensor, place: str) -> torch.Tensor:
    return ns.capture(model, ids, f"{place}[:]")[f"{place}[:]"][0]


def test_what_stands_before_a_gate_is_refused_by_name() -> None:
    with pytest.raises(ns.errors.UnknownPath, match=r"(?s)have no gates.*write: layers\[0\].heads\[1\].output"):
        ns.capture(_family("llama"), _IDS, "layers[0].heads[1].ungated[-1]")
    model = _family("qwen3_next")
    with pytest.raises(ns.errors.RefusedPlace, match=r"a slice before its gate is derived"):
        ns.attribute(model, prompt(9, 23), _IDS, "layers[2].heads[:].ungated[-1]", ns.logit_diff(7, 8), progress=False)
    with pytest.raises(ns.errors.PathError, match="no parameters belong to it"):
        ns.weights.create_param_masks(model, "layers[2].heads[0].ungated")
    with torch.no_grad():  # closed, so that nothing of it is left behind
        projection: Any = ns.models.unwrap(model).get_submodule("model.layers.2.self_attn.q_proj")
        projection.weight[16:32] = 0
        projection.bias = torch.nn.Parameter(torch.zeros(projection.weight.shape[0], dtype=torch.float64))
        projection.bias[16:32] = -1e4
    with pytest.raises(ns.errors.RefusedPlace, match=r"(?s)a gate is closed.*write: layers\[2\].heads\[0\].output"):
        ns.capture(model, _IDS, "layers[2].heads[0].ungated[-1]")


def test_a_gate_that_is_no_sigmoid_is_refused() -> None:
    model = _family("qwen3_next")
    projection = ns.models.unwrap(model).get_submodule("model.layers.2.self_attn.o_proj")
    projection.register_forward_pre_hook(lambda _, args: (args[0] * 2.0,))
    with pytest.raises(ns.errors.RefusedPlace, match="not its values times the sigmoids of the gates"):
        ns.capture(model, _IDS, "layers[2].heads[0].ungated[-1]")
