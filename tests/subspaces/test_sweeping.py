"""Sweeps of a part of each site: the same in every executor, and what plain torch hooks make of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import nnsplice as ns
from nnsplice.errors import BadArgument, BadType, ShapeError
from zoo import build, double, wrap

CLEAN = ["w3 w4 w5 w6 w7", "w13 w14 w15"]
CORRUPTED = ["w3 w9 w5 w6 w7", "w13 w24 w15"]
METRIC = ns.logit_diff("w7", "w8")


def _subspace(width: int = 16, k: int = 3, seed: int = 0) -> ns.Subspace:
    vectors = torch.randn(k, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return ns.Subspace.of("layers[1].output", vectors)


def _sweep(model: Any, executor: str = "auto", **options: Any) -> ns.SweepResult:
    given = {"sites": "layers[:].output", "subspace": _subspace(), **options}
    sites = given.pop("sites")
    return ns.sweep(model, CLEAN, CORRUPTED, sites, METRIC, executor=executor, progress=False, **given)


@pytest.mark.parametrize(
    "sites", ["layers[:].output", "layers[:].mlp.output", "layers[1].mid", "layers[0:2].attn.output[-1]"]
)
@pytest.mark.parametrize("family", ["gpt2", "llama", "mixtral", "gemma2"])
def test_every_executor_gives_the_same_numbers(family: str, sites: str) -> None:
    model = double(family)
    packed, batched, reference = (
        _sweep(model, executor, sites=sites).table.values for executor in ("packed", "batched", "reference")
    )
    assert np.nanmax(np.abs(packed - reference)) < 1e-12
    assert np.nanmax(np.abs(batched - reference)) < 1e-12
    whole = _sweep(model, sites=sites, subspace=None).table.values
    assert np.nanmax(np.abs(whole - packed)) > 1e-5


@pytest.mark.parametrize("executor", ["packed", "batched", "reference"])
def test_heads_keys_and_sets(executor: str) -> None:
    model = double("llama")
    heads = ["layers[:].heads[:].output", "layers[:].groups[:].k[1]", ["layers[0].heads[1]", "layers[2].heads[0]"]]
    values = _sweep(model, executor, sites=heads, subspace=_subspace(6, 2)).table.values
    expected = _sweep(model, "reference", sites=heads, subspace=_subspace(6, 2)).table.values
    assert np.nanmax(np.abs(values - expected)) < 1e-12
    assert np.nanstd(values[0]) > 1e-6


@pytest.mark.parametrize("operation", ["zero", "noise", "mean", "add", lambda value: value.flip(-1)])
def test_every_operation_changes_the_part_alone(operation: Any) -> None:
    model = double("gpt2")
    reference = None
    if operation in ("mean", "add"):
        reference = ns.capture(model, ["w20 w21 w22", "w23 w24 w25"], "layers[:].output[:]")
    plan = ns.plan_sweep(
        model,
        CORRUPTED,
        None,
        "layers[1].output",
        METRIC,
        operation=operation,
        reference=reference,
        subspace=_subspace(),
    )
    runs = [ns.run(plan, model, executor=name, progress=False).table.values for name in ("packed", "reference")]
    assert np.nanmax(np.abs(runs[0] - runs[1])) < 1e-12
    assert np.nanstd(runs[0]) > 1e-6


@pytest.mark.parametrize("executor", ["packed", "batched", "reference"])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_against_plain_hooks(layer: int, executor: str) -> None:
    model, module = double("gpt2"), build("gpt2").double()
    subspace = _subspace(k=5, seed=layer)
    values = _sweep(model, executor, sites=f"layers[{layer}].output", subspace=subspace).grid()
    projector = subspace.basis @ subspace.basis.T
    for prompt, (clean, corrupted) in enumerate(zip(CLEAN, CORRUPTED, strict=True)):
        ids = [torch.tensor([[int(word[1:]) for word in text.split()]]) for text in (clean, corrupted)]
        kept: list[torch.Tensor] = []
        block = module.transformer.h[layer]
        hook = block.register_forward_hook(lambda _m, _a, out, kept=kept: kept.append(out.clone()))
        with torch.no_grad():
            module(ids[0])
        hook.remove()
        for position in range(ids[0].shape[1]):

            def patch(_module, _args, out, kept=kept, position=position):
                out = out.clone()
                out[:, position] += (kept[0][:, position] - out[:, position]) @ projector
                return out

            hook = block.register_forward_hook(patch)
            with torch.no_grad():
                logits = module(ids[1]).logits[0, -1]
            hook.remove()
            found = float(values.isel(layer=0).sel(prompt=prompt, position=position))
            assert np.isclose(found, float(logits[7] - logits[8]), rtol=0, atol=1e-12)


def test_the_whole_space_is_the_whole_patch() -> None:
    model = double("llama")
    whole = _sweep(model, subspace=ns.Subspace("layers[0].output", torch.eye(16))).table.values
    assert np.nanmax(np.abs(whole - _sweep(model, subspace=None).table.values)) < 1e-12


def test_what_is_orthogonal_to_the_difference_changes_nothing() -> None:
    model = double("gpt2")
    saved = [ns.capture(model, text[0], "layers[1].output[1]")["layers[1].output[1]"] for text in (CLEAN, CORRUPTED)]
    along = (saved[0] - saved[1])[0]
    others = torch.linalg.svd(along[None])[2][1:]
    result = _sweep(model, sites="layers[1].output[1]", subspace=ns.Subspace.of("layers[1].output", others))
    assert abs(result.effect().values[0]).max() < 1e-10
    full = _sweep(model, sites="layers[1].output[1]", subspace=ns.Subspace.of("layers[1].output", along))
    patched = _sweep(model, sites="layers[1].output[1]", subspace=None)
    assert np.allclose(full.table.values[0], patched.table.values[0], rtol=0, atol=1e-12)


def test_a_subspace_is_part_of_what_was_asked(tmp_path: Path) -> None:
    model = double("gpt2")
    one, same, other = (_subspace(seed=seed) for seed in (0, 0, 1))
    results = [_sweep(model, subspace=subspace) for subspace in (one, same, other, None)]
    digests = [result.digest for result in results]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3
    journal = tmp_path / "sweep.jsonl"
    first = _sweep(model, journal=journal)
    again = _sweep(model, journal=journal)
    assert np.array_equal(first.table.values, again.table.values, equal_nan=True)
    assert again.run.tokens < first.run.tokens
    with pytest.raises(ns.errors.NnspliceError):
        _sweep(model, subspace=other, journal=journal)
    first.to_file(tmp_path / "result.json")
    read = ns.SweepResult.from_file(tmp_path / "result.json")
    assert read.digest == first.digest


@pytest.mark.parametrize("executor", ["auto", "packed", "batched", "reference"])
def test_sites_of_another_width_are_refused_before_anything_runs(executor: str) -> None:
    with pytest.raises(ShapeError, match=r"(?s)4 wide, and the subspace is of layers\[1\].output.*16 wide"):
        _sweep(double("gpt2"), executor, sites=["layers[1].output", "layers[0].heads[1].output"])


def test_what_has_no_part_is_refused() -> None:
    model = wrap("gpt2", attn_implementation="eager")
    with pytest.raises(BadArgument, match="number of tokens"):
        _sweep(model, sites="layers[0].heads[0].pattern[-1]")
    with pytest.raises(BadArgument, match="cut or not"):
        _sweep(model, sites="layers[0].heads[0].pattern[-1][0]", operation="knockout")
    with pytest.raises(BadType, match="no subspace"):
        _sweep(model, subspace=torch.eye(16))
    empty = ns.Subspace("layers[0].output", torch.eye(16)[:, :0])
    with pytest.raises(BadArgument, match="no dimensions"):
        _sweep(model, subspace=empty)


def test_shards_and_ablations_take_a_subspace() -> None:
    model = double("gpt2")
    plan = ns.plan_sweep(model, CLEAN, CORRUPTED, "layers[:].output", METRIC, subspace=_subspace())
    halves = [ns.run(plan.shard(number, 2), model, progress=False) for number in range(2)]
    merged = ns.SweepResult.merge(halves).table.values
    assert np.nanmax(np.abs(merged - _sweep(model).table.values)) < 1e-12
    part = ns.ablate(model, CLEAN, "layers[1].output", METRIC, subspace=_subspace(), progress=False)
    whole = ns.ablate(model, CLEAN, "layers[1].output", METRIC, progress=False)
    assert np.abs(part.table.values - whole.table.values).max() > 1e-5
