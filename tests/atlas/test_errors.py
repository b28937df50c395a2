"""Mistakes are answered: what was found, where, and what to write instead."""

from __future__ import annotations

import pytest
from torch import nn

import zoo
from nnsplice.atlas import Atlas
from nnsplice.errors import OutOfRange, RefusedPlace, UnknownPath, UnrecognisedModel
from nnsplice.paths import parse_path

_MODELS: dict[str, nn.Module] = {}


def expand(family: str, text: str):
    if family not in _MODELS:
        _MODELS[family] = zoo.build(family)
    return Atlas.of(_MODELS[family]).expand(parse_path(text))


def test_the_whole_message():
    with pytest.raises(OutOfRange) as caught:
        expand("gpt2", "model.transformer.h[12].output")
    assert str(caught.value) == (
        "model.transformer.h[12] is past the last layer; this model has 3, so layers are h[0] to h[2]\n"
        "    model.transformer.h[12].output\n"
        "                      ^"
    )
    with pytest.raises(UnknownPath) as caught:
        expand("gpt2", "model.transformer.h[0].atn.c_atn.output")
    assert str(caught.value) == (
        "model.transformer.h[0] has no part atn\n"
        "    model.transformer.h[0].atn.c_atn.output\n"
        "                           ^\n"
        "  expected: attn, ln_1, ln_2, mlp"
    )


@pytest.mark.parametrize(
    ("family", "text", "error", "parts"),
    [
        ("gpt2", "layers[3].output", OutOfRange, ["past the last layer", "layers[0] to layers[2]"]),
        ("gpt2", "layers[-4].output", OutOfRange, ["before the first layer"]),
        ("gpt2", "layers[0,7].output", OutOfRange, ["layers[7]", "past the last layer"]),
        ("gpt2", "layers[5:].output", OutOfRange, ["layers[5:] selects nothing", "3 layers"]),
        (
            "gpt2",
            "layers[1].heads[4].output",
            OutOfRange,
            ["layers[1].heads[4]", "layer 1 has 4", "heads[0] to heads[3]"],
        ),
        ("gpt2", "layers[1].heads[2:2].output", OutOfRange, ["selects nothing"]),
        ("llama", "layers[1].groups[2].k", OutOfRange, ["layer 1 has 2", "groups[0] to groups[1]"]),
        ("gpt2", "layers[1].neurons[64].output", OutOfRange, ["neurons[0] to neurons[63]"]),
        ("mixtral", "layers[1].experts[4].output", OutOfRange, ["experts[0] to experts[3]"]),
        ("t5", "encoder.layers[3].output", OutOfRange, ["the encoder has 3"]),
        ("gptj", "layers[0].mid", RefusedPlace, ["parallel", "layers[0].input"]),
        ("falcon", "layers[0].mid", RefusedPlace, ["parallel"]),
        (
            "granite",
            "layers[0].attn.output",
            RefusedPlace,
            ["by 0.5 in code", "model.model.layers[0].self_attn.output"],
        ),
        ("granite", "layers[0].mlp.output", RefusedPlace, ["by 0.5 in code", "model.model.layers[0].mlp.output"]),
        ("llama", "layers[0].groups[0]", RefusedPlace, ["a group has no output", "layers[0].groups[0].v"]),
        ("llama", "layers[0].heads[3].k", RefusedPlace, ["head 3 reads group 1", "layers[0].groups[1].k"]),
        ("gpt2", "model.transformer.h.output", RefusedPlace, ["never called", "model.transformer.h[:].output"]),
        ("bloom", "layers[0].attn.k.output", RefusedPlace, ["layers[0].groups[:].k"]),
        ("mixtral", "layers[0].neurons[0].output", RefusedPlace, ["mixture of experts", "layers[0].experts[0]"]),
        ("mixtral", "layers[0].mlp.up.output", UnknownPath, ["no up", "router"]),
        ("gpt2", "layers[0].mlp.gate.output", UnknownPath, ["no gate", "up, down"]),
        ("gpt2", "layers[0].experts[0].output", UnknownPath, ["its MLP is dense"]),
        ("gpt2", "encoder.layers[0].output", UnknownPath, ["one tower", "write: layers[0].output"]),
        ("bert", "final_norm.output", UnknownPath, ["no final_norm"]),
        ("gpt2", "model.transfomer.h[0].output", UnknownPath, ["model has no part transfomer", "transformer"]),
        ("gpt2", "model.transformer.wte[0].output[1]", UnknownPath, ["is no list of modules"]),
        ("gpt2", "model.transformer.wte.weight", ValueError, ["names a parameter"]),
        ("gpt2", "layers[0].attn.weight", ValueError, ["names parameters"]),
        ("gpt2", "full", ValueError, ["names parameters"]),
    ],
)
def test_messages(family, text, error, parts):
    with pytest.raises(error) as caught:
        expand(family, text)
    assert [part for part in parts if part not in str(caught.value)] == []


@pytest.mark.parametrize("text", ["layers[0].output", "embed.output", "layers[0].heads[1].q", "encoder.layers[0]"])
def test_a_model_whose_parts_are_unknown(text):
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    atlas = Atlas.of(model)
    with pytest.raises(UnrecognisedModel, match="q_proj") as caught:
        atlas.expand(parse_path(text))
    assert "down_proj" in str(caught.value) and "model." in str(caught.value)
    with pytest.raises(UnrecognisedModel):
        atlas.resolve(text)


def test_native_paths_need_no_recognition():
    model = nn.Module()
    model.stages = nn.ModuleList([nn.ModuleList([nn.Linear(2, 2) for _ in range(3)]) for _ in range(2)])
    model.act = nn.ReLU()
    model.again = model.stages[0][1]  # pyright: ignore[reportIndexIssue]
    atlas = Atlas.of(model)
    assert atlas.expand("model.act.output")[0].site == atlas.expand("model.act")[0].site
    (shared,) = atlas.expand("model.again.output")
    assert shared.site.module == "stages.0.1"  # pyright: ignore[reportAttributeAccessIssue]
    assert str(shared) == "model.again.output"
    with pytest.raises(RefusedPlace, match="never called"):
        atlas.expand("model.stages[0].output")
    assert len(atlas.resolve("full")) == 12 and len(atlas.resolve("model.stages[:]")) == 12
    assert str(atlas.locate("stages.1.2.bias")) == "model.stages[1].2.bias"


def test_indices_come_out_in_order_and_once():
    assert [str(p) for p in expand("gpt2", "layers[2,0,-1].output[-1]")] == [
        "layers[0].output[-1]",
        "layers[2].output[-1]",
    ]
    assert [str(p) for p in expand("gpt2", "layers[::-1].output")] == [f"layers[{i}].output" for i in range(3)]
    assert [str(p) for p in expand("gpt2", "layers[0,1].heads[-1,0]")] == [
        f"layers[{i}].heads[{j}].output" for i in (0, 1) for j in (0, 3)
    ]
    assert [str(p) for p in expand("gpt2", "model.transformer.h[1:].attn.output[0][2]")] == [
        "model.transformer.h[1].attn.output[0][2]",
        "model.transformer.h[2].attn.output[0][2]",
    ]


def test_towers_in_texts_stay_as_written():
    assert [str(p) for p in expand("t5", "encoder.layers[-1]")] == ["encoder.layers[2].output"]
    assert expand("t5", "decoder.layers[0]") == expand("t5", "layers[0]")
    assert expand("t5", "encoder.layers[0]") != expand("t5", "layers[0]")
