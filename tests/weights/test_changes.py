"""`diff`: norms of a change by address, against plain arithmetic."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import nnsplice as ns
import zoo
from nnsplice import weights as w
from weights.oracle import dense, own_masks


def pair(name: str) -> tuple[Any, Any]:
    return zoo.build(name, seed=1).double(), zoo.build(name, seed=2).double()


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "qwen3_moe", "bert"])
def test_by_layers_every_parameter_counts_once(name):
    base, tuned = pair(name)
    rows = w.diff(base, tuned)
    other = dict(tuned.named_parameters())
    total = sum(float((other[n] - p).detach().square().sum()) for n, p in base.named_parameters())
    assert rows.numel.sum() == sum(p.numel() for p in base.parameters())
    assert math.isclose(rows.norm.pow(2).sum(), total, rel_tol=1e-12)
    assert {f"layers[{i}]" for i in range(3)} <= set(rows.index)


@pytest.mark.parametrize(
    "by", ["heads", "groups", "layers[1].mlp", ["layers[:].attn.q", "embed"], "layers[0].neurons[:]"]
)
def test_rows_are_their_masks(by):
    base, tuned = pair("llama")
    rows = w.diff(base, tuned, by=by)
    base, tuned = base.requires_grad_(False), tuned.requires_grad_(False)
    own, other = dict(base.named_parameters()), dict(tuned.named_parameters())
    for place in rows.index:
        path = ns.parse_path(place)
        if by == "heads" and path.steps[1].name == "heads":
            layer, head = (step.index for step in path.steps)
            assert isinstance(layer, int) and isinstance(head, int)
            masks = own_masks(base, layer, head)
        else:
            masks = w.create_param_masks(base, place)
        masks = dense(masks, own)
        change = torch.cat([(other[n] - own[n])[m] for n, m in masks.items()])
        before = torch.cat([own[n][m] for n, m in masks.items()])
        row = rows.loc[place]
        assert math.isclose(row.norm, float(change.norm()), rel_tol=1e-12)
        assert math.isclose(row.base, float(before.norm()), rel_tol=1e-12)
        assert math.isclose(row.relative, row.norm / row.base, rel_tol=1e-12)
        assert row.changed == int(change.count_nonzero()) and row.numel == change.numel()


def test_number_of_rows():
    base, tuned = pair("llama")
    heads, groups = (w.diff(base, tuned, by=by) for by in ("heads", "groups"))
    assert len(groups) == 6
    # Each head by itself, and what two heads share: everything once.
    assert len(heads) == 12 + 2 * 6 and heads.numel.sum() == groups.numel.sum()
    assert math.isclose(heads.norm.pow(2).sum(), groups.norm.pow(2).sum(), rel_tol=1e-12)
    assert len(w.diff(*pair("gpt2"), by="heads")) == 12  # nothing is shared


def test_no_change_is_zero_and_one_change_is_found():
    base = zoo.build("gpt2")
    tuned = zoo.build("gpt2")
    assert not w.diff(base, tuned).norm.any()
    with torch.no_grad():
        tuned.transformer.h[2].attn.c_proj.weight[4:8] += 1e-3  # head 1
    rows = w.diff(base, tuned, by="heads")
    assert rows.index[rows.changed > 0].tolist() == ["layers[2].heads[1]"]
    assert rows.changed.max() == 64


def test_mistakes():
    base = zoo.build("gpt2")
    with pytest.raises(ValueError, match="same model"):
        w.diff(base, base)
    with pytest.raises(TypeError, match="by=3"):
        w.diff(base, zoo.build("gpt2"), by=3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="compares nothing"):
        w.diff(base, zoo.build("gpt2"), by=[])
