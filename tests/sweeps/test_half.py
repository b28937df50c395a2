"""Half precision: how far executors lie apart, in units of its rounding, and metrics that round nothing more."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import nnsplice as ns
import zoo
from nnsplice.sweeps import plan_sweep, run

CLEAN, CORRUPTED = [3, 9, 4, 12, 7, 5], [3, 20, 4, 12, 33, 5]
SITES = ["layers[:].output", "layers[:].mlp.output", "layers[:].heads[:].output[-1]"]
#: How many units of rounding a value may differ by. Each of some twenty sums on a way rounds by one half, up or down;
#: more would be another number.
UNITS = 8


def _model(family: str, dtype: torch.dtype) -> Any:
    return ns.load(zoo.build(family).to(dtype), tokenizer=zoo.tokenizer())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_executors_differ_by_few_units_of_rounding(family, dtype):
    model = _model(family, dtype)
    plan = plan_sweep(model, CLEAN, CORRUPTED, SITES, ns.logit_diff(7, 8))
    alone = run(plan, model, executor="reference", progress=False).table
    exact = run(plan_sweep(_model(family, torch.float64), CLEAN, CORRUPTED, SITES, ns.logit_diff(7, 8)),
                _model(family, torch.float64), executor="reference", progress=False).table  # fmt: skip
    with torch.no_grad():
        size = float(model._module(torch.tensor([CORRUPTED])).logits.abs().max())
    unit = torch.finfo(dtype).eps * size
    for executor in ("packed", "batched"):
        found = run(plan, model, executor=executor, progress=False)
        assert np.nanmax(np.abs(found.table.values - alone.values)) <= UNITS * unit
        assert f"in {str(dtype)[6:]}, logit_diff is known to about" in (found.run.note or "") or executor == "batched"
    # All of them are as far from the numbers without rounding, and those are other numbers from cell to cell.
    assert 0 < np.nanmax(np.abs(alone.values - exact.values)) <= 4 * UNITS * unit
    assert np.nanmax(exact.values) - np.nanmin(exact.values) > 4 * UNITS * torch.finfo(torch.float16).eps * size


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("metric", [ns.probability(3), ns.log_probability(3), ns.logit_diff(3, 4), ns.rank(3)])
def test_metrics_of_half_precision_are_computed_in_single(metric, dtype):
    logits = torch.randn(5, 200, generator=torch.Generator().manual_seed(0)).to(dtype)
    found, exact = metric(logits), metric(logits.double())
    assert found.dtype is torch.float32 and (found - exact).abs().max() < 1e-5
    own = ns.Metric.of(lambda logits: logits.softmax(-1).max(-1).values)
    best = logits.double().softmax(-1).max(-1).values
    assert (own(logits) - best).abs().max() < 1e-7
    assert (logits.softmax(-1).max(-1).values - best).abs().max() > 1e-7  # as it would be in the logits' own precision
