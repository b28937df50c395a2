"""How well gradients guess on a pretrained model: well for heads, poorly for the residual stream, which is told."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

import nnsplice as ns
from real.pretrained import pretrained

pytestmark = pytest.mark.real


@cache
def task() -> ns.tasks.Task:
    model = pretrained("smollm2")
    return ns.tasks.ioi(model, 6).filter(model)


def gained(result: ns.SweepResult) -> np.ndarray:
    """What each cell adds to the metric."""
    return (result.table.values - result.table.corrupted[:, None]).astype(float)


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(np.argsort(np.argsort(a)), np.argsort(np.argsort(b)))[0, 1])


def recall(exact: np.ndarray, guess: np.ndarray, k: int = 20) -> float:
    """How many of the k largest are among the k that were guessed to be."""
    return len(set(np.argsort(-abs(exact))[:k]) & set(np.argsort(-abs(guess))[:k])) / k


def test_heads_are_guessed_well() -> None:
    pairs, model = task(), pretrained("smollm2")
    asked = (pairs.clean, pairs.corrupted, "layers[:].heads[:].output[-1]", pairs.metric)
    exact = gained(ns.sweep(model, *asked, progress=False)).mean(0)
    result = ns.attribute(model, *asked, progress=False)
    assert rank_correlation(exact, gained(result).mean(0)) > 0.97
    assert recall(exact, gained(result).mean(0)) >= 0.9
    assert "rough guess" not in result.run.note


def test_the_stream_is_guessed_poorly_by_one_gradient_and_better_by_several() -> None:
    model, exact, guesses = pretrained("smollm2"), [], {"atp": [], "ig": []}
    for pair in (task()[:1], task()[1:2]):
        asked = (pair.clean, pair.corrupted, "layers[:].output[:]", pair.metric)
        result = ns.sweep(model, *asked, progress=False)
        differs = gained(result)[0] != 0
        exact.append(gained(result)[0][differs])
        for method, found in guesses.items():
            guess = ns.attribute(model, *asked, method=method, progress=False)
            found.append(gained(guess)[0][differs])
            assert ("rough guess" in guess.run.note) == (method == "atp")
    real, (one, several) = np.concatenate(exact), (np.concatenate(found) for found in guesses.values())
    assert recall(real, one) < 0.5 and rank_correlation(real, one) < 0.85
    assert (real @ one) / (real @ real) < 0.5, "and much too small"
    assert rank_correlation(real, several) > rank_correlation(real, one)
    assert 0.5 < (real @ several) / (real @ real) < 1.5
