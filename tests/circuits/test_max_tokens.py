"""`max_tokens` splits the runs of a question about circuits, and changes no number of the answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import nnsplice as ns
from zoo import double

METRIC = ns.logit_diff("w7", "w8")
CLEAN = ["w3 w4 w5", "w9 w4 w5 w62", "w3 w3 w4 w5", "w61 w62 w3"]
CORRUPTED = ["w3 w4 w3", "w9 w4 w3 w62", "w3 w3 w4 w6", "w62 w62 w3"]
REFERENCE = ["w61 w62 w3 w4", "w5 w6 w7"]
NODES = ["embed", "layers[0].mlp", "layers[1].heads[2]", "layers[2].mlp"]
EMBED = ns.Circuit.of(nodes=["embed"])

ABLATIONS: dict[str, dict[str, Any]] = {
    "patch": {"corrupted": CORRUPTED},
    "zero": {"corrupted": None, "ablation": "zero"},
    "mean": {"corrupted": None, "ablation": "mean", "reference": REFERENCE},
}


def _numbers(frame: Any) -> np.ndarray:
    return frame.select_dtypes("float").to_numpy()


QUESTIONS: dict[str, Callable[..., np.ndarray]] = {
    "faithfulness": lambda model, circuit, **given: _numbers(
        ns.faithfulness(model, [circuit], CLEAN, metric=METRIC, **given).frame()
    ),
    "sweep_circuits": lambda model, circuit, **given: (
        ns.sweep_circuits(model, [circuit, ~circuit | EMBED], CLEAN, metric=METRIC, **given).table.values
    ),
    "minimality": lambda model, circuit, **given: _numbers(
        ns.minimality(model, circuit, CLEAN, metric=METRIC, random=2, seed=3, **given).frame()
    ),
    "completeness": lambda model, circuit, **given: _numbers(
        ns.completeness(model, circuit, CLEAN, metric=METRIC, random=2, greedy=1, seed=3, **given).frame()
    ),
}


# The double is random, so that the model and the empty circuit lie close together.
@pytest.mark.filterwarnings("ignore:the model and the empty circuit")
@pytest.mark.parametrize("ablation", ABLATIONS)
@pytest.mark.parametrize("question", QUESTIONS)
def test_a_question_asked_in_smaller_runs_has_the_same_answer(question: str, ablation: str) -> None:
    model = double("llama")
    circuit = ns.Circuit.of(nodes=NODES, model=model)
    ask = QUESTIONS[question]
    whole = ask(model, circuit, **ABLATIONS[ablation], progress=False)
    split = ask(model, circuit, **ABLATIONS[ablation], progress=False, max_tokens=5)
    assert np.abs(whole).max() > 1e-3
    np.testing.assert_allclose(split, whole, rtol=1e-9, atol=1e-12)


def test_random_sets_of_another_seed_are_others() -> None:
    model = double("llama")
    circuit = ns.Circuit.of(nodes=NODES, model=model)

    def sets(seed: int) -> tuple[Any, ...]:
        given = (model, circuit, CLEAN, CORRUPTED, METRIC)
        return tuple(ask(*given, random=3, seed=seed, progress=False).sets for ask in (ns.minimality, ns.completeness))

    first, other = sets(3), sets(4)
    assert sets(3) == first
    assert first[0] != other[0]
    assert first[1] != other[1]
