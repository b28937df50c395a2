"""On models whose circuit is known, a sweep lights up exactly the circuit: every component, both directions."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import pytest

import nnsplice as ns
import zoo
from models.circuits import CIRCUITS
from models.ground_truth import FORMS

TOLERANCE = 0.02
SITES = ["embed"]
SITES += [f"layers[:]{part}" for part in (".input", ".attn", ".mid", ".mlp", ".output", ".heads[:]")]
#: `final_norm` stands in no layer, so the packed executor leaves it to others.
BY_EXECUTOR = {"packed": SITES, "batched": [*SITES, "final_norm"]}


@lru_cache
def _model(form: str, name: str) -> Any:
    return ns.load(FORMS[form](CIRCUITS[name]), tokenizer=zoo.tokenizer())


@pytest.mark.parametrize("executor", BY_EXECUTOR)
@pytest.mark.parametrize("name", CIRCUITS)
@pytest.mark.parametrize("form", FORMS)
def test_a_sweep_lights_up_the_circuit_and_nothing_else(form: str, name: str, executor: str) -> None:
    circuit, model = CIRCUITS[name], _model(form, name)
    metric = ns.logit_diff(list(circuit.answers), list(circuit.wrong))
    prompts = [[list(row) for row in rows] for rows in (circuit.clean, circuit.corrupted)]
    # Denoising: the clean value restores the answer. Noising: the corrupted value takes it away.
    for clean, corrupted in (prompts, prompts[::-1]):
        sites = BY_EXECUTOR[executor]
        result = ns.sweep(model, clean, corrupted, sites, metric, executor=executor, progress=False)
        assert result.is_complete
        share = (result.table.values - result.corrupted[:, None]) / (result.clean - result.corrupted)[:, None]
        expected = np.array([float(cell.path in circuit.on) for cell in result.cells])
        assert expected.sum() > 5
        wrong = {c.path: s.tolist() for c, s, e in zip(result.cells, share.T, expected, strict=True)
                 if np.abs(s - e).max() > TOLERANCE}  # fmt: skip
        assert wrong == {}
