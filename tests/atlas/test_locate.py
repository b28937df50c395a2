"""Names of many spellings -> sites."""

from __future__ import annotations

import pytest

import zoo
from nnsplice.atlas import Atlas

_MODELS: dict[str, tuple] = {}


def atlas(name: str, **overrides) -> Atlas:
    key = name + repr(sorted(overrides.items()))
    if key not in _MODELS:
        model = zoo.build(name, **overrides)
        _MODELS[key] = (model, Atlas.of(model))
    return _MODELS[key][1]


def backbone(name: str) -> Atlas:
    if f"{name} backbone" not in _MODELS:
        model = zoo.build(name).base_model
        _MODELS[f"{name} backbone"] = (model, Atlas.of(model))
    return _MODELS[f"{name} backbone"][1]


@pytest.mark.parametrize("name", [*zoo.FAMILIES, "albert"])
def test_a_place_holds_the_name_it_was_found_by(name):
    found = atlas(name)
    for parameter in [*found.tree.params, *found.tree.aliases]:
        place = found.locate(parameter)
        assert found.tree.aliases.get(parameter, parameter) in found.resolve(place)
        if not place.native and "layers" not in str(place):
            assert len(found.resolve(place)) <= 2


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_every_parameter_of_a_block_has_a_portable_place(name):
    found = atlas(name)
    for tower in found.towers.values():
        prefix = "encoder." if tower.name == "encoder" else ""
        for block in tower.blocks:
            for parameter in found.tree.params:
                if parameter.startswith(f"{block.module}."):
                    assert str(found.locate(parameter)).startswith(f"{prefix}layers[{block.index}]")


@pytest.mark.parametrize("name", [*zoo.FAMILIES, "albert"])
def test_modules_are_found_where_they_are(name):
    """A portable site of a module resolves to nothing outside it; a native one leads to it."""
    found = atlas(name)
    for module in found.tree.nodes:
        if not module:
            continue
        place = found.locate(module)
        if place.native:
            assert str(place).replace("[", ".").replace("]", "").replace("E_", "") == f"model.{module}"


@pytest.mark.parametrize(
    ("family", "name", "place"),
    [
        ("gpt2", "transformer.h.1.attn.c_attn.weight", "layers[1].attn"),
        ("gpt2", "transformer.h.1.attn.c_proj.bias", "layers[1].attn.o"),
        ("gpt2", "transformer.h.1.ln_2.weight", "layers[1]"),
        ("gpt2", "transformer.h.1", "layers[1]"),
        ("gpt2", "transformer.h.1.mlp", "layers[1].mlp"),
        ("gpt2", "transformer.ln_f.bias", "final_norm"),
        ("gpt2", "transformer.wte.weight", "embed"),
        ("gpt2", "lm_head.weight", "unembed"),
        ("gpt2", "transformer.wpe.weight", "model.transformer.wpe.weight"),
        ("gpt2", "h.2.attn.c_proj.weight", "layers[2].attn.o"),
        ("gpt2", "module.transformer.h.2.mlp.c_proj.weight", "layers[2].mlp.down"),
        ("gpt2", "_orig_mod.transformer.h.2.mlp.c_proj.weight", "layers[2].mlp.down"),
        ("gpt2", "transformer.h.2._orig_mod.mlp.c_fc.weight", "layers[2].mlp.up"),
        ("gpt2", "base_model.model.transformer.h.0.attn.c_attn.lora_A.default.weight", "layers[0].attn"),
        ("llama", "model.layers.0.self_attn.k_proj.weight", "layers[0].attn.k"),
        ("llama", "layers.0.self_attn.k_proj.weight", "layers[0].attn.k"),
        ("llama", "base_model.model.model.layers.2.self_attn.q_proj.lora_A.default.weight", "layers[2].attn.q"),
        ("llama", "base_model.model.model.layers.2.self_attn.q_proj.lora_B.weight", "layers[2].attn.q"),
        ("llama", "base_model.model.model.layers.2.mlp.gate_proj.base_layer.weight", "layers[2].mlp.gate"),
        ("llama", "base_model.model.model.layers.2.self_attn.v_proj.lora_magnitude_vector", "layers[2].attn.v"),
        (
            "llama",
            "base_model.model.model.layers.2.self_attn.v_proj.lora_magnitude_vector.default.weight",
            "layers[2].attn.v",
        ),
        ("llama", "base_model.model.lm_head.modules_to_save.default.weight", "unembed"),
        ("llama", "base_model.model.lm_head.original_module.weight", "unembed"),
        ("qwen3", "model.layers.0.self_attn.q_norm.weight", "layers[0]"),
        ("mixtral", "model.layers.1.block_sparse_moe.experts.3.w1.weight", "layers[1].experts[3]"),
        ("mixtral", "model.layers.1.block_sparse_moe.gate.weight", "layers[1].mlp.router"),
        ("mixtral", "model.layers.1.mlp.experts.gate_up_proj", "layers[1].mlp"),
        ("mixtral", "model.layers.1.mlp.gate.weight", "layers[1].mlp.router"),
        ("qwen3_moe", "model.layers.1.mlp.experts.3.gate_proj.weight", "layers[1].experts[3]"),
        ("qwen3_moe", "layers.1.mlp.experts.0.down_proj.weight", "layers[1].experts[0]"),
        ("t5", "encoder.block.2.layer.1.DenseReluDense.wi.weight", "encoder.layers[2].mlp.up"),
        ("t5", "decoder.block.2.layer.1.EncDecAttention.q.weight", "layers[2]"),
        ("t5", "decoder.block.0.layer.2.DenseReluDense.wo.weight", "layers[0].mlp.down"),
        ("t5", "shared.weight", "embed"),
        ("t5", "encoder.final_layer_norm.weight", "encoder.final_norm"),
        ("bert", "bert.encoder.layer.1.attention.output.dense.weight", "layers[1].attn.o"),
        ("bert", "bert.encoder.layer.1.output.dense.weight", "layers[1].mlp.down"),
        ("bert", "encoder.layer.1.attention.self.key.bias", "layers[1].attn.k"),
        ("bert", "bert.embeddings.LayerNorm.weight", "model.bert.embeddings.LayerNorm.weight"),
        ("gpt_neox", "embed_out.weight", "unembed"),
        ("bart", "model.encoder.layers.0.fc1.weight", "encoder.layers[0].mlp.up"),
        ("phi3", "model.layers.0.mlp.gate_up_proj.weight", "layers[0].mlp"),
    ],
)
def test_names_written_out(family, name, place):
    assert str(atlas(family).locate(name)) == place


@pytest.mark.parametrize(
    ("family", "name", "place"),
    [
        ("gpt2", "transformer.h.2.mlp.c_fc.weight", "layers[2].mlp.up"),
        ("gpt2", "h.2.mlp.c_fc.weight", "layers[2].mlp.up"),
        ("llama", "model.layers.1.input_layernorm.weight", "layers[1]"),
        ("llama", "base_model.model.model.layers.1.self_attn.o_proj.lora_B.default.weight", "layers[1].attn.o"),
        ("bert", "bert.encoder.layer.0.intermediate.dense.bias", "layers[0].mlp.up"),
        ("bart", "model.decoder.layers.1.fc2.weight", "layers[1].mlp.down"),
    ],
)
def test_a_bare_backbone_reads_names_of_the_whole_model(family, name, place):
    assert str(backbone(family).locate(name)) == place


@pytest.mark.parametrize(
    ("family", "name", "near"),
    [
        ("gpt2", "transformer.h.2.mlp.c_fcc.weight", "transformer.h.2.mlp.c_fc.weight"),
        ("gpt2", "transformer.h.7.mlp.c_fc.weight", "transformer.h.2.mlp.c_fc.weight"),
        ("gpt2", "nonsense", ""),
        ("gpt2", "", ""),
        ("llama", "model.layers.0.mlp.experts.0.gate_proj.weight", "gate_proj.weight"),
        ("llama", "weight", ""),
    ],
)
def test_unknown_names(family, name, near):
    with pytest.raises(KeyError, match="no name of this model") as caught:
        atlas(family).locate(name)
    assert near in str(caught.value)


def test_an_expert_past_the_last():
    with pytest.raises(IndexError, match=r"experts\[0\] to experts\[3\]"):
        atlas("mixtral").locate("model.layers.1.block_sparse_moe.experts.4.w1.weight")
