"""How much of indirect object identification a circuit of SmolLM2-135M keeps (Wang et al. 2022 asked GPT-2 small)."""

from __future__ import annotations

import random
from functools import cache

import pytest

import nnsplice as ns
from real.pretrained import pretrained

pytestmark = pytest.mark.real
PAIRS = 6


@cache
def scored() -> ns.SweepResult:
    """The score of each of 70,651 edges."""
    task = _task()
    sites = ["embed", "layers[:].heads[:]", "layers[:].mlp"]
    return ns.attribute(
        pretrained("smollm2"), task.clean, task.corrupted, sites, task.metric, method="eap-ig", progress=False
    )


@cache
def _task() -> ns.tasks.Task:
    return ns.tasks.ioi(pretrained("smollm2"), PAIRS)


def _kept(circuit: ns.Circuit) -> float:
    """The share of the logit difference that the circuit keeps."""
    task = _task()
    report = ns.faithfulness(pretrained("smollm2"), circuit, task.clean, task.corrupted, task.metric, progress=False)
    return float(report.f()[0])


def test_eighty_of_three_hundred_heads_and_mlps_keep_nearly_all_and_eighty_by_chance_nothing() -> None:
    effects = scored().edges().groupby("sender").score.sum()
    best = [str(place) for place in effects.abs().sort_values(ascending=False).index if "layers" in str(place)]
    assert len(best) == 30 * 9 + 30

    def kept(nodes: list[str]) -> float:
        return _kept(ns.Circuit.of(nodes=["embed", *nodes], model=pretrained("smollm2")))

    assert 0.25 < kept(list(best[:10])) < 0.6
    assert kept(list(best[:80])) > 0.85
    assert abs(kept(list(best[:160])) - 1) < 0.05
    assert abs(kept(random.Random(0).sample(list(best), 80))) < 0.2


def test_a_thousand_of_seventy_thousand_edges_keep_nearly_all() -> None:
    assert len(scored().edges()) == 70651
    assert 0.35 < _kept(ns.Circuit.top(scored(), 100)) < 0.7
    assert _kept(ns.Circuit.top(scored(), 1000)) > 0.85
