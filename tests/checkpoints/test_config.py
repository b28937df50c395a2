"""The first layers of a checkpoint are a model of their own, or the family is refused by its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from typer.testing import CliRunner

from nnsplice import checkpoints as ck
from nnsplice.cli import app
from nnsplice.errors import FileError, MapperError
from weights import long_table
from zoo import _CONFIGS, LAYERS, MASKED, SEQ2SEQ, build, inputs

#: Families of the long table whose configs have lists, numbers or texts with an entry for each layer.
LISTED: dict[str, dict[str, Any]] = {
    "exaone_moe": {"mlp_layer_types": ["dense", "sparse", "sparse"]},
    "exaone4": {"sliding_window": 3, "sliding_window_pattern": 3},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "llama4_text": {"no_rope_layers": [1, 0, 1], "moe_layers": [1, 2]},
    "qwen2_moe": {"mlp_only_layers": [0, 2]},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "jamba": {},
    "bamba": {},
    "deepseek_v3": {},
    "olmo3": {},
    "cohere2": {},
}
LISTED = {name: more for name, more in LISTED.items() if name in long_table.ROWS}


def cut_by_hand(model: nn.Module, layers: int) -> None:
    """Take the last layers out of a model in memory."""
    for owner in model.modules():
        for name, child in owner.named_children():
            # T5 calls the three parts of a block `layer` too.
            stack = name in ("layers", "h", "block", "blocks") or (
                name == "layer" and "Encoder" in type(owner).__name__
            )
            if stack and isinstance(child, nn.ModuleList) and len(child) == LAYERS:
                del child[layers:]


def logits(model: Any, name: str) -> Tensor:
    with torch.no_grad():
        return model(**inputs(name), use_cache=False).logits


def converted(model: Any, folder: Path, layers: str = "0:2") -> tuple[int, str]:
    model.save_pretrained(folder / "all")
    done = CliRunner().invoke(app, ["convert", str(folder / "all"), str(folder / "few"), "--layers", layers, "--quiet"])
    return done.exit_code, done.output


def check_like_by_hand(model: Any, name: str, folder: Path) -> None:
    code, text = converted(model, folder)
    assert code == 0, text
    kind = hf.AutoModelForMaskedLM if name in MASKED else hf.AutoModelForCausalLM
    kind = hf.AutoModelForSeq2SeqLM if name in SEQ2SEQ else kind
    again, told = cast("Any", kind).from_pretrained(
        folder / "few", output_loading_info=True, experts_implementation="eager"
    )
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"]
    whole = logits(model, name)
    cut_by_hand(model, 2)
    assert torch.equal(logits(again.eval(), name), logits(model, name))
    assert not torch.allclose(logits(model, name), whole, atol=1e-3)  # the third layer says something


@pytest.mark.parametrize("name", [name for name in _CONFIGS if name != "albert"])
def test_the_first_layers_are_the_model_that_is_cut_by_hand(name: str, tmp_path: Path):
    check_like_by_hand(build(name), name, tmp_path)


@pytest.mark.parametrize("name", LISTED)
def test_what_a_config_lists_by_layer_is_cut_too(name: str, tmp_path: Path):
    check_like_by_hand(long_table.build(name, **LISTED[name]), name, tmp_path)


def test_two_stacks_of_different_depth_keep_what_they_have(tmp_path: Path):
    model = build("t5", num_layers=3, num_decoder_layers=1)
    code, text = converted(model, tmp_path)
    assert code == 0, text
    config = json.loads((tmp_path / "few" / "config.json").read_text())
    assert (config["num_layers"], config["num_decoder_layers"]) == (2, 1)
    cut_by_hand(model.encoder, 2)
    again = hf.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "few").eval()
    assert torch.equal(logits(again, "t5"), logits(model, "t5"))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("albert", "3 layers of this albert share the tensors of 1"),
        ("gpt_neox_japanese", "would have use_bias True instead of False"),
        ("gemma4_text", r"embed_tokens_per_layer.weight would have shape \[64, "),
    ],
)
def test_layers_that_depend_on_how_many_there_are_are_refused(name: str, said: str, tmp_path: Path):
    model = build(name) if name in _CONFIGS else long_table.build(name)
    code, text = converted(model, tmp_path)
    assert code == 1 and not (tmp_path / "few").exists()
    with pytest.raises(MapperError, match=said):
        ck.adapted_config((tmp_path / "all" / "config.json").read_text(), layers=2)
    assert text.startswith("the ")


def test_a_scale_that_depends_on_the_depth_is_refused():
    config = hf.MiniCPM3Config(hidden_size=16, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4)
    with pytest.raises(MapperError, match="residual_scale"):
        ck.adapted_config(config.to_json_string(use_diff=False), layers=2)


@pytest.mark.parametrize(
    ("key", "value", "made"),
    [
        ("attention_types", [[["global", "local"], 2], [["local"], 2]], [[["global", "local", "global"], 1]]),
        ("layer_types", list("abcdef"), list("abc")),
        ("hybrid_override_pattern", "M-M*M-", "M-M"),
        ("mlp_only_layers", [1, 4, 5], [1]),
        ("cross_attention_layers", [2, 3], [2]),
        ("num_kv_shared_layers", 4, 1),
        ("num_nextn_predict_layers", 1, 0),
        ("text_config", {"num_hidden_layers": 8, "layer_types": list("abcdefgh")},
         {"num_hidden_layers": 3, "layer_types": list("abc")}),
        ("per_layer_config", {"0": {"a": 1}, "4": {"a": 2}}, {"0": {"a": 1}}),
        # What only looks like it:
        ("eos_token_id", [1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6]),
        ("mrope_section", [1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6]),
        ("id2label", {"0": "a", "5": "b"}, {"0": "a", "5": "b"}),
        ("rope_scaling", {"long_factor": [1, 2, 3, 4, 5, 6]}, {"long_factor": [1, 2, 3, 4, 5, 6]}),
        ("architectures", ["A"], ["A"]),
    ],
)  # fmt: skip
def test_what_is_cut_in_a_config(key: str, value: object, made: object):
    with pytest.warns(UserWarning, match="transformers has no model type 'mine'"):
        text = ck.adapted_config(json.dumps({"model_type": "mine", "num_hidden_layers": 6, key: value}), layers=3)
    assert json.loads(text) == {"model_type": "mine", "num_hidden_layers": 3, key: made}


def test_all_layers_are_the_config_as_it_was():
    config = {"model_type": "albert", "num_hidden_layers": 3}
    assert json.loads(ck.adapted_config(json.dumps(config), layers=3)) == config


@pytest.mark.parametrize("text", ["{", "[]", "3", "[" * 100_000])
def test_what_is_no_config(text: str):
    with pytest.raises(FileError, match=r"config\.json"):
        ck.adapted_config(text, layers=2)


def test_a_config_without_layers_is_refused():
    with pytest.raises(MapperError, match="does not say how many layers"):
        ck.adapted_config('{"model_type": "gpt2"}', layers=2)
