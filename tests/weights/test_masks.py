"""The contract of `create_param_masks`, form by form and mistake by mistake."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

import zoo
from nnsplice import weights as w
from nnsplice.errors import NnspliceError
from nnsplice.paths import parse_path
from weights import long_table
from weights.oracle import same


@pytest.fixture(scope="module")
def gpt2() -> Any:
    return zoo.build("gpt2")


@pytest.fixture(scope="module")
def llama() -> Any:
    return zoo.build("llama")


# -- forms -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "portable"),
    [
        ("l1", "layers[1]"),
        ("L1", "layers[1]"),
        ("  l1\n", "layers[1]"),
        ("l1 attn", "layers[1].attn"),
        ("l1 \t ATTN", "layers[1].attn"),
        ("L1 Mlp", "layers[1].mlp"),
        ("l1h2", "layers[1].heads[2]"),
        ("L1 H2", "layers[1].heads[2]"),
        ("l1g1", "layers[1].groups[1]"),
        ("l1 g1", "layers[1].groups[1]"),
        ("Layers[-2].Heads[-2]", "layers[1].heads[2]"),
        ("blocks.1.attn.hook_z", "layers[1].heads[:]"),
        ("model.model.layers[1].self_attn.q_proj", "layers[1].attn.q"),
    ],
)
def test_a_form_is_its_place(llama, text, portable):
    assert same(w.create_param_masks(llama, text), w.create_param_masks(llama, portable))
    assert w.create_param_masks(llama, text)


def test_full_is_every_parameter_whole(gpt2):
    assert w.create_param_masks(gpt2, " Full ") == dict.fromkeys(dict(gpt2.named_parameters()))
    anything = nn.Sequential(nn.Linear(2, 3), nn.Bilinear(2, 3, 4))
    assert list(w.create_param_masks(anything, "full").items()) == [(n, None) for n, _ in anything.named_parameters()]


def test_an_exact_name_keeps_its_case():
    model = nn.ModuleDict({"A": nn.Linear(2, 2), "a": nn.Linear(2, 2)})
    assert w.create_param_masks(model, "A.weight") == {"A.weight": None}
    assert w.create_param_masks(model, " a.bias ") == {"a.bias": None}
    with pytest.raises(ValueError, match=r"(?s)Unknown restriction 'A\.Weight'.*write: A\.weight"):
        w.create_param_masks(model, "A.Weight")


@pytest.mark.parametrize(
    "text",
    ["layers[0:2]", "layers[1].attn.k", "layers[:].mlp.gate", "layers[0].mlp.up", "layers[0].mlp.down", "final_norm",
     "layers[1].neurons[3:5]", "layers[0].groups[1].k", "layers[:].heads[0,2].q", "layers[1].attn.o.weight"],
)  # fmt: skip
def test_finer_addresses(llama, text):
    found = w.select(llama, text)
    assert found == w.select(llama, parse_path(text)) and found.numel() > 0
    masks = w.create_param_masks(llama, text)
    parameters = dict(llama.named_parameters())
    assert found.numel() == sum(parameters[n].numel() if m is None else int(m.sum()) for n, m in masks.items())


def test_masks_have_the_shape_and_type_of_the_contract(llama):
    parameters = dict(llama.named_parameters())
    masks = w.create_param_masks(llama, ["l1h2", "embed"])
    assert masks["model.embed_tokens.weight"] is None
    for name, mask in masks.items():
        assert mask is None or (mask.dtype == torch.bool and mask.shape == parameters[name].shape)


def test_masks_lie_where_the_parameter_does_and_on_the_cpu_for_meta(llama):
    with torch.device("meta"):
        empty = type(llama)(llama.config)
    masks = w.create_param_masks(empty, "l1h2")
    assert same(masks, w.create_param_masks(llama, "l1h2"))
    assert {mask.device.type for mask in masks.values() if mask is not None} == {"cpu"}


# -- lists -------------------------------------------------------------------------------------------------------------


def test_a_list_is_the_union(llama):
    both = w.create_param_masks(llama, ["l1h0", "l1h3"])
    one, other = w.create_param_masks(llama, "l1h0"), w.create_param_masks(llama, "l1h3")
    for name, mask in both.items():
        a, b = one[name], other[name]
        assert a is not None and b is not None
        assert (a | b).all() if mask is None else torch.equal(mask, a | b)


def test_whole_beats_a_mask_whatever_the_order(llama):
    name = "model.layers.1.self_attn.q_proj.weight"
    for order in (["l1h0", name], [name, "l1h0"], ["l1h0", "l1 attn"], ["l1", "l1h0"]):
        assert w.create_param_masks(llama, order)[name] is None
    mixed = w.create_param_masks(llama, ["l1h0", name])
    assert mixed["model.layers.1.self_attn.k_proj.weight"] is not None


def test_nested_lists_and_lists_of_one(llama):
    nested = w.create_param_masks(llama, ["l1h0", [["l2h1"], "l0 mlp"]])
    assert same(nested, w.create_param_masks(llama, ["l1h0", "l2h1", "l0 mlp"]))
    assert same(w.create_param_masks(llama, ["l1h0"]), w.create_param_masks(llama, "l1h0"))
    assert same(w.create_param_masks(llama, [[["l1"]]]), w.create_param_masks(llama, "l1"))


def test_keys_are_in_the_models_order_and_layers_by_number():
    model = zoo.build("llama", num_hidden_layers=12)
    order = list(dict(model.named_parameters()))
    found = list(w.create_param_masks(model, ["unembed", "l11", "l2h1", "l10 mlp", "embed", "l2h0"]))
    assert found == sorted(found, key=order.index)
    layers = [int(name.split(".")[2]) for name in found if ".layers." in name]
    assert layers == sorted(layers) and set(layers) == {2, 10, 11}


def test_a_parameter_joined_from_all_its_heads_is_whole(gpt2):
    masks = w.create_param_masks(gpt2, [f"l1h{head}" for head in range(4)])
    assert set(masks.values()) == {None}


# -- what is answered with an error ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "thing", [None, ("l0",), {"l0"}, 3, b"l0", {"l0": 1}, parse_path("l0"), ["l0", ("l1",)], [None]]
)
def test_neither_str_nor_list(gpt2, thing):
    kind = type(next((one for one in thing if not isinstance(one, str)), None) if isinstance(thing, list) else thing)
    with pytest.raises(TypeError, match=r"str.*list") as caught:
        w.create_param_masks(gpt2, thing)
    assert ("None" if kind is type(None) else kind.__name__) in str(caught.value)


@pytest.mark.parametrize("thing", [[], [[]], ["l0", []]])
def test_an_empty_list(gpt2, thing):
    with pytest.raises(ValueError, match="empty"):
        w.create_param_masks(gpt2, thing)


@pytest.mark.parametrize("thing", [["full"], ["l0", " FULL"], ["l0", ["full"]]])
def test_full_in_a_list_is_named(gpt2, thing):
    with pytest.raises(ValueError, match=r"(?i)'.*full'"):
        w.create_param_masks(gpt2, thing)


@pytest.mark.parametrize(
    ("text", "closest"),
    [
        ("l1 mpl", "l1 mlp"),
        ("l1 atn", "l1 attn"),
        ("fulll", "full"),
        ("unembd", "unembed"),
        ("layer 1", r"layers\[1\]"),
        ("transformer.h.1.attn.c_atn.weight", r"transformer\.h\.1\.attn\.c_attn\.weight"),
        ("l-1", r"layers\[-1\]"),
        ("model.transformer.g[0]", None),
        ("", None),
        ("head 3 of the first layer", None),
        ("l1h", "l1h3"),
    ],
)
def test_an_unknown_restriction_lists_the_forms_and_the_closest(gpt2, text, closest):
    with pytest.raises(ValueError, match=r"^Unknown restriction") as caught:
        w.create_param_masks(gpt2, text)
    message = str(caught.value)
    assert repr(text) in message
    for form in ("full", "embed", "unembed", "l<i>", "l<i> attn", "l<i> mlp", "l<i>h<j>", "l<i>g<j>"):
        assert form in message
    if closest is not None:
        with pytest.raises(NnspliceError, match=f"write: .*({closest})"):
            w.create_param_masks(gpt2, text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("l3", "layer.* has 3,"),
        ("l99h99", "layer.* has 3,"),
        ("l3 mlp", "layer.* has 3,"),
        ("l0h4", "head.* has 4,"),
        ("l0 h4", "head.* has 4,"),
        ("l0g2", "group.* has 2,"),
        ("layers[-4]", "layer.* has 3,"),
        ("layers[0].heads[0,4]", "head.* has 4,"),
    ],
)
def test_out_of_range_says_how_many_there_are(llama, text, said):
    with pytest.raises(ValueError, match=f"(?s)out of range.*{said}"):
        w.create_param_masks(llama, text)
    with pytest.raises(IndexError):
        w.create_param_masks(llama, text)


def test_a_model_that_is_not_recognised():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with pytest.raises(ValueError, match="cannot be told apart"):
        w.create_param_masks(model, "l0h1")
    with pytest.raises(ValueError, match="cannot be told apart"):
        w.create_param_masks(model, "embed")
    assert w.create_param_masks(model, "full") == {"0.weight": None, "0.bias": None}
    assert w.create_param_masks(model, "0.bias") == {"0.bias": None}


@pytest.mark.parametrize(
    ("text", "said"),
    [("layers[0].mlp.router", "no router"), ("layers[0].experts[1]", "no experts"), ("layers[0].attn.bias", "no bias"),
     ("encoder.l0", "one tower"), ("layers[0].mid", "activation"), ("l0h1.pattern", "activation"),
     ("l0[-1]", "no tokens")],
)  # fmt: skip
def test_parts_that_a_model_does_not_have(llama, text, said):
    with pytest.raises(ValueError, match=said):
        w.create_param_masks(llama, text)


def test_heads_of_a_layer_without_attention():
    model = long_table.build("lfm2")
    with pytest.raises(ValueError, match="layer 0 has no attention"):
        w.create_param_masks(model, "l0h1")
    assert w.create_param_masks(model, "l0 mlp") and w.create_param_masks(model, "l1h1")


# -- towers and ties ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_a_short_form_means_the_decoder_and_says_so_once(name):
    model = zoo.build(name)
    with pytest.warns(UserWarning, match="two towers") as caught:
        masks = w.create_param_masks(model, ["l1h0", "l2h1", "l0 mlp"])
    assert len(caught) == 1 and all("decoder" in key and "encoder." not in key for key in masks)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder = w.create_param_masks(model, "encoder.layers[1].heads[0]")
        assert same(encoder, w.create_param_masks(model, "encoder.l1h0"))
        decoder = w.create_param_masks(model, "decoder.l1h0")
        assert same(decoder, w.create_param_masks(model, "layers[1].heads[0]"))
    assert not encoder.keys() & decoder.keys() and all("encoder" in key for key in encoder)


@pytest.mark.parametrize("ask", [w.create_param_masks, w.select])
def test_a_warning_points_at_the_callers_line(ask):
    with pytest.warns(UserWarning, match="two towers") as caught:
        ask(zoo.build("t5"), "l1")
    assert [warning.filename for warning in caught] == [__file__]


def test_a_layer_of_t5_is_not_one_of_its_sublayers():
    model = zoo.build("t5")
    masks = w.create_param_masks(model, "decoder.l1")
    assert masks.keys() == {n for n, _ in model.named_parameters() if n.startswith("decoder.block.1.")}


def test_tied_unembed_warns_and_is_the_shared_tensor(gpt2):
    with pytest.warns(UserWarning, match="tied"):
        assert w.create_param_masks(gpt2, "unembed") == {"transformer.wte.weight": None}
    with pytest.warns(UserWarning, match="tied"):
        assert w.create_param_masks(gpt2, "lm_head.weight") == {"transformer.wte.weight": None}
    with pytest.warns(UserWarning, match=r"decoder\.bias' is tied .* same tensor as cls\.predictions\.bias"):
        w.create_param_masks(zoo.build("bert"), "cls.predictions.decoder.bias")
    loose = zoo.build("gpt2", tie_word_embeddings=False)
    assert w.create_param_masks(loose, "unembed") == {"lm_head.weight": None}


# -- traps that are known ----------------------------------------------------------------------------------------------


def test_head_size_is_not_width_over_heads():
    model = zoo.build("gemma2")  # 4 heads of 6 in a width of 16
    mask = w.create_param_masks(model, "l0h3")["model.layers.0.self_attn.q_proj.weight"]
    assert mask is not None and mask[:, 0].nonzero().flatten().tolist() == list(range(18, 24))


def test_shared_key_value_heads_belong_to_each_of_their_query_heads(llama):
    name = "model.layers.0.self_attn.k_proj.weight"
    masks = [w.create_param_masks(llama, f"l0h{head}")[name] for head in range(4)]
    rows = [mask[:, 0].nonzero().flatten().tolist() for mask in masks if mask is not None]
    assert rows == [list(range(6))] * 2 + [list(range(6, 12))] * 2


def test_bert_mlp_leaves_the_attention_output_alone():
    mlp = w.create_param_masks(zoo.build("bert"), "l0 mlp")
    assert {name.removeprefix("bert.encoder.layer.0.") for name in mlp} == {
        "intermediate.dense.weight", "intermediate.dense.bias", "output.dense.weight", "output.dense.bias",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["gpt2", "qwen2", "opt", "bert", "phi", "falcon_mha", "bloom", "gpt_neox"])
def test_every_bias_of_q_k_v_is_in_attention_and_in_its_head(name):
    model = zoo.build(name)
    attn = w.create_param_masks(model, "l1 attn")
    biases = {key for key in attn if key.endswith("bias")}
    heads = w.create_param_masks(model, [f"l1h{head}" for head in range(4)])
    output = w.select(model, "layers[1].attn.o")
    assert biases and biases - set(output) == {key for key in heads if key.endswith("bias")}
    for head in range(4):
        one = w.create_param_masks(model, f"l1h{head}")
        assert {key for key in one if key.endswith("bias")} == biases - set(output)
