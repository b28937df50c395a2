"""Sites against what torch hooks really see: the additions of the stream, heads, projections, patterns."""

from __future__ import annotations

import pytest
import torch

import zoo
from atlas.helpers import Recorded, close, record, sites, value_at
from nnsplice.atlas import Atlas, Site
from nnsplice.paths import parse_path

PARALLEL = {"gptj", "gpt_neox", "falcon", "falcon_mqa", "phi", "codegen"}
POST_NORM = {"bert", "bart"}
CROSS = {"t5", "bart"}


@pytest.fixture(scope="module", params=zoo.FAMILIES)
def run(request):
    recorded = Recorded(request.param, eager=True)
    recorded.name = request.param
    return recorded


def towers(run):
    return [f"{name}." if len(run.atlas.towers) > 1 else "" for name in run.atlas.towers]


def test_branches_add_up_to_the_stream(run):
    for tower in towers(run):
        for layer in range(zoo.LAYERS):
            at = f"{tower}layers[{layer}]"
            before, attn, mlp, after = (run(f"{at}.{v}") for v in ("input", "attn.output", "mlp.output", "output"))
            if run.name in PARALLEL:
                assert close(before + attn + mlp, after)
                with pytest.raises(ValueError, match="parallel"):
                    run(f"{at}.mid")
                continue
            mid = run(f"{at}.mid")
            block = run.model.get_submodule(run.site(f"{at}.output").module)
            if run.name in POST_NORM:
                norm = block.attention.output.LayerNorm if run.name == "bert" else block.self_attn_layer_norm
                last = block.output.LayerNorm if run.name == "bert" else block.final_layer_norm
                between = norm(before + attn)
                assert close(last(mid + mlp), after)
            else:
                between = before + attn
                assert close(mid + mlp, after)
            if tower == "decoder." and run.name in CROSS:
                name = run.site(f"{at}.output").module
                if run.name == "t5":
                    between = between + run.values[f"{name}.layer.1.EncDecAttention", "output", 0][0]
                else:
                    cross = run.values[f"{name}.encoder_attn", "output", 0][0]
                    between = block.encoder_attn_layer_norm(between + cross)
            assert close(between, mid)


def test_the_laws_would_notice_the_wrong_norm():
    """Negative control: LLaMA's post_attention_layernorm is no post norm, and its output is not what is added."""
    run = Recorded("llama")
    wrong = run.values["model.layers.0.post_attention_layernorm", "output", 0]
    assert not close(run("layers[0].input") + wrong, run("layers[0].mid"), 1e-3)
    gemma = Recorded("gemma2")
    wrong = gemma.values["model.layers.0.self_attn", "output", 0][0]
    assert not close(gemma("layers[0].input") + wrong, gemma("layers[0].mid"), 1e-3)


def test_layers_follow_each_other(run):
    for tower in towers(run):
        assert close(run(f"{tower}embed.output"), run(f"{tower}layers[0].input"), 0)
        for layer in range(zoo.LAYERS - 1):
            assert close(run(f"{tower}layers[{layer}].output"), run(f"{tower}layers[{layer + 1}].input"), 0)


def test_heads_rebuild_the_attention(run):
    """A head's slice is its probabilities times the values of its group: pattern, groups and columns in one law."""
    for tower in towers(run):
        for layer in range(zoo.LAYERS):
            at = f"{tower}layers[{layer}]"
            heads, values = run.all(f"{at}.heads[:].output"), run.all(f"{at}.groups[:].v")
            patterns = run.all(f"{at}.heads[:].pattern")
            assert len(heads) == len(patterns) and len(heads) % len(values) == 0
            for j, (head, pattern) in enumerate(zip(heads, patterns, strict=True)):
                assert close(pattern @ values[j * len(values) // len(heads)], head)
            o = run.model.get_submodule(run.site(f"{at}.attn.o.output").module)
            weight = o.weight if type(o).__name__ == "Conv1D" else o.weight.T
            whole = torch.cat(heads, -1) @ weight + (0 if o.bias is None else o.bias)
            assert close(whole, run(f"{at}.attn.o.output"))


def test_pattern_rows_are_probabilities(run):
    for pattern in run.all("layers[:].heads[:].pattern"):
        assert torch.allclose(pattern.sum(-1), torch.ones(()).double(), atol=1e-6)


@pytest.mark.parametrize("name", ["gpt2", "bert", "gpt_bigcode", "gpt_bigcode_mha"])
def test_queries_and_keys_make_the_pattern(name):
    """Where nothing happens to q and k on the way, their products are the scores."""
    run = Recorded(name, eager=True)
    keys = run.all("layers[1].groups[:].k")
    queries = run.all("layers[1].heads[:].q")
    for j, pattern in enumerate(run.all("layers[1].heads[:].pattern")):
        scores = queries[j] @ keys[j * len(keys) // len(queries)].mT / queries[j].shape[-1] ** 0.5
        if name != "bert":
            scores = scores.masked_fill(~torch.ones(5, 5).tril().bool(), float("-inf"))
        assert close(scores.softmax(-1), pattern, 1e-6)  # transformers takes the softmax in float32
        swapped = (queries[j] @ keys[j * len(keys) // len(queries)].mT / 3).softmax(-1)
        assert not close(swapped, pattern, 1e-3)


def test_projections_partition_their_axis(run):
    """The columns of all heads and groups cover every column of q, k and v once."""
    for tower in towers(run):
        seen: dict[str, list[int]] = {}
        for role in ("heads[:].q", "groups[:].k", "groups[:].v"):
            for site in sites(run.atlas, f"{tower}layers[1].{role}"):
                assert site.columns is not None
                seen.setdefault(site.module, []).extend(range(*site.columns))
        assert len(seen) in (1, 3)
        for module, columns in seen.items():
            assert sorted(columns) == list(range(run.values[module, "output", 0].shape[-1]))


def test_neurons_are_the_columns_before_the_down_projection(run):
    block = run.atlas.towers["decoder"].blocks[0]
    if block.is_sparse:
        with pytest.raises(ValueError, match="mixture of experts"):
            run.all("layers[0].neurons[:]")
        return
    neurons = torch.cat(run.all("layers[0].neurons[:].output"), -1)
    assert close(neurons, run.values[block.down, "input", 0].reshape(neurons.shape), 0)
    down = run.model.get_submodule(block.down)
    weight = down.weight if type(down).__name__ == "Conv1D" else down.weight.T
    assert close(neurons @ weight + (0 if down.bias is None else down.bias), run("layers[0].mlp.down.output"))


@pytest.mark.parametrize("name", ["llama", "phi3", "t5"])
def test_gate_and_up_multiply_into_neurons(name):
    run = Recorded("t5", feed_forward_proj="gated-gelu") if name == "t5" else Recorded(name)
    act = torch.nn.SiLU() if name != "t5" else torch.nn.GELU(approximate="tanh")
    neurons = torch.cat(run.all("layers[2].neurons[:].output"), -1)
    assert close(act(run("layers[2].mlp.gate.output")) * run("layers[2].mlp.up.output"), neurons)


@pytest.mark.parametrize("name", ["phi3", "falcon_mqa", "gpt2", "llama", "gpt_bigcode"])
def test_whole_projections(name):
    run = Recorded(name)
    for role, counted in (("q", "heads"), ("k", "groups"), ("v", "groups")):
        assert close(torch.cat(run.all(f"layers[1].{counted}[:].{role}"), -1), run(f"layers[1].attn.{role}.output"), 0)


@pytest.mark.parametrize("name", ["gpt_neox", "bloom", "falcon", "gpt_bigcode_mha", "codegen"])
def test_alternating_projections_are_not_one_stretch(name):
    atlas = Atlas.of(zoo.build(name))
    with pytest.raises(ValueError, match=r"heads\[:\]\.q"):
        atlas.expand(parse_path("layers[1].attn.q.output"))


def test_experts_and_router():
    run = Recorded("mixtral")
    assert sites(run.atlas, "layers[1].experts[:].output") == [
        Site("model.layers.1.mlp.experts", "input", kind="expert", index=e) for e in range(4)
    ]
    assert run.site("layers[1].mlp.router.output") == Site("model.layers.1.mlp.gate")
    with pytest.raises(KeyError, match="no experts"):
        Recorded("llama").site("layers[0].experts[0]")


def test_ends_of_the_model(run):
    logits = run.values["", "output", 0].logits
    scaled = run("unembed.output")
    if run.name == "gemma2":  # its logits are capped after the unembedding
        scaled = 30 * torch.tanh(scaled / 30)
    assert close(scaled, logits, 1e-6)
    if run.name in POST_NORM:
        with pytest.raises(KeyError, match="final_norm"):
            run("final_norm.output")
        return
    norm = run.model.get_submodule(run.site("final_norm.output").module)
    assert close(norm(run(f"layers[{zoo.LAYERS - 1}].output")), run("final_norm.output"))


@pytest.mark.parametrize(
    ("name", "native", "portable"),
    [
        ("gpt2", "model.transformer.h[-1].output", "layers[2].output"),
        ("gpt2", "model.transformer.h[1].attn.output", "layers[1].attn.output"),
        ("gpt_neo", "model.transformer.h[1].attn.output[0][-1]", "layers[1].attn.output[-1]"),
        ("llama", "model.model.layers[0].self_attn.output[0][-1]", "layers[0].attn.output[-1]"),
        ("bloom", "model.transformer.h[0].mlp.dense_4h_to_h.output", "layers[0].mlp.output"),
        ("bert", "model.bert.encoder.layer[1].attention.output.dense.output", "layers[1].attn.output"),
        ("t5", "model.encoder.block[0].layer[1].input", "encoder.layers[0].mid"),
        ("t5", "model.lm_head.output", "unembed.output"),
    ],
)
def test_one_place_one_identity(name, native, portable):
    atlas = Atlas.of(zoo.build(name))
    (one,), (other,) = (atlas.expand(parse_path(text)) for text in (native, portable))
    assert one == other and hash(one) == hash(other) and str(one) != str(other)


def test_shared_block_is_one_module_called_often():
    run = Recorded("albert", eager=True)
    layers = sites(run.atlas, "layers[:].output")
    assert [site.occurrence for site in layers] == [0, 1, 2] and len({site.module for site in layers}) == 1
    assert close(run("layers[0].output"), run("layers[1].input"), 0)
    assert not close(run("layers[0].output"), run("layers[1].output"), 1e-3)
    inner = run.model.albert.encoder.albert_layer_groups[0].albert_layers[0]
    for i in range(3):
        mid = inner.attention.LayerNorm(run(f"layers[{i}].input") + run(f"layers[{i}].attn.output"))
        assert close(mid, run(f"layers[{i}].mid"))
        assert close(inner.full_layer_layer_norm(mid + run(f"layers[{i}].mlp.output")), run(f"layers[{i}].output"))


def test_towers_of_values():
    atlas = Atlas.of(zoo.build("t5"))

    def tower(text):
        return sites(atlas, text)[0].tower

    assert tower("encoder.layers[0].output") == "encoder"
    assert tower("layers[0].output") == tower("decoder.layers[0].output") == "decoder"
    assert tower("model.encoder.block[0].output") == "encoder"
    assert tower("model.decoder.block[0].layer[1].EncDecAttention.k.output") == "encoder"
    assert tower("model.decoder.block[0].layer[1].EncDecAttention.q.output") == "decoder"
    bert = sites(Atlas.of(zoo.build("bert")), "layers[0].output")[0]
    assert bert.tower == "decoder"


@pytest.mark.parametrize("name", ["stablelm", "gpt_neox"])
def test_the_parallel_flag_is_read(name):
    """The same module names run in sequence or in parallel; only the flag tells."""
    for flag in (True, False):
        run = Recorded(name, use_parallel_residual=flag)
        assert run.atlas.towers["decoder"].blocks[0].parallel is flag
        total = run("layers[1].input") + run("layers[1].attn.output") + run("layers[1].mlp.output")
        assert close(total, run("layers[1].output"))


def test_opt_with_norms_after_the_branches():
    run = Recorded("opt", do_layer_norm_before=False)
    block = run.model.model.decoder.layers[1]
    mid = block.self_attn_layer_norm(run("layers[1].input") + run("layers[1].attn.output"))
    assert close(mid, run("layers[1].mid"))
    assert close(block.final_layer_norm(mid + run("layers[1].mlp.output")), run("layers[1].output"))


# -- writing at mid ----------------------------------------------------------------------------------------------------


def with_mid_changed(run, *, in_place):
    """What layer 1 does when something is added where its `mid` is met: (mid as changed, mlp, output)."""
    site = run.site("layers[1].mid")
    module = run.model.get_submodule(site.module)
    delta = torch.linspace(-1, 1, 16).double()

    def changed(value):
        tensor = value[0] if isinstance(value, tuple) else value
        new = tensor.add_(delta) if in_place else tensor + delta
        return (new, *value[1:]) if isinstance(value, tuple) else new

    if site.end == "input":
        handle = module.register_forward_pre_hook(lambda _, args: (changed(args[0]), *args[1:]))
    else:
        handle = module.register_forward_hook(lambda _, args, out: changed(out))
    try:
        values = record(run.model, zoo.inputs(run.name))
    finally:
        handle.remove()
    mlp, out = (value_at(values, run.site(f"layers[1].{place}"), 2) for place in ("mlp.output", "output"))
    return run("layers[1].mid") + delta, mlp, out


@pytest.mark.parametrize("name", [n for n in zoo.FAMILIES if n not in PARALLEL | POST_NORM])
def test_the_kind_of_mid_says_what_a_write_must_reach(name):
    """Where mid is `plain`, replacing it moves the whole stream; where it is `stream`, that misses the skip path."""
    run = Recorded(name)
    run.name = name
    mid, mlp, out = with_mid_changed(run, in_place=False)
    kind = run.site("layers[1].mid").kind
    assert close(mid + mlp, out) is (kind == "plain")
    assert (kind == "plain") is (name in ("bloom", "t5"))
    if kind == "stream":
        run = Recorded(name)
        run.name = name
        mid, mlp, out = with_mid_changed(run, in_place=True)
        assert close(mid + mlp, out)
