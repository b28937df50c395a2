"""One kind of checkpoint into another: the converted model says the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from typer.testing import CliRunner

import transformer_lens_like as lens
from nnsplice import checkpoints as ck
from nnsplice.cli import app
from nnsplice.errors import BadArgument, BadType, MapperError, MissingCheckpoint
from zoo import FAMILIES, build, inputs

#: Families that TransformerLens' names are known for.
LENS = ("gpt2", "llama", "qwen2", "qwen3", "gemma2", "mistral", "gpt_neox")

#: Buffers of attention that models once saved.
MASKS = ("bias", "masked_bias")


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.state_dict())


def through(mapper: ck.ModelStateMapper, state: dict[str, Tensor]) -> dict[str, Tensor]:
    made: dict[str, Tensor] = {}
    for group in mapper.state_dependency_groups():
        made |= mapper.apply({name: state[name] for name in group.inputs})
    return made


def logits(model: Any, name: str = "gpt2") -> Tensor:
    with torch.no_grad():
        return model(**inputs(name)).logits


def into(model: Any, state: dict[str, Tensor]) -> Any:
    """A model with these states, of which each one of its own is there."""
    fresh = type(model)(model.config).to(next(iter(state.values())).dtype).eval()
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.fill_(torch.nan)
    fresh.load_state_dict(state, strict=False)
    fresh.tie_weights()
    return fresh


# -- TransformerLens ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LENS)
def test_names_of_transformerlens_mean_the_same_model(name: str):
    model = build(name).double()
    between = ck.mapper_between(model, "tl")
    assert not between.underived and not between.unused
    state = through(between, state_of(model))
    assert not any(tensor.isnan().any() for tensor in state.values())
    expected = logits(model)
    made = lens.run(state, inputs(name)["input_ids"], model.config)
    # transformers works out rotary angles and norms in float32.
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.05


@pytest.mark.parametrize("name", LENS)
def test_there_and_back_is_the_same_model(name: str, tmp_path: Path):
    model = build(name)
    model.save_pretrained(tmp_path / "hf", max_shard_size="10KB")
    ck.convert(tmp_path / "hf", tmp_path / "tl", ck.mapper_between(tmp_path / "hf", "tl"), show_progress=False)
    back = ck.mapper_between(tmp_path / "tl", "hf")
    assert not back.underived
    # Biases that the family does not have were zeros, and gpt2's unembedding is its embedding.
    zeros = [name for name in back.unused if name != "unembed.W_U"]
    assert all(not ck.Checkpoint.open(tmp_path / "tl").tensor(name).any() for name in zeros)
    ck.convert(tmp_path / "tl", tmp_path / "back", back, show_progress=False)
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    if name == "gemma2":  # whose norms and embeddings are changed by a formula
        torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(logits(again), logits(model))


def test_shapes_of_transformerlens():
    state = through(ck.mapper_between(build("llama"), "tl"), state_of(build("llama")))
    shapes = {name.removeprefix("blocks.0."): list(t.shape) for name, t in state.items() if ".1." not in name}
    assert shapes["attn.W_Q"] == [4, 16, 6] and shapes["attn._W_K"] == [2, 16, 6] and shapes["attn.W_O"] == [4, 6, 16]
    assert shapes["attn.b_Q"] == [4, 6] and shapes["attn._b_V"] == [2, 6] and shapes["attn.b_O"] == [16]
    assert shapes["mlp.W_gate"] == shapes["mlp.W_in"] == [16, 32] and shapes["mlp.W_out"] == [32, 16]
    assert shapes["embed.W_E"] == [64, 16] and shapes["unembed.W_U"] == [16, 64] and shapes["ln_final.w"] == [16]


# -- families of transformers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_to_itself_is_all_there_bit_for_bit(name: str):
    model = build(name)
    between = ck.mapper_between(model, model.config)
    assert not between.underived and not between.unused
    state = state_of(model)
    made = through(between, state)
    assert all(torch.equal(made[n], state[n]) for n in made)
    assert logits(into(model, made), name).isfinite().all() or name in ("t5", "bart", "bert")


def test_fused_and_separate_projections():
    # Phi-3 computes what Mistral does, with q, k, v and gate, up in one matrix each.
    fused = build("phi3")
    options: dict[str, Any] = {"head_dim": None, "sliding_window": None, "rms_norm_eps": fused.config.rms_norm_eps}
    split = build("mistral", **options)
    for source, target in ((fused, split), (split, fused)):
        between = ck.mapper_between(source, target)
        assert not between.underived and not between.unused
        fresh = into(target, through(between, state_of(source)))
        torch.testing.assert_close(logits(fresh), logits(source), rtol=1e-4, atol=1e-5)


def test_turned_matrices_and_heads_by_turns():
    # GPT-BigCode computes what GPT-2 does, with plain matrices and q, k, v of one head side by side.
    gpt2, bigcode = build("gpt2", activation_function="gelu_pytorch_tanh"), build("gpt_bigcode_mha")
    for source, target in ((gpt2, bigcode), (bigcode, gpt2)):
        between = ck.mapper_between(source, target)
        assert not between.underived and not between.unused
        fresh = into(target, through(between, state_of(source)))
        torch.testing.assert_close(logits(fresh), logits(source), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_one_by_one_and_all_in_one(name: str, tmp_path: Path):
    model = build(name)
    model.save_pretrained(tmp_path / "hf")  # transformers writes experts one by one, and holds them in one
    between = ck.mapper_between(tmp_path / "hf", model)
    assert not between.underived and not between.unused
    blank = build(name, seed=1)
    assert not torch.equal(logits(blank), logits(model))
    ck.load_model_state(tmp_path / "hf", between, "cpu", blank, show_progress=False)
    assert torch.equal(logits(blank), logits(model))
    # And back, from the model's tensors to the names of the files.
    back = ck.mapper_between(model, tmp_path / "hf")
    assert not back.underived and not back.unused
    made, stored = through(back, state_of(model)), ck.Checkpoint.open(tmp_path / "hf")
    assert made.keys() == set(stored) and all(torch.equal(made[n], stored.tensor(n)) for n in made)


def test_buffers_that_are_saved_come_along(tmp_path: Path):
    # GLM's routers keep the bias that balances their experts in a buffer; without it the model takes other experts.
    model = build("mixtral")
    model.model.layers[1].mlp.gate.register_buffer("correction", torch.arange(4.0))
    model.model.layers[1].mlp.gate.register_buffer("scratch", torch.ones(2), persistent=False)
    name = "model.layers.1.mlp.gate.correction"
    between = ck.mapper_between(model, model)
    assert not between.underived and not between.unused
    assert torch.equal(through(between, state_of(model))[name], torch.arange(4.0))
    assert list(ck.mapper_between(build("mixtral"), model).underived) == [name]


def test_masks_that_older_files_hold_are_no_weights(tmp_path: Path):
    # As the hub's GPT-2 and GPT-J have them. They come first in the file, and their type is not the weights'.
    model = build("gptj")
    ck.save_model_state(tmp_path / "plain", ck.identity_mapper_from_module(model), model, show_progress=False)
    masks = [(f"transformer.h.{i}.attn.{word}", torch.ones(2, dtype=torch.bool)) for i in range(3) for word in MASKS]
    states = [*masks, *ck.read_model_state(tmp_path / "plain", ck.identity_mapper_from_module(model), "cpu", False)]
    every = ck.Parallel([ck.Identity(name) for name, _ in states])
    ck.write_model_state_local(tmp_path / "old", every, states, show_progress=False)
    model.config.save_pretrained(tmp_path / "old")
    assert ck.mapper_between(tmp_path / "old", "hf").unused == ()
    between = ck.mapper_between(tmp_path / "old", "tl")
    assert between.unused == () and not between.underived
    made = dict(ck.read_model_state(tmp_path / "old", between, "cpu", False))
    assert {tensor.dtype for tensor in made.values()} == {torch.float32}
    command = ["convert", str(tmp_path / "old"), str(tmp_path / "new"), "--to", "tl"]
    assert CliRunner().invoke(app, command).exit_code == 0


# -- what cannot be derived --------------------------------------------------------------------------------------------


def test_what_cannot_be_derived_is_listed():
    between = ck.mapper_between(build("llama"), build("qwen3"))
    assert set(between.underived) == {f"model.layers.{i}.self_attn.{n}_norm.weight" for i in range(3) for n in "qk"}
    assert "q_norm" in between.underived["model.layers.0.self_attn.q_norm.weight"]
    with pytest.raises(MapperError, match="not derived"):
        between.complete()
    with pytest.raises(MapperError, match="not derived"):
        ck.convert("anywhere", "nowhere", between)
    assert "not derived: model.layers.0" in repr(between)
    unused = ck.mapper_between(build("qwen3"), build("llama")).unused
    assert set(unused) == set(between.underived)


@pytest.mark.parametrize(
    ("source", "target", "options", "name", "said"),
    [
        ("llama", "llama", {"num_key_value_heads": 4}, "layers.1.self_attn.k_proj.weight", "[12, 16] in the source"),
        (
            "llama",
            "phi3",
            {"num_key_value_heads": 4},
            "layers.1.self_attn.qkv_proj.weight",
            "attn.k.weight is [12, 16]",
        ),
        ("llama", "mistral", {"vocab_size": 70}, "embed_tokens.weight", "[70, 16] in the target"),
        ("gpt2", "gpt_bigcode_mha", {"n_inner": 32}, "transformer.h.0.mlp.c_fc.weight", "mlp.up.weight is [64, 16]"),
    ],
)
def test_parts_of_another_size_are_listed(source: str, target: str, options: dict[str, Any], name: str, said: str):
    between = ck.mapper_between(build(source), build(target, **options))
    reason = next(reason for full, reason in between.underived.items() if full.endswith(name))
    assert said in reason
    with pytest.raises(MapperError, match="not derived"):
        between.complete()


def test_what_is_not_asked_for_is_dropped_from_a_fused_tensor():
    # Falcon's one matrix holds keys and values too; a target without them takes its queries alone.
    from nnsplice.checkpoints.between.derive import join
    from nnsplice.checkpoints.between.scheme import fused, scheme, single

    qkv = scheme([fused("qkv", ["q", "k", "v"], [((0, 2),), ((2, 3),), ((3, 4),)])])
    between = join(qkv, scheme([single("only.q", "q")]))
    made = through(between, {"qkv": torch.arange(4)})
    assert made.keys() == {"only.q"} and made["only.q"].tolist() == [0, 1]


@pytest.mark.parametrize("one", ["gemma2", "gemma3"])
def test_norms_that_mean_something_else_are_not_taken_for_others(one: str):
    # Gemma multiplies by one plus what is stored.
    between = ck.mapper_between(build(one), build("llama"))
    assert {"model.norm.weight", "model.layers.0.input_layernorm.weight", "model.embed_tokens.weight"} <= set(
        between.underived
    )


def test_experts_are_not_guessed_for_transformerlens():
    between = ck.mapper_between(build("mixtral"), "tl")
    assert not between.underived and any("experts" in name for name in between.unused)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_two_towers_have_no_names_there(name: str):
    with pytest.raises(MapperError, match="two towers"):
        ck.mapper_between(build(name), "tl")


def test_what_is_no_side(tmp_path: Path):
    for wrong, error in (("nowhere", BadArgument), (3, BadType)):
        with pytest.raises(error):
            ck.mapper_between(build("gpt2"), wrong)
    ck.save_model_state(tmp_path / "ck", ck.Identity("weight"), nn.Linear(2, 2), show_progress=False)
    with pytest.raises(MissingCheckpoint, match=r"no config\.json"):
        ck.mapper_between(tmp_path / "ck", "tl")


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_goes_there_and_back(tmp_path: Path):
    model = build("llama")
    model.save_pretrained(tmp_path / "hf")
    for source, dest, to in (("hf", "tl", "tl"), ("tl", "back", "hf")):
        done = CliRunner().invoke(app, ["convert", str(tmp_path / source), str(tmp_path / dest), "--to", to, "--quiet"])
        assert done.exit_code == 0, done.output
    assert "blocks.2.attn._W_V" in ck.Checkpoint.open(tmp_path / "tl")
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    assert torch.equal(logits(again), logits(model))


def test_the_command_does_not_leave_out_in_silence(tmp_path: Path):
    build("mixtral").save_pretrained(tmp_path / "hf")
    done = CliRunner().invoke(app, ["convert", str(tmp_path / "hf"), str(tmp_path / "tl"), "--to", "tl", "--quiet"])
    assert done.exit_code == 1 and "experts" in done.output and not (tmp_path / "tl").exists()
