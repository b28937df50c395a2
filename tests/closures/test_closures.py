"""Every promise holds on models that keep it, and is missed by models that break it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import nnsplice as ns
from closures import broken
from nnsplice.atlas import Atlas, Block
from nnsplice.atlas import atlas as room
from nnsplice.closures import PROMISES, measure
from zoo import wrap

SOUND = (
    "gpt2",
    "gptj",
    "bloom",
    "falcon",
    "llama",
    "gemma2",
    "olmo2",
    "gpt_oss",
    "granite",
    "bert",
    "bart",
    "t5",
    "lfm2",
)


def failing(model: Any) -> dict[str, set[int]]:
    """Kind -> layers in which it does not hold."""
    found: dict[str, set[int]] = {}
    for closure in measure(model):
        if not closure.holds:
            found.setdefault(closure.kind, set()).add(closure.layer)
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SOUND)
def test_sound_families_hold_in_every_number_format(name: str, dtype: torch.dtype) -> None:
    model = wrap(name, attn_implementation="eager")
    model._module.to(dtype)
    assert failing(model) == {}
    kinds = {closure.kind for closure in measure(model)}
    assert kinds >= {"stream", "attn", "mlp", "heads", "q", "k", "v", "pattern", "written pattern"}
    allowed = {torch.float64: 1e-10, torch.float32: 5e-7, torch.bfloat16: 0.04}[dtype]
    assert all(closure.allowed <= allowed for closure in measure(model, ["attn", "heads", "v", "written pattern"]))


def test_experts_make_what_all_of_them_make() -> None:
    assert {closure.holds for closure in measure(wrap("mixtral"), ["experts"])} == {True}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("change", "kinds"),
    [
        (broken.scaled_attention, {"attn", "mixer"}),
        (broken.gated_heads, {"written pattern"}),
        (broken.mixed_heads, {"heads", "q", "k", "v", "written pattern"}),
        (broken.detached_mid, {"mid"}),
        (broken.scaled_mlp, {"neurons"}),
        (broken.false_pattern, {"pattern", "written pattern"}),
        (broken.scores_for_pattern, {"pattern", "written pattern"}),
    ],
)
def test_broken_layers_are_found_by_what_they_break(
    change: Callable[..., None], kinds: set[str], dtype: torch.dtype
) -> None:
    found = failing(broken.llama(change, dtype))
    assert set(found) == kinds
    assert all(layers == {1} for layers in found.values())


@pytest.mark.parametrize(
    ("name", "wrong", "kinds"),
    [
        ("bloom", lambda b: {"layout": replace(b.layout, kind="concat")}, {"q", "k", "v", "heads"}),
        ("gemma2", lambda b: {"attn_added": b.attn}, {"attn"}),
        ("llama", lambda b: {"attn_added": f"{b.module}.post_attention_layernorm"}, {"attn"}),
        ("llama", lambda b: {"attn_added": "model.layers"}, {"attn", "heads"}),  # which is never called
        ("llama", lambda b: {"mid": (b.mlp, "input"), "mid_kind": "stream"}, {"mid"}),
        ("gpt_neox", lambda b: {"mlp_added": b.attn}, {"mlp", "attn"}),
    ],
)
def test_a_wrong_atlas_is_found(
    monkeypatch: pytest.MonkeyPatch, name: str, wrong: Callable[[Block], dict[str, Any]], kinds: set[str]
) -> None:
    model = wrap(name)
    right = Atlas.of(model)
    tower = right.towers["decoder"]
    blocks = tuple(replace(block, **wrong(block)) for block in tower.blocks)
    read = replace(right, towers={"decoder": replace(tower, blocks=blocks)})
    monkeypatch.setitem(room._ATLASES, model._module, (room.fingerprint(model._module), read))
    assert kinds <= set(failing(model))


#: Family -> the kinds that do not hold; all others do.
FAMILIES: dict[str, set[str]] = {
    "llama": set(),
    "bamba": set(),
    "jamba": set(),
    "lfm3": {"written pattern"},
    "recurrent_gemma": set(),
    "afmoe": {"written pattern"},
    "bitnet": {"written pattern"},
    "granite_swa": {"written pattern"},
    "laguna": {"written pattern", "ungated"},  # its gates are no sigmoids
    "gemma4_text": {"written pattern", "mid", "mlp"},  # the layer scales its output, and adds an input of its own
    "diffllama": set(),
    "doge": {"mid", "attn", "mixer", "mlp"},  # its heads are refused by name, as those of DiffLlama
    "falcon_h1": {"attn", "mixer"},
    "qwen3_next": {"written pattern"},
    "deepseek_v3": set(),
    "minicpm3": set(),
    "mamba": set(),
    "nemotron_h": set(),
    "minimax": {"pattern", "written pattern", "ungated"},  # a norm stands between its values and their gates
}


@pytest.mark.parametrize("name", FAMILIES)
def test_families_hold_or_are_refused(name: str) -> None:
    if name not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {name}")
    model = broken.family(name)
    found = set(failing(model))
    assert found == FAMILIES[name], measure(model)
    layers = {kind: sorted(of) for kind, of in failing(model).items()}
    for kind, path in {
        "attn": "attn.output",
        "mixer": "mixer.output",
        "mlp": "mlp.output", "mid": "mid", "v": "groups[0].v", "heads": "heads[0].output",
    }.items():  # fmt: skip
        for layer in layers.get(kind, ()):
            with pytest.raises(ns.errors.RefusedPlace, match="of this model"):
                ns.capture(model, "w3 w4 w5", f"layers[{layer}].{path}[-1]")


def test_every_kind_is_named_and_says_what_it_promises() -> None:
    assert {closure.kind for closure in measure(wrap("mixtral"))} <= set(PROMISES)


def test_a_gate_that_stands_before_its_query_is_found() -> None:
    """The order that the atlas takes for granted, exchanged in the model's own code: both would be cut wrongly."""
    assert {"q", "gate", "heads"} & set(failing(broken.family("qwen3_next"))) == set()
    model = broken.family("qwen3_next", change=broken.gates_first)
    assert {"q", "gate"} <= set(failing(model))
    with pytest.raises(ns.errors.RefusedPlace, match="of this model"):
        ns.capture(model, "w3 w4 w5", "layers[1].heads[0].gate[-1]")


def test_keys_that_stand_behind_their_values_are_found() -> None:
    assert {"k", "v"} & set(failing(broken.family("deepseek_v3"))) == set()
    model = broken.family("deepseek_v3", change=broken.values_first)
    assert {"k", "v"} <= set(failing(model))
    with pytest.raises(ns.errors.RefusedPlace, match="of this model"):
        ns.capture(model, "w3 w4 w5", "layers[1].groups[0].v[-1]")
