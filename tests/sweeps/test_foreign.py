"""Values from another model: what plain hooks make of two bare modules, by every executor."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

import nnsplice as ns
from activations.oracle import run, values
from families.subject import site_of
from nnsplice.atlas import unwrap
from nnsplice.errors import BadArgument, NnspliceError, ShapeError
from zoo import tokenizer, wrap

PROMPTS = [[5, 9, 6, 4], [7, 11, 8, 10], [4, 6, 9]]
SITES = ["layers[:].output[:]", "layers[:].heads[:]", "layers[1].mlp", "embed", "layers[0].attn[-1]"]
METRIC = ns.logit_diff(7, 8)


def pair(family: str) -> tuple[Any, Any]:
    """A model, and one whose weights have moved a little."""
    base = wrap(family).to(torch.float64)
    other = copy.deepcopy(unwrap(base))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return base, ns.load(other, tokenizer=tokenizer())


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("executor", ["reference", "batched", "packed"])
def test_cells_are_those_of_hooks(family: str, executor: str) -> None:
    base, other = pair(family)
    result = ns.sweep(base, PROMPTS, None, SITES, METRIC, source=other, executor=executor, progress=False)
    roots: list[Any] = [unwrap(base), unwrap(other)]
    for row, ids in enumerate(PROMPTS):
        inputs = {"input_ids": torch.tensor([ids])}
        ends = [float(METRIC(root(**inputs).logits[:, -1].detach())) for root in roots]
        np.testing.assert_allclose([result.corrupted[row], result.clean[row]], ends, atol=1e-12)
        for number, cell in enumerate(result.cells):
            if not result.table.exists[row, number]:
                continue
            (place,) = ns.expand(base, ns.parse_path(cell.path).place)
            site = site_of(place)
            token = int(cell.position) if cell.position is not None else None
            theirs = values(roots[1], inputs, [site])[site]

            def put(value: torch.Tensor, theirs=theirs, token=token) -> torch.Tensor:
                value[:, token] = theirs[:, token]
                return value

            expected = float(METRIC(run(roots[0], inputs, {site: put})[:, -1]))
            assert abs(result.table.values[row, number] - expected) < 1e-12


def test_the_last_stream_carries_all_but_the_head() -> None:
    """Models that differ in their layers alone are told apart by the last stream wholly."""
    base, other = pair("llama")
    roots: list[Any] = [unwrap(base), unwrap(other)]
    for name in ("lm_head", "model.norm"):
        roots[1].get_submodule(name).load_state_dict(roots[0].get_submodule(name).state_dict())
    result = ns.sweep(base, PROMPTS, None, "layers[2].output[-1]", METRIC, source=other, progress=False)
    np.testing.assert_allclose(result.table.values[:, 0], result.clean, atol=1e-12)
    assert (np.abs(result.total_effect) > 1e-3).all()


def test_identical_models_are_exactly_zero() -> None:
    base = wrap("llama")
    twin = ns.load(copy.deepcopy(unwrap(base)), tokenizer=tokenizer())
    for other in (base, twin):
        result = ns.sweep(base, PROMPTS, None, SITES, METRIC, source=other, progress=False)
        assert all((result.change(kind).fillna(0) == 0).all() for kind in result.components)
        assert result.run.known == int(result.table.exists.sum())


def test_results_and_journals_know_the_other_model(tmp_path) -> None:
    base, other = pair("gpt2")
    options: dict[str, Any] = {"source": other, "progress": False, "journal": tmp_path / "cells.jsonl"}
    first = ns.sweep(base, PROMPTS, None, "layers[:].mlp", METRIC, **options)
    assert ns.sweep(base, PROMPTS, None, "layers[:].mlp", METRIC, **options) == first
    with torch.no_grad():
        unwrap(other).get_submodule("transformer.h.0.mlp.c_fc").weight.mul_(1.5)  # type: ignore[operator]
    with pytest.raises(NnspliceError):
        ns.sweep(base, PROMPTS, None, "layers[:].mlp", METRIC, **options)
    assert ns.sweep(base, PROMPTS, None, "layers[:].mlp", METRIC, source=other, progress=False) != first


def test_a_plan_is_run_with_its_source_alone() -> None:
    base, other = pair("gpt2")
    plan = ns.plan_sweep(base, PROMPTS, None, "layers[:].mlp[-1]", METRIC, source=other)
    whole = ns.run(plan, base, source=other, progress=False)
    parts = [ns.run(plan.shard(n, 2), base, source=other, progress=False) for n in range(2)]
    merged = ns.SweepResult.merge(parts)
    np.testing.assert_allclose(merged.table.values, whole.table.values, atol=1e-12)
    assert merged.is_complete and merged.asked == whole.asked
    for source, text in ((None, "another model"), (base, "other weights")):
        with pytest.raises(BadArgument, match=text):
            ns.run(plan, base, source=source, progress=False)
    plain = ns.plan_sweep(base, [[5, 9]], [[5, 6]], "layers[:].mlp[-1]", METRIC)
    with pytest.raises(BadArgument, match="would do nothing"):
        ns.run(plain, base, source=other, progress=False)


def test_models_that_do_not_fit_are_refused() -> None:
    base = wrap("llama")
    cases: list[tuple[Any, type[Exception], str]] = [
        (wrap("llama", hidden_size=32), ShapeError, "wide"),
        (wrap("llama", vocab_size=80), BadArgument, "do not correspond"),
        (wrap("llama", num_hidden_layers=2), NnspliceError, "past the last layer|layers"),
    ]
    for other, error, text in cases:
        with pytest.raises(error, match=text):
            ns.sweep(base, PROMPTS, None, "layers[:].output[-1]", METRIC, source=other, progress=False)
    with pytest.raises(BadArgument, match="same prompts"):
        ns.sweep(base, PROMPTS, PROMPTS, "layers[:].output[-1]", METRIC, source=base, progress=False)
    with pytest.raises(NnspliceError, match="source"):
        ns.path_patch(base, PROMPTS, PROMPTS, "layers[0].attn", "unembed", METRIC, source=base)
    with pytest.raises(NnspliceError, match="source"):
        ns.ablate(base, PROMPTS, "layers[0].attn", METRIC, source=base)


def test_other_tokenizers_are_refused(model) -> None:
    class Other:
        def __init__(self, own: Any) -> None:
            self.own = own

        def __call__(self, texts: Any, **options: Any) -> Any:
            found = self.own(texts, **options)
            ids = found["input_ids"]
            found["input_ids"] = (
                [[i + 1 for i in row] for row in ids] if isinstance(ids[0], list) else [i + 1 for i in ids]
            )
            return found

        def __getattr__(self, name: str) -> Any:
            return getattr(self.own, name)

    other = ns.load(copy.deepcopy(unwrap(model)), tokenizer=tokenizer())
    other.__dict__["tokenizer"] = Other(tokenizer())
    with pytest.raises(BadArgument, match="tokenizers"):
        ns.sweep(model, "w3 w4", None, "layers[:].output[-1]", METRIC, source=other, progress=False)
