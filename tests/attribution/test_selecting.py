"""`auto` takes the method that finds most for its passes, on a slice that is computed exactly."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

import nnsplice as ns
from attribution.test_ground_truth import _task
from nnsplice.attribution import selecting
from nnsplice.attribution.methods import METHODS
from zoo import double, wrap

CLEAN, CORRUPTED = "w3 w4 w5 w6 w8", "w3 w9 w5 w16 w7"
METRIC = ns.logit_diff("w7", "w8")
SITES = ["layers[:].heads[:]", "layers[:].mlp"]


def scored(model: Any, sites: Any = SITES, **options: Any) -> ns.SweepResult:
    given = {"clean": CLEAN, "corrupted": CORRUPTED, "metric": METRIC, "method": "auto", **options}
    return ns.attribute(
        model, given.pop("clean"), given.pop("corrupted"), sites, given.pop("metric"), progress=False, **given
    )


def test_where_gradients_see_nothing_a_walk_between_the_runs_is_taken() -> None:
    """Heads whose only effect is to turn round a choice of attention that is certain in both runs."""
    model, clean, corrupted, metric = _task("gpt2", "ioi")
    options: dict[str, Any] = {"clean": clean, "corrupted": corrupted, "metric": metric, "steps": 64}
    sites = ["layers[0:2].heads[:]", "layers[0:2].mlp"]
    result = scored(model, sites, **options)
    assert result.method == "ig"
    assert "auto took ig" in result.run.note and re.search(r"\batp 0% in 3\.\d passes", result.run.note)
    by_name = ns.attribute(model, clean, corrupted, sites, metric, method="ig", steps=64, progress=False)
    np.testing.assert_array_equal(result.table.values, by_name.table.values)
    assert result != by_name  # which method, was another question


def test_where_one_gradient_is_enough_it_is_taken() -> None:
    model, clean, corrupted, metric = _task("gpt2", "fact")
    result = scored(model, clean=clean, corrupted=corrupted, metric=metric)
    assert result.method == "atp"
    assert all(f"{name} " in result.run.note for name in ("atp", "atp*", "ig"))
    assert result.run.forwards > 2 and result.asked["auto"] == {"prompts": 4, "cells": 48}


def test_recall_and_price_are_those_of_the_whole_where_the_slice_is_all_there_is() -> None:
    model = double("gpt2")
    sites = "layers[:].heads[:][-1]"
    exact = ns.sweep(model, CLEAN, CORRUPTED, sites, METRIC, progress=False)
    sizes = abs(exact.table.values - exact.corrupted[:, None])[0]
    k = len(sizes) // 4
    assert len(sizes) == 12
    note = scored(model, sites).run.note
    for method, passes in (("atp", 3), ("atp*", 6), ("ig", 12)):  # 2 or 7 forward, and 1, 4 or 5 backward
        found = ns.attribute(model, CLEAN, CORRUPTED, sites, METRIC, method=method, progress=False).table
        first = np.argsort(-abs(found.values - found.corrupted[:, None])[0])[:k]
        recall = len(set(first) & set(np.argsort(-sizes)[:k])) / k
        told = re.search(rf"(?:by |; ){re.escape(method)} (\d+)% in ([\d.]+) passes", note)
        assert told is not None, note
        assert int(told[1]) == round(100 * recall) and abs(float(told[2]) - passes) < 0.2, note


def test_the_slice_is_drawn_with_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[list[int], list[int]]] = []
    own = selecting._slice
    monkeypatch.setattr(selecting, "CELLS", 6)
    monkeypatch.setattr(selecting, "PROMPTS", 1)

    def noted(*args: Any) -> Any:
        prompts, cells = own(*args)
        drawn.append((prompts, cells.tolist()))
        return prompts, cells

    monkeypatch.setattr(selecting, "_slice", noted)
    model, pairs = double("gpt2"), {"clean": [CLEAN] * 3, "corrupted": [CORRUPTED, "w3 w9 w5 w6 w8", "w61 w4 w5 w6 w8"]}
    results = [scored(model, seed=seed, **pairs) for seed in (0, 0, 1, 2)]
    assert drawn[0] == drawn[1] and len({str(one) for one in drawn}) == 3
    assert all(len(prompts) == 1 and len(cells) == 6 for prompts, cells in drawn)
    assert results[0] == results[1] and results[0] != results[2]
    assert _untimed(results[0]) == _untimed(results[1])


def _untimed(result: ns.SweepResult) -> str:
    return re.sub(r"\([\d.]+ s\)", "", result.run.note)


def test_with_receivers_methods_of_edges_are_measured() -> None:
    result = scored(double("llama"), ["embed", *SITES], receivers=["layers[1:].mlp", "unembed"], verify=4)
    assert result.method in ("eap", "eap-ig", "relp", "ifr") and result.table.edges is not None
    assert all(f"{name} " in result.run.note for name in ("eap", "eap-ig", "relp", "ifr"))
    assert "edges on 1 of 1 prompts" in result.run.note and result.verification.k == 4


def test_what_does_not_fit_is_said_and_left_out() -> None:
    result = scored(double("gemma2"), ["embed", *SITES], receivers="unembed")
    assert result.method in ("eap", "eap-ig")
    assert "not fitting: relp (relp needs branches without a norm" in result.run.note
    assert "ifr (ifr needs" in result.run.note


def test_where_no_method_fits_it_says_why() -> None:
    with pytest.raises(ns.errors.BadArgument, match=r"no estimate fits: atp \(") as error:
        scored(wrap("gpt2", attn_implementation="eager"), "layers[:].heads[:].pattern[-1]")
    assert "atp* (" in str(error.value) and "ns.sweep" in str(error.value)


def test_where_none_finds_more_than_chance_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    model, clean, corrupted, metric = _task("gpt2", "ioi")
    monkeypatch.delitem(METHODS, "ig")  # which is the one that does
    with pytest.raises(ns.errors.BadArgument, match="than chance does"):
        scored(model, "layers[0:2].heads[:]", clean=clean, corrupted=corrupted, metric=metric)


def test_where_nothing_moves_there_is_nothing_to_choose_by() -> None:
    with pytest.raises(ns.errors.BadArgument, match="no cell can differ"):
        scored(double("gpt2"), "layers[0].mlp[0]")  # a token that is the same in both


def test_unknown_methods_are_told_of_it() -> None:
    with pytest.raises(ns.errors.BadArgument, match="auto"):
        scored(double("gpt2"), method="best")
