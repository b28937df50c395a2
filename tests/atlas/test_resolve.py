"""Which parameters belong to a site: against the model's own gradients, and by the laws of parts and wholes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import pytest
import torch

import zoo
from nnsplice.atlas import Atlas, Layout, Selection


@pytest.fixture(scope="module", params=zoo.FAMILIES)
def atlas(request):
    model = zoo.build(request.param)
    atlas = Atlas.of(model)
    yield atlas
    del model


def towers(atlas):
    return [f"{name}." if len(atlas.towers) > 1 else "" for name in atlas.towers]


def union(atlas, *texts) -> Selection:
    found = atlas.resolve(texts[0])
    for text in texts[1:]:
        found |= atlas.resolve(text)
    return found


# -- the model's own answer --------------------------------------------------------------------------------------------


def test_gradients_agree(atlas):
    checks = atlas.verify()
    assert {check.role for check in checks} >= {"q", "k", "v", "parameters"}
    assert {(check.tower, check.layer) for check in checks} == {
        (name, i) for name, tower in atlas.towers.items() for i in range(tower.n_layers)
    }
    assert [check for check in checks if not check.ok] == []


def with_blocks(atlas: Atlas, **changes: Any) -> Atlas:
    """The same model with something wrong in its atlas."""
    tower = atlas.towers["decoder"]
    blocks = tuple(replace(block, **changes) for block in tower.blocks)
    return Atlas(atlas.tree, MappingProxyType({"decoder": replace(tower, blocks=blocks)}), atlas.root)


def failures(atlas: Atlas) -> set[str]:
    return {check.role for check in atlas.verify(layers=[1]) if not check.ok}


@dataclass(frozen=True, slots=True)
class OffByOne(Layout):
    """Head 0 answers for head 1, and so on."""

    def slot(self, role, index):
        return Layout.slot(self, role, (index + 1) % self.count(role))


@pytest.mark.parametrize("name", ["gpt2", "llama", "falcon", "codegen"])
def test_a_head_off_by_one_is_noticed(name):
    model = zoo.build(name)
    atlas = Atlas.of(model)
    layout = atlas.towers["decoder"].blocks[0].layout
    assert layout is not None and failures(atlas) == set()
    wrong = OffByOne(layout.kind, layout.n_heads, layout.n_kv, layout.head_dim)
    assert failures(with_blocks(atlas, layout=wrong)) == {"q", "k", "v", "parameters"}


@pytest.mark.parametrize(
    ("name", "kind", "noticed"),
    [
        ("gpt_neox", "concat", {"q", "k", "v", "parameters"}),
        ("gpt2", "grouped", {"q", "k", "v", "parameters"}),
        ("falcon", "concat", {"q", "k", "v", "parameters"}),
        ("codegen", "interleaved", {"q", "k", "v", "parameters"}),
    ],
)
def test_a_wrong_layout_is_noticed(name, kind, noticed):
    model = zoo.build(name)
    atlas = Atlas.of(model)
    layout = atlas.towers["decoder"].blocks[0].layout
    assert layout is not None
    assert failures(with_blocks(atlas, layout=replace(layout, kind=kind))) == noticed


@dataclass(frozen=True, slots=True)
class KeysForValues(Layout):
    """The right slices under the wrong names: only the roles tell."""

    def slot(self, role, index):
        return Layout.slot(self, {"q": "q", "k": "v", "v": "k"}[role], index)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", ["gpt2", "codegen", "bloom", "phi3"])
def test_keys_taken_for_values_are_noticed(name):
    model = zoo.build(name)
    atlas = Atlas.of(model)
    layout = atlas.towers["decoder"].blocks[0].layout
    assert layout is not None
    wrong = KeysForValues(layout.kind, layout.n_heads, layout.n_kv, layout.head_dim)
    assert failures(with_blocks(atlas, layout=wrong)) == {"k", "v"}


def test_verify_leaves_no_trace():
    model = zoo.build("llama").train()
    kept = [p for i, p in enumerate(model.parameters()) if i % 2]
    for parameter in kept:
        parameter.requires_grad_(False)
    first = next(p for p in model.parameters() if p.requires_grad)
    first.grad = torch.ones_like(first)
    before, draws = first.grad, torch.random.get_rng_state()
    modes = [module.training for module in model.modules()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    with torch.no_grad():
        assert all(check.ok for check in Atlas.of(model).verify())
    assert [module.training for module in model.modules()] == modes and all(modes)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert first.grad is before and bool((before == 1).all())
    assert all(p.grad is None for p in model.parameters() if p is not first)
    assert torch.equal(torch.random.get_rng_state(), draws)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# -- parts and wholes --------------------------------------------------------------------------------------------------


def test_heads_and_groups_are_the_projections(atlas):
    for tower in towers(atlas):
        for at in (f"{tower}layers[0]", f"{tower}layers[2]"):
            parts = ("q", "k", "v", "o") if not_alternating(atlas, at) else None
            heads = atlas.resolve(f"{at}.heads[:]")
            assert heads == atlas.resolve(f"{at}.groups[:]")
            # The bias of the output projection is added once, whatever the heads say.
            whole = atlas.resolve(f"{at}.attn")
            assert set(whole) - set(heads) <= {name for name in whole if name.endswith("bias")}
            assert all(heads.parts[name] is None for name in heads)
            if parts:
                assert union(atlas, *(f"{at}.attn.{part}" for part in parts)) == whole


def not_alternating(atlas, at) -> bool:
    block = atlas.towers["encoder" if at.startswith("encoder") else "decoder"].blocks[0]
    return block.layout is not None


def test_groups_partition(atlas):
    """Each number of every projection is in exactly one group."""
    for tower in towers(atlas):
        total = {name: torch.zeros(shape) for name, shape in atlas.resolve(f"{tower}layers[1].heads[:]").shapes.items()}
        n_kv = atlas.towers[tower.rstrip(".") or "decoder"].blocks[1].n_kv
        for g in range(n_kv):
            for name, mask in atlas.resolve(f"{tower}layers[1].groups[{g}]").masks().items():
                total[name] += 1 if mask is None else mask
        assert all(bool((count == 1).all()) for count in total.values())


def test_a_group_is_its_heads(atlas):
    for tower in towers(atlas):
        layout = atlas.towers[tower.rstrip(".") or "decoder"].blocks[1].layout
        for g in range(layout.n_kv):
            heads = [f"{tower}layers[1].heads[{h}]" for h in layout.heads_of(g)]
            assert union(atlas, *heads) == atlas.resolve(f"{tower}layers[1].groups[{g}]")


def test_a_layer_is_all_its_parameters(atlas):
    for tower in towers(atlas):
        block = atlas.towers[tower.rstrip(".") or "decoder"].blocks[2]
        inside = [name for name in atlas.tree.params if name.startswith(f"{block.module}.")]
        layer = atlas.resolve(f"{tower}layers[2]")
        assert list(layer) == inside and all(layer.parts[name] is None for name in layer)
        attn, mlp = atlas.resolve(f"{tower}layers[2].attn"), atlas.resolve(f"{tower}layers[2].mlp")
        assert not set(attn) & set(mlp)
        left = set(inside) - set(attn) - set(mlp)
        # What is in neither: norms, cross attention, and T5's table of relative positions.
        words = ("norm", "ln_", "encoder_attn", "EncDecAttention", "relative_attention_bias")
        assert all(any(word in name.replace("LayerNorm", "norm") for word in words) for name in left)


def test_neurons_or_experts_are_the_mlp(atlas):
    for tower in towers(atlas):
        sparse = atlas.towers[tower.rstrip(".") or "decoder"].blocks[0].is_sparse
        parts = atlas.resolve(f"{tower}layers[0].{'experts' if sparse else 'neurons'}[:]")
        rest = set(atlas.resolve(f"{tower}layers[0].mlp")) - set(parts)
        assert all(part is None for part in parts.parts.values())
        if sparse:
            assert rest == set(atlas.resolve(f"{tower}layers[0].mlp.router"))
        else:
            assert rest <= set(atlas.resolve(f"{tower}layers[0].mlp.down")) and all("bias" in name for name in rest)


def test_full_and_ends(atlas):
    full = atlas.resolve("full")
    assert full.names == tuple(atlas.tree.params) and set(full.masks().values()) == {None}
    assert full.numel() == sum(p.numel() for p in atlas.root().parameters())
    assert len(atlas.resolve("embed")) == 1
    assert atlas.tied == (atlas.resolve("embed").names[0] in atlas.resolve("unembed"))
    assert atlas.tree.params[atlas.resolve("unembed").names[0]][0] == zoo.VOCAB


# -- examples written out ----------------------------------------------------------------------------------------------


def test_one_head_of_llama_written_out():
    model = zoo.build("llama")
    found = Atlas.of(model).resolve("layers[1].heads[3]")
    prefix = "model.layers.1.self_attn."
    assert dict(found.parts) == {
        f"{prefix}q_proj.weight": (0, ((18, 24),)),
        f"{prefix}k_proj.weight": (0, ((6, 12),)),
        f"{prefix}v_proj.weight": (0, ((6, 12),)),
        f"{prefix}o_proj.weight": (1, ((18, 24),)),
    }
    assert found.numel() == (6 + 6 + 6 + 6) * 16
    assert {name: int(mask.sum()) for name, mask in found.masks().items() if mask is not None} == dict.fromkeys(
        found, 96
    )


def test_one_head_of_gpt2_written_out():
    model = zoo.build("gpt2")
    found = Atlas.of(model).resolve("l1h2")
    assert dict(found.parts) == {
        "transformer.h.1.attn.c_attn.weight": (1, ((8, 12), (24, 28), (40, 44))),
        "transformer.h.1.attn.c_attn.bias": (0, ((8, 12), (24, 28), (40, 44))),
        "transformer.h.1.attn.c_proj.weight": (0, ((8, 12),)),
    }


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("layers[0].attn.bias", ["q_proj.bias", "k_proj.bias", "v_proj.bias"]),
        ("layers[0].attn.o.weight", ["o_proj.weight"]),
        ("layers[0].heads[1].q", ["q_proj.weight", "q_proj.bias"]),
        ("layers[0].groups[1].k", ["k_proj.weight", "k_proj.bias"]),
        ("model.model.layers[0].self_attn.k_proj", ["k_proj.weight", "k_proj.bias"]),
        ("model.model.layers[0].self_attn.k_proj.bias", ["k_proj.bias"]),
    ],
)
def test_parts_of_qwen2(text, names):
    model = zoo.build("qwen2")
    assert sorted(Atlas.of(model).resolve(text)) == sorted(f"model.layers.0.self_attn.{name}" for name in names)


def test_experts_are_slices_of_fused_tensors():
    model = zoo.build("mixtral")
    atlas = Atlas.of(model)
    assert dict(atlas.resolve("layers[2].experts[1]").parts) == {
        "model.layers.2.mlp.experts.gate_up_proj": (0, ((1, 2),)),
        "model.layers.2.mlp.experts.down_proj": (0, ((1, 2),)),
    }
    assert atlas.resolve("layers[2].mlp.router").names == ("model.layers.2.mlp.gate.weight",)


def test_bert_mlp_leaves_the_attention_output_alone():
    model = zoo.build("bert")
    assert all(".attention." not in name for name in Atlas.of(model).resolve("l0 mlp"))


def test_tied_unembed_is_the_shared_tensor():
    model = zoo.build("gpt2")
    atlas = Atlas.of(model)
    assert atlas.tied and atlas.resolve("unembed").names == ("transformer.wte.weight",)
    loose = zoo.build("gpt2", tie_word_embeddings=False)
    assert not Atlas.of(loose).tied and Atlas.of(loose).resolve("unembed").names == ("lm_head.weight",)


def test_layer_ranges():
    model = zoo.build("gpt2")
    atlas = Atlas.of(model)
    assert atlas.resolve("layers[0:2]") == union(atlas, "layers[0]", "layers[1]")
    assert atlas.resolve("layers[:].heads[0,-1]").numel() == 6 * atlas.resolve("layers[0].heads[0]").numel()


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("layers[0].heads[1][-1]", ValueError, "parameters have no tokens"),
        ("layers[0].mid", ValueError, "activation"),
        ("layers[0].heads[0].pattern", ValueError, "activation"),
        ("layers[0].attn.bias", KeyError, "no bias"),
        ("layers[0].heads[4]", IndexError, "layer 0 has 4, so heads are heads\\[0\\] to heads\\[3\\]"),
        ("layers[3]", IndexError, "layers\\[0\\] to layers\\[2\\]"),
        ("layers[0].mlp.router", KeyError, "no router"),
        ("model.model.norm.bias", KeyError, "no bias"),
    ],
)
def test_mistakes(text, error, message):
    model = zoo.build("llama")
    with pytest.raises(error, match=message):
        Atlas.of(model).resolve(text)


# -- selections --------------------------------------------------------------------------------------------------------


def test_union_of_selections():
    shapes = {"a": (6, 2), "b": (4,)}
    one = Selection.of({"a": (0, ((0, 2),))}, shapes)
    other = Selection.of({"a": (0, ((1, 4),)), "b": None}, shapes)
    both = one | other
    assert dict(both.parts) == {"a": (0, ((0, 4),)), "b": None} and both.numel() == 12
    assert list(both) == ["a", "b"] and len(both) == 2 and "b" in both and "c" not in both
    whole = both | Selection.of({"a": (0, ((4, 6),))}, shapes)
    assert whole == Selection.of({"a": None, "b": None}, shapes)
    assert hash(whole) == hash(Selection.of({"b": None, "a": None}, shapes))
    with pytest.raises(ValueError, match="axis 0 and along axis 1"):
        _ = one | Selection.of({"a": (1, ((0, 1),))}, shapes)


def test_masks_cost_one_axis():
    huge = Selection.of({"w": (0, ((5, 7),))}, {"w": (1_000_000, 4096)})
    mask = huge.masks()["w"]
    assert mask is not None and mask.shape == (1_000_000, 4096) and mask.untyped_storage().nbytes() == 1_000_000
    assert huge.numel() == 2 * 4096 and mask[5:7].all() and not mask[4].any() and not mask[7].any()


# -- one site after another -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "layers[:].heads[:]",
        "layers[1:].attn.k",
        "layers[0,2].neurons[3:5]",
        "embed",
        "full",
        "layers[-1].groups[:].v",
        "model.model.layers[:].mlp.up_proj",
        "model.model.layers[:].mlp.up_proj.weight",
    ],
)
def test_a_path_is_the_union_of_its_single_places(text):
    model = zoo.build("llama")
    atlas = Atlas.of(model)
    places = atlas.split(text)
    assert all(place.concrete for place in places) and len(set(places)) == len(places)
    assert union(atlas, *places) == atlas.resolve(text)
    assert [place for one in places for place in atlas.split(one)] == places


def test_a_parameter_by_its_native_path_is_one_place():
    model = zoo.build("gpt_neox")
    model.sinks = torch.nn.Parameter(torch.zeros(3))
    atlas = Atlas.of(model)
    assert [str(place) for place in atlas.split("model.sinks")] == ["model.sinks"]
    assert atlas.resolve("model.sinks").names == ("sinks",)
