"""Names of adapter tensors, weights and addresses lead to each other."""

from __future__ import annotations

import pytest
from safetensors import safe_open

import nnsplice as ns
import zoo
from adapters.peft_models import ADAPTERS, adapt
from nnsplice.adapters.keys import read_key
from nnsplice.atlas.names import layer_of

LORA = "base_model.model.model.layers.2.self_attn.q_proj.lora_A"


@pytest.mark.parametrize("name", ADAPTERS)
def test_files_and_live_models_name_the_same_tensors(tmp_path, name):
    trained = adapt(name, tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        in_file = {key: read_key(key).text for key in file.keys() if not key.endswith("base_layer.weight")}  # noqa: SIM118
    live = {key: read_key(key).text for key, _ in trained.trainable}
    assert len(set(in_file.values())) == len(in_file) and set(in_file.values()) == set(live.values())


@pytest.mark.parametrize(
    "name", ["plain", "all_linear", "dora", "conv1d", "neox", "bert", "t5", "embedding", "saved_head"]
)
def test_an_adapters_tensor_lies_where_its_weight_lies(tmp_path, name):
    family = ADAPTERS[name][0]
    trained, plain = adapt(name, tmp_path), zoo.build(family)
    for key, _ in trained.trainable:
        weight = ns.adapters.base_name(key)
        assert weight in dict(plain.named_parameters())
        assert ns.adapters.address(key, plain) == ns.adapters.address(weight, plain)
        assert ns.adapters.address(key, trained.model) == ns.adapters.address(weight, plain)


def test_there_and_back():
    model = zoo.build("llama")
    assert ns.adapters.base_name(f"{LORA}.weight") == "model.layers.2.self_attn.q_proj.weight"
    assert str(ns.adapters.address(f"{LORA}.weight", model)) == "layers[2].attn.q"
    assert f"{LORA}.weight" in ns.adapters.factor_keys("layers[2].attn.q", model)
    assert len(ns.adapters.factor_keys("layers[2]", model)) == 14
    assert ns.adapters.factor_keys("embed", model) == tuple(
        f"base_model.model.model.embed_tokens.lora_embedding_{x}" for x in "AB"
    )
    with pytest.raises(KeyError, match="no matrix"):
        ns.adapters.factor_keys("final_norm", model)


@pytest.mark.parametrize("name", ["all_linear", "conv1d", "t5"])
def test_the_keys_of_an_address_are_the_files(tmp_path, name):
    trained = adapt(name, tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        held = set(file.keys())
    found: set[str] = set()
    for key in held:
        keys = set(ns.adapters.factor_keys(ns.adapters.address(key, trained.model), zoo.build(ADAPTERS[name][0])))
        assert key in keys
        found |= keys & held
    assert found == held


def test_wrappers_are_passed_over():
    for prefix in ("", "module.", "_orig_mod.", "module._orig_mod."):
        assert read_key(f"{prefix}{LORA}.default.weight") == read_key(f"{LORA}.weight")


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_layers_by_name_are_those_of_the_atlas(family):
    """What a name alone tells of its layer is what the model says, for every parameter of every family."""
    atlas = ns.Atlas.of(zoo.build(family))
    blocks = {block.module: (tower, block) for tower in atlas.towers.values() for block in tower.blocks}
    for name in atlas.tree.params:
        home = next(((t, b) for module, (t, b) in blocks.items() if name.startswith(f"{module}.")), None)
        found = layer_of(f"base_model.model.{name}")
        if home is None:
            assert found is None, name
        else:
            assert found is not None and (found.stack, found.number) == (home[0].stack, home[1].index), name
