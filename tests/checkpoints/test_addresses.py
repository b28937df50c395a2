"""Tensors of a folder by address: the right ones, and no byte more."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nnsplice import Atlas
from nnsplice import checkpoints as ck
from nnsplice.errors import OutOfRange, PathError, UnknownPath
from zoo import FAMILIES, build


def rchar() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_head_is_what_the_atlas_says(name: str, tmp_path: Path):
    model = build(name)
    model.save_pretrained(tmp_path)
    params = dict(model.named_parameters())
    for path in ("layers[1:3].heads[0,2]", "layers[-1].mlp.down", "layers[0].attn.v", "embed"):
        try:
            selection = Atlas.of(model).resolve(path)
        except UnknownPath:  # no `down` among experts
            continue
        found = ck.read(tmp_path, path)
        assert found.keys() == set(selection.names)
        for parameter, mask in selection.masks().items():
            whole = params[parameter].detach()
            assert torch.equal(found[parameter].flatten(), whole.flatten() if mask is None else whole[mask])


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_that_files_have_one_by_one(name: str, tmp_path: Path):
    build(name).save_pretrained(tmp_path)
    found = ck.read(tmp_path, "layers[1].experts[2]")
    assert len(found) == 3 and all(".1." in key and "experts.2." in key for key in found)
    whole = ck.Checkpoint.open(tmp_path)
    assert all(torch.equal(tensor, whole.tensor(key)) for key, tensor in found.items())
    assert len(ck.read(tmp_path, "layers[1].mlp")) >= 3 * 4


@pytest.mark.parametrize(
    ("name", "path", "stored"),
    [
        ("gpt2", "layers[1].heads[2]", ["attn.c_attn.bias", "attn.c_attn.weight", "attn.c_proj.weight"]),
        ("mixtral", "layers[1].mlp.router", ["block_sparse_moe.gate.weight"]),
        ("gpt_neox", "unembed", ["embed_out.weight"]),
    ],
)
def test_what_files_call_otherwise(name: str, path: str, stored: list[str], tmp_path: Path):
    # The files of GPT-2 on the hub begin with the backbone; transformers writes some modules by their former names.
    model = build(name)
    model.save_pretrained(tmp_path)
    if name == "gpt2":
        bare = {f"transformer.{key}": key for key in model.transformer.state_dict()}
        renames = ck.Parallel([ck.Rename(long, short) for long, short in bare.items()])
        ck.save_model_state(tmp_path, renames, model, show_progress=False)
    found = ck.read(tmp_path, path)
    assert all(key.endswith(end) for key, end in zip(sorted(found), stored, strict=True))
    masks = Atlas.of(model).resolve(path).masks()
    for key, (parameter, mask) in zip(sorted(found), sorted(masks.items()), strict=True):
        whole = model.get_parameter(parameter).detach()
        assert torch.equal(found[key].flatten(), whole.flatten() if mask is None else whole[mask])


def test_only_its_bytes_are_read(tmp_path: Path):
    model = build("llama", hidden_size=64, intermediate_size=512)
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    ck.read(tmp_path, "layers[0].heads[0]")  # imports, and the config
    costs = {}
    for path in ("layers[1].heads[0]", "layers[1].heads[0:4]", "layers[0:3].heads[1]", "layers[:]"):
        before = rchar()
        ck.Checkpoint.open(tmp_path).sizes()
        opened = rchar() - before
        before = rchar()
        found = ck.read(tmp_path, path)
        costs[path] = rchar() - before - sum(tensor.nbytes for tensor in found.values()) - opened
    # The same besides, whatever was asked for: the config, which is read twice over, and our looking at the count.
    assert max(costs.values()) < 6000, costs


def test_what_is_not_there(tmp_path: Path):
    build("llama").save_pretrained(tmp_path)
    for path, error in (
        ("layers[9]", OutOfRange),
        ("layers[0].heads[0].pattern", PathError),
        ("layers[0].experts[0]", UnknownPath),
    ):
        with pytest.raises(error):
            ck.read(tmp_path, path)
