"""One tensor by two names on one side, two tensors on the other: what transformers reads is the same model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor

from nnsplice import checkpoints as ck
from nnsplice.errors import MapperError
from zoo import SEQ2SEQ, build, inputs

#: Family -> the names by which transformers ties its embedding.
ENDS = {
    "gpt2": ("transformer.wte.weight", "lm_head.weight"),
    "llama": ("model.embed_tokens.weight", "lm_head.weight"),
    "gemma2": ("model.embed_tokens.weight", "lm_head.weight"),
    "bart": ("model.shared.weight", "lm_head.weight"),
}


def saved(name: str, folder: Path, tie: bool) -> Any:
    model = build(name, tie_word_embeddings=tie)
    model.save_pretrained(folder)
    return model


def loaded(name: str, folder: Path) -> Any:
    kind = hf.AutoModelForSeq2SeqLM if name in SEQ2SEQ else hf.AutoModelForCausalLM
    model, told = cast("Any", kind).from_pretrained(folder, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    return model.eval()


def logits(model: Any, name: str) -> Tensor:
    with torch.no_grad():
        return model(**inputs(name)).logits


def between(source: Path, target: Path, dest: Path, **options: Any) -> None:
    carry: dict[str, Path | str] = {"config.json": target / "config.json"}
    ck.convert(source, dest, ck.mapper_between(source, target), show_progress=False, carry=carry, **options)


@pytest.mark.parametrize("name", ENDS)
def test_a_target_that_does_not_tie_gets_both_tensors(name: str, tmp_path: Path):
    model = saved(name, tmp_path / "tied", tie=True)
    build(name, tie_word_embeddings=False).config.save_pretrained(tmp_path / "config")
    config = hf.AutoConfig.from_pretrained(tmp_path / "config")
    carry: dict[str, Path | str] = {"config.json": tmp_path / "config" / "config.json"}
    ck.convert(tmp_path / "tied", tmp_path / "new", ck.mapper_between(tmp_path / "tied", config), carry=carry)
    assert set(ENDS[name]) <= ck.Checkpoint.open(tmp_path / "new").files.keys()
    again = loaded(name, tmp_path / "new")
    assert again.get_output_embeddings().weight is not again.get_input_embeddings().weight
    assert torch.equal(logits(again, name), logits(model, name))


@pytest.mark.parametrize("name", ENDS)
def test_a_target_that_ties_gets_one_where_the_two_are_equal(name: str, tmp_path: Path):
    saved(name, tmp_path / "tied", tie=True)
    saved(name, tmp_path / "apart", tie=False)
    with pytest.raises(MapperError, match=r"are two different tensors, and the target ties them(.|\n)*=False"):
        between(tmp_path / "apart", tmp_path / "tied", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    state = load_file(tmp_path / "apart" / "model.safetensors")
    embedding = state[ENDS[name][0]]
    equal = {key: embedding.clone() if embedding.shape == tensor.shape and "pos" not in key and tensor.shape[0] == 64
             else tensor for key, tensor in state.items()}  # fmt: skip
    save_file(equal, tmp_path / "apart" / "model.safetensors", {"format": "pt"})
    between(tmp_path / "apart", tmp_path / "tied", tmp_path / "new")
    assert "lm_head.weight" not in ck.Checkpoint.open(tmp_path / "new").files
    again = loaded(name, tmp_path / "new")
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    assert torch.equal(logits(again, name), logits(loaded(name, tmp_path / "apart"), name))


def test_workers_write_both_too(tmp_path: Path):
    model = saved("gpt2", tmp_path / "tied", tie=True)
    saved("gpt2", tmp_path / "apart", tie=False)
    between(tmp_path / "tied", tmp_path / "apart", tmp_path / "new", workers=2)
    assert torch.equal(logits(loaded("gpt2", tmp_path / "new"), "gpt2"), logits(model, "gpt2"))


@pytest.mark.parametrize("equal", [True, False])
def test_a_folder_that_has_both_though_its_config_ties_them_keeps_both(equal: bool, tmp_path: Path):
    model = saved("gpt2", tmp_path / "both", tie=True)
    state = load_file(tmp_path / "both" / "model.safetensors")
    head = state["transformer.wte.weight"].clone() if equal else torch.randn(64, 16)
    save_file({**state, "lm_head.weight": head}, tmp_path / "both" / "model.safetensors", {"format": "pt"})
    saved("gpt2", tmp_path / "apart", tie=False)
    shutil.copytree(tmp_path / "both", tmp_path / "like")
    for target in ("apart", "like"):
        between(tmp_path / "both", tmp_path / target, tmp_path / "new")
        assert torch.equal(ck.Checkpoint.open(tmp_path / "new").tensor("lm_head.weight"), head)
        said = logits(loaded("gpt2", tmp_path / "new"), "gpt2")
        assert torch.equal(said, logits(loaded("gpt2", tmp_path / "both"), "gpt2"))
        assert torch.equal(said, logits(model, "gpt2")) == equal


def test_a_t5_with_another_scale_before_its_unembedding_is_refused(tmp_path: Path):
    tied, apart = saved("t5", tmp_path / "tied", tie=True), saved("t5", tmp_path / "apart", tie=False)
    assert not torch.allclose(logits(tied, "t5"), logits(apart, "t5"))
    for source, target in (("tied", "apart"), ("apart", "tied")):
        with pytest.raises(MapperError, match="scale_decoder_outputs"):
            between(tmp_path / source, tmp_path / target, tmp_path / "new")
    for folder, model in (("tied", tied), ("apart", apart)):
        between(tmp_path / folder, tmp_path / folder, tmp_path / "new")
        assert torch.equal(logits(loaded("t5", tmp_path / "new"), "t5"), logits(model, "t5"))


def test_a_t5_whose_unembedding_is_a_tensor_of_its_own_keeps_it(tmp_path: Path):
    saved("t5", tmp_path / "v11", tie=False)
    state = load_file(tmp_path / "v11" / "model.safetensors") | {"lm_head.weight": torch.randn(64, 16)}
    save_file(state, tmp_path / "v11" / "model.safetensors", {"format": "pt"})
    between(tmp_path / "v11", tmp_path / "v11", tmp_path / "new")
    assert torch.equal(logits(loaded("t5", tmp_path / "new"), "t5"), logits(loaded("t5", tmp_path / "v11"), "t5"))
