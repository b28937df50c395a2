"""Parts are found by names and shapes: listed families, and decoders that nobody listed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import zoo
from atlas.helpers import record, sites, value_at
from nnsplice.atlas import Atlas, Layout, Site


@pytest.mark.parametrize(
    ("name", "prefix", "embed", "final_norm", "unembed"),
    [
        ("gpt2", "transformer", "transformer.wte", "transformer.ln_f", "lm_head"),
        ("gpt_neox", "gpt_neox", "gpt_neox.embed_in", "gpt_neox.final_layer_norm", "lm_head"),
        ("bloom", "transformer", "transformer.word_embeddings", "transformer.ln_f", "lm_head"),
        ("opt", "model.decoder", "model.decoder.embed_tokens", "model.decoder.final_layer_norm", "lm_head"),
        ("llama", "model", "model.embed_tokens", "model.norm", "lm_head"),
        ("phi", "model", "model.embed_tokens", "model.final_layernorm", "lm_head"),
        ("bert", "bert.encoder", "bert.embeddings.word_embeddings", None, "cls.predictions.decoder"),
        ("t5", "decoder", "decoder.embed_tokens", "decoder.final_layer_norm", "lm_head"),
        ("bart", "model.decoder", "model.decoder.embed_tokens", None, "lm_head"),
    ],
)
def test_ends_of_towers(name, prefix, embed, final_norm, unembed):
    tower = Atlas.of(zoo.build(name)).towers["decoder"]
    assert (tower.prefix, tower.embed, tower.final_norm, tower.unembed) == (prefix, embed, final_norm, unembed)
    assert tower.n_layers == zoo.LAYERS and [block.index for block in tower.blocks] == [0, 1, 2]


@pytest.mark.parametrize(
    ("name", "kind", "n_heads", "n_kv", "head_dim"),
    [
        ("gpt2", "concat", 4, 4, 4),
        ("gptj", "separate", 4, 4, 4),
        ("bloom", "grouped", 4, 4, 4),
        ("falcon", "grouped", 4, 2, 4),
        ("falcon_mqa", "grouped", 4, 1, 4),
        ("gpt_bigcode", "concat", 4, 1, 4),
        ("gpt_bigcode_mha", "interleaved", 4, 4, 4),
        ("codegen", "quartered", 8, 8, 4),
        ("phi3", "concat", 4, 2, 4),
        ("llama", "separate", 4, 2, 6),
        ("gemma2", "separate", 4, 2, 6),
        ("t5", "separate", 4, 4, 6),
    ],
)
def test_layouts_of_families(name, kind, n_heads, n_kv, head_dim):
    atlas = Atlas.of(zoo.build(name))
    for tower in atlas.towers.values():
        assert {block.layout for block in tower.blocks} == {Layout(kind, n_heads, n_kv, head_dim)}


def test_towers_of_models_with_two():
    for name in zoo.FAMILIES:
        assert set(Atlas.of(zoo.build(name)).towers) == ({"encoder", "decoder"} if name in zoo.SEQ2SEQ else {"decoder"})


# -- decoders that nobody listed ---------------------------------------------------------------------------------------


def attend(q, k, v, heads, groups):
    rows, tokens, _ = q.shape
    q, k, v = (x.view(rows, tokens, n, -1).transpose(1, 2) for x, n in ((q, heads), (k, groups), (v, groups)))
    k, v = (x.repeat_interleave(heads // groups, dim=1) for x in (k, v))
    out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    return out.transpose(1, 2).reshape(rows, tokens, -1)


class LlamaAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 6
        self.q_proj, self.k_proj = nn.Linear(8, 18), nn.Linear(8, 9)
        self.v_proj, self.o_proj = nn.Linear(8, 9), nn.Linear(18, 8)

    def forward(self, x):
        return self.o_proj(attend(self.q_proj(x), self.k_proj(x), self.v_proj(x), 6, 3))


class FusedAttention(nn.Module):
    """GPT-NeoX's name for the fused layer, OPT's for the output projection."""

    def __init__(self) -> None:
        super().__init__()
        self.n_head = 4
        self.query_key_value, self.out_proj = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        q, k, v = self.query_key_value(x).view(*x.shape[:2], 4, 3, 2).unbind(3)
        return self.out_proj(attend(q.flatten(2), k.flatten(2), v.flatten(2), 4, 4))


class GatedMLP(nn.Module):
    def __init__(self, names=("gate_proj", "up_proj", "down_proj")) -> None:
        super().__init__()
        self.names = names
        for name, shape in zip(names, ((8, 20), (8, 20), (20, 8)), strict=True):
            setattr(self, name, nn.Linear(*shape))

    def forward(self, x):
        gate, up, down = (getattr(self, name) for name in self.names)
        return down(nn.functional.silu(gate(x)) * up(x))


class Block(nn.Module):
    def __init__(self, names, attn, mlp) -> None:
        super().__init__()
        self.names = names
        for name, module in zip(names, (nn.LayerNorm(8), attn, nn.LayerNorm(8), mlp), strict=True):
            setattr(self, name, module)

    def forward(self, x):
        norm_1, attn, norm_2, mlp = (getattr(self, name) for name in self.names)
        x = x + attn(norm_1(x))
        return x + mlp(norm_2(x))


class Decoder(nn.Module):
    def __init__(self, names, stack, blocks) -> None:
        super().__init__()
        torch.manual_seed(0)
        embed, norm, head = names
        self.names, self.stack = names, stack
        setattr(self, embed, nn.Embedding(11, 8))
        setattr(self, stack, nn.ModuleList(blocks))
        setattr(self, norm, nn.LayerNorm(8))
        setattr(self, head, nn.Linear(8, 11, bias=False))

    def forward(self, tokens):
        embed, norm, head = (getattr(self, name) for name in self.names)
        x = embed(tokens)
        for block in getattr(self, self.stack):
            x = block(x)
        return head(norm(x))


def llama_like() -> Decoder:
    names = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
    blocks = [Block(names, LlamaAttention(), GatedMLP()) for _ in range(4)]
    return Decoder(("embed_tokens", "norm", "lm_head"), "layers", blocks)


def mixed() -> Decoder:
    names = ("norm1", "mixer", "norm2", "feed_forward")
    blocks = [Block(names, FusedAttention(), GatedMLP(("w1", "w3", "w2"))) for _ in range(2)]
    return Decoder(("tok_embeddings", "ln_f", "unembed"), "stages", blocks)


@pytest.mark.parametrize(("build", "n_heads", "n_kv", "head_dim"), [(llama_like, 6, 3, 3), (mixed, 4, 4, 2)])
def test_a_decoder_that_nobody_listed(build, n_heads, n_kv, head_dim):
    model = build()
    atlas = Atlas.of(model)
    tower = atlas.towers["decoder"]
    block = tower.blocks[-1]
    assert (block.n_heads, block.n_kv, block.head_dim, block.parallel) == (n_heads, n_kv, head_dim, False)
    assert tower.embed == model.names[0] and tower.final_norm == model.names[1] and tower.unembed == model.names[2]
    assert len(sites(atlas, "layers[:].heads[:].q")) == n_heads * tower.n_layers
    checks = atlas.verify()
    assert {check.role for check in checks} == {"q", "k", "v", "parameters"}
    assert [check for check in checks if not check.ok] == []


def test_the_mixed_one_written_out():
    atlas = Atlas.of(mixed())
    assert sites(atlas, "layers[1].mid") == [Site("stages.1.norm2", "input", kind="stream")]
    assert sites(atlas, "layers[1].mlp.gate.output") == [Site("stages.1.feed_forward.w1")]
    assert sites(atlas, "layers[1].mlp.up.output") == [Site("stages.1.feed_forward.w3")]
    assert sites(atlas, "layers[1].neurons[19].output") == [Site("stages.1.feed_forward.w2", "input", columns=(19, 20))]
    assert sites(atlas, "layers[0].groups[1].v") == [Site("stages.0.mixer.query_key_value", columns=(10, 12))]
    assert str(atlas.locate("stages.1.feed_forward.w3.bias")) == "layers[1].mlp.up"


def test_heads_need_their_number():
    model: Any = llama_like()
    del model.layers[2].self_attn.num_heads
    atlas = Atlas.of(model)
    assert len(sites(atlas, "layers[:].output")) == 4 and len(sites(atlas, "layers[0].heads[:].q")) == 6
    with pytest.raises(ValueError, match="heads of layer 2 cannot be told apart"):
        atlas.expand("layers[2].heads[0]")
    assert [check.ok for check in atlas.verify(layers=[2]) if check.role == "parameters"] == [False]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda attn: setattr(attn, "num_heads", 5),
        lambda attn: setattr(attn, "v_proj", nn.Linear(8, 18)),
        lambda attn: setattr(attn, "q_proj", nn.Linear(8, 36)),
    ],
)
def test_heads_that_do_not_fit_the_shapes_are_refused(spoil):
    """A number that does not fit is better refused than cut wrongly: a query twice as wide may carry a gate."""
    model: Any = llama_like()
    spoil(model.layers[1].self_attn)
    with pytest.raises(ValueError, match="cannot be told apart"):
        Atlas.of(model).expand("layers[1].heads[0].q")


class Experts(nn.Module):
    """Mixtral as it was before its experts were fused."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 3, bias=False)
        self.experts = nn.ModuleList([GatedMLP(("w1", "w3", "w2")) for _ in range(3)])

    def forward(self, x):
        weights = self.gate(x).softmax(-1)
        return torch.stack([weights[..., i, None] * expert(x) for i, expert in enumerate(self.experts)]).sum(0)


def test_experts_that_are_modules():
    names = ("input_layernorm", "self_attn", "post_attention_layernorm", "block_sparse_moe")
    blocks = [Block(names, LlamaAttention(), Experts()) for _ in range(2)]
    atlas = Atlas.of(Decoder(("embed_tokens", "norm", "lm_head"), "layers", blocks))
    block = atlas.towers["decoder"].blocks[1]
    assert block.is_sparse and block.n_experts == 3 and block.router == "layers.1.block_sparse_moe.gate"
    found = atlas.resolve("layers[1].experts[2]")
    assert len(found) == 6 and all(name.startswith("layers.1.block_sparse_moe.experts.2.") for name in found)
    assert str(atlas.locate("layers.1.block_sparse_moe.experts.2.w1.weight")) == "layers[1].experts[2]"
    assert str(atlas.locate("model.layers.1.mlp.experts.gate_up_proj")) == "layers[1].mlp"
    (site,) = sites(atlas, "layers[1].experts[2].output")
    assert (site.module, site.kind, site.index) == ("layers.1.block_sparse_moe", "expert", 2)


def test_one_module_in_several_layers():
    """The same block twice in the list: two layers, two calls of one module."""
    model: Any = llama_like()
    model.layers[2] = model.layers[1]
    atlas = Atlas.of(model)
    assert [(s.module, s.occurrence) for s in sites(atlas, "layers[:].output")] == [
        ("layers.0", 0),
        ("layers.1", 0),
        ("layers.1", 1),
        ("layers.3", 0),
    ]


def test_nothing_to_recognise():
    """Lists of other things are no towers, and one odd block spoils a stack rather than shifting its numbers."""
    assert not Atlas.of(nn.Sequential(*[nn.Linear(2, 2) for _ in range(3)])).towers
    model: Any = llama_like()
    model.layers.insert(1, nn.Identity())
    assert not Atlas.of(model).towers


def test_a_layer_without_attention():
    """Some layers of a hybrid have no heads: they keep their number, and say so when asked."""
    model: Any = llama_like()
    model.layers[1].self_attn = nn.GRU(8, 8)
    atlas = Atlas.of(model)
    assert atlas.towers["decoder"].n_layers == 4 and len(sites(atlas, "layers[:].mlp.output")) == 4
    for text in ("layers[1].heads[0]", "layers[1].attn.output", "layers[1].attn.q"):
        with pytest.raises(KeyError, match="layer 1 has no attention"):
            atlas.expand(text)
        with pytest.raises(KeyError, match="layer 1 has no attention"):
            atlas.resolve(text)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("CohereConfig", {}),
        ("Glm4Config", {"head_dim": 6}),
        ("Exaone4Config", {}),
        ("OlmoConfig", {}),
        ("PersimmonConfig", {}),
        ("GptOssConfig", {"head_dim": 6, "num_local_experts": 4, "num_experts_per_tok": 2}),
        ("ApertusConfig", {}),
        ("AfmoeConfig", {"head_dim": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}),
        ("BioGptConfig", {"num_key_value_heads": None}),
        ("Qwen2MoeConfig", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}),
    ],
)
def test_more_families_hold_what_the_atlas_says(kind, changes):
    """Families outside the zoo: heads, roles and stream are asked of the model itself."""
    import transformers

    shape = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    counts = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "max_position_embeddings": 32}
    settings = {name: value for name, value in {**shape, **counts, **changes}.items() if value is not None}
    config = getattr(transformers, kind)(**settings)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    checks = Atlas.of(model).verify()
    assert {check.role for check in checks} == {"q", "k", "v", "parameters"}
    assert [check for check in checks if not check.ok] == []


# -- families that keep their parts in ways of their own --------------------------------------------------------------


@pytest.mark.parametrize("name", ["xlm", "ctrl", "cpmant", "megatron-bert", "xlm-roberta-xl", "gemma4_text", "afmoe"])
def test_the_stream_leaves_one_layer_as_it_enters_the_next(name):
    from weights import long_table

    model = long_table.build(name)
    atlas = Atlas.of(model)
    values = record(model, {"input_ids": torch.tensor([[3, 10, 17, 24, 31]])})
    for layer in (0, 1):
        (out,), (into,) = (sites(atlas, f"layers[{i}].{end}") for i, end in ((layer, "output"), (layer + 1, "input")))
        assert torch.equal(value_at(values, out), value_at(values, into)), layer
    if name != "gemma4_text":  # gemma4 mixes more into its stream than attention and MLP
        assert sites(atlas, "layers[1].attn.output") and sites(atlas, "layers[1].mlp.output")


def test_a_layer_in_parallel_lists_is_all_of_them():
    from weights import long_table

    atlas = Atlas.of(long_table.build("xlm"))
    parts = ("attentions", "layer_norm1", "ffns", "layer_norm2")
    assert {name.rsplit(".", 3)[0] for name in atlas.resolve("layers[2].attn")} == {"transformer.attentions"}
    assert {name.split(".")[1] for name in atlas.resolve("layers[2]")} == set(parts)
    assert {name.split(".")[2] for name in atlas.resolve("layers[2]")} == {"2"}
    for part, place in zip(parts, ("layers[2].attn", "layers[2]", "layers[2].mlp", "layers[2]"), strict=True):
        assert str(atlas.locate(f"transformer.{part}.2")) == place
    layers = [int(name.split(".")[2]) for name in atlas.resolve("layers[:]")]
    assert layers == sorted(layers)


def test_a_layer_of_one_mlp_has_no_mixer_and_says_which_have() -> None:
    from families.build import build

    atlas = Atlas.of(build("nemotron_h"))
    assert [block.only_mlp for block in atlas.tower().blocks] == [False, True, False, True]
    assert len(list(atlas.expand("layers[0,2].mixer.output"))) == 2
    with pytest.raises(ValueError, match="nothing lies between"):
        atlas.expand("layers[1].mid")
    with pytest.raises(KeyError, match=r"(?s)layer 1 is an MLP alone.*write: layers\[0,2\].mixer.output"):
        atlas.expand("layers[:].mixer")
    attention, state = (next(iter(atlas.expand(f"layers[{n}].mixer.output"))) for n in (2, 0))
    assert (
        attention == next(iter(atlas.expand("layers[2].attn.output"))) and state.site.module == "model.layers.0.mixer"
    )
