"""What was checked is exact, and what it says about the rest is what the whole truth says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

import nnsplice as ns
from zoo import double, wrap

CLEAN = ["w3 w4 w5 w6 w7", "w13 w14 w15 w16"]
CORRUPTED = ["w3 w9 w5 w16 w7", "w13 w24 w15 w16"]
METRIC = ns.logit_diff("w7", "w8")
SITES = ["layers[:].output", "layers[:].heads[:]"]


def _attribute(model: Any, sites: Any = SITES, **options: Any) -> Any:
    return ns.attribute(model, CLEAN, CORRUPTED, sites, METRIC, progress=False, **options)


@pytest.mark.parametrize("method", ["atp", "atp*", "ig"])
def test_the_first_and_as_many_others_are_those_of_a_sweep(method: str) -> None:
    model = double("llama")
    result = _attribute(model, method=method, verify=6)
    exact = ns.sweep(model, CLEAN, CORRUPTED, SITES, METRIC, progress=False)
    assert result.table.exact is not None
    checked = ~np.isnan(result.table.exact)
    assert np.abs(result.table.exact - exact.table.values)[checked].max() < 1e-12
    first = np.argsort(-_size(result), kind="stable")[:6]
    assert checked.any(0).sum() == 12 and checked.any(0)[first].all()
    frame = result.frame()
    assert list(frame.columns).index("exact") == list(frame.columns).index("value") + 1
    seen = result.verification
    assert (seen.k, seen.others) == (6, 6) and 0.0 <= seen.recall <= 1.0
    assert str(seen) in repr(result) and f"estimated by {method}, not measured" in repr(result)


def test_with_everything_computed_the_numbers_are_the_whole_truth() -> None:
    model = double("llama")
    result = _attribute(model, verify=40)
    exact = ns.sweep(model, CLEAN, CORRUPTED, SITES, METRIC, progress=False)
    seen = result.verification
    assert result.table.exact is not None
    can = ~np.isnan(result.table.exact).all(0)
    size = [_size(one) for one in (result, exact)]
    assert can.sum() == seen.k + seen.others
    frame = pd.DataFrame({"estimated": size[0][can], "exact": size[1][can]})
    assert seen.rank_correlation == pytest.approx(frame.corr("spearman").iloc[0, 1], abs=1e-12)
    first = [set(np.argsort(-one[can], kind="stable")[:40]) for one in size]
    assert seen.recall == pytest.approx(len(first[0] & first[1]) / 40)


def _size(result: ns.SweepResult) -> np.ndarray:
    """The size of the effect pooled over the prompts that have a cell, as `best` orders cells."""
    span = np.where(result.table.done, (result.clean - result.corrupted)[:, None], np.nan)
    return np.abs(np.nanmean(result.table.values - result.corrupted[:, None], 0) / np.nanmean(span, 0))


def test_recall_from_a_few_others_is_the_true_one_in_the_mean() -> None:
    """Nothing but numbers: an estimator that draws some of the rest is right on average."""
    from nnsplice.results.estimates import recall

    generator = np.random.default_rng(0)
    exact = generator.exponential(size=300)
    estimate = exact + generator.normal(size=300) * 0.7
    k, drawn = 30, 60
    chosen = np.zeros(300, dtype=bool)
    chosen[np.argsort(-estimate)[:k]] = True
    truth = np.isin(np.flatnonzero(chosen), np.argsort(-exact)[:k]).mean()
    assert recall(exact, chosen, np.ones(300), k) == pytest.approx(truth)
    found = []
    for _ in range(400):
        others = generator.permutation(np.flatnonzero(~chosen))[:drawn]
        at = np.concatenate([np.flatnonzero(chosen), others])
        weight = np.where(chosen[at], 1.0, (300 - k) / drawn)
        found.append(recall(exact[at], chosen[at], weight, k))
    assert abs(np.mean(found) - truth) < 0.03 and 0.3 < truth < 0.9


def test_spearman_is_that_of_pandas_with_ties_too() -> None:
    from nnsplice.results.estimates import spearman

    a = np.array([1.0, 2.0, 2.0, 5.0, 5.0, 5.0, 0.0])
    b = np.array([3.0, 1.0, 4.0, 4.0, 9.0, 2.0, 2.0])
    expected = pd.DataFrame({"a": a, "b": b}).corr("spearman").iloc[0, 1]
    assert spearman(a, b) == pytest.approx(expected, abs=1e-14)
    assert np.isnan(spearman(a, np.ones(7))) and np.isnan(spearman(a[:1], b[:1]))


def test_the_worst_miss_is_the_one_furthest_off() -> None:
    model = double("gpt2")
    result = ns.attribute(model, CLEAN[0], CORRUPTED[0], SITES, METRIC, verify=8, progress=False)
    frame = result.frame().dropna(subset="exact")
    off = (frame["value"] - frame["exact"]).abs()
    worst = result.verification.worst
    assert worst is not None and worst.path == frame.loc[off.idxmax(), "path"]
    assert abs(worst.exact - worst.estimated) == pytest.approx(off.max())


@pytest.mark.parametrize("method", ["eap", "eap-ig"])
def test_edges_are_checked_by_patching_their_paths(method: str) -> None:
    model = double("llama")
    senders, receivers = ["embed", "layers[0:2].heads[:]"], ["layers[1].heads[:].q", "layers[2].mlp", "unembed"]
    result = _attribute(model, senders, method=method, receivers=receivers, verify=5)
    frame = result.edges().dropna(subset="exact")
    assert len(frame) == 10 and set(result.edges().index[:5]) <= set(frame.index)
    for _, row in frame.iterrows():
        exact = ns.path_patch(model, CLEAN, CORRUPTED, row["sender"], row["receiver"], METRIC, progress=False)
        assert row["exact"] == pytest.approx(float((exact.table.values[:, 0] - exact.corrupted).mean()), abs=1e-12)
    worst = result.verification.worst
    assert worst is not None and worst.receiver in set(frame["receiver"])
    assert " -> " in str(result.verification)


def test_results_survive_the_disk_and_merge_with_themselves(tmp_path) -> None:
    model = wrap("llama")
    results = [
        _attribute(model, method="atp", verify=4),
        _attribute(model, method="eap", verify=3),
        _attribute(model, method="eap"),
    ]
    for number, result in enumerate(results):
        result.to_file(tmp_path / f"{number}.safetensors")
        again = ns.SweepResult.from_file(tmp_path / f"{number}.safetensors")
        assert again == result and again.method == result.method
        assert ns.SweepResult.merge([again, result]) == result
        if result.table.exact is not None:
            assert again.verification == result.verification
    assert results[1].edges().equals(ns.SweepResult.from_file(tmp_path / "1.safetensors").edges())
    assert results[1] != results[2]
    exact = ns.sweep(model, CLEAN, CORRUPTED, SITES, METRIC, progress=False)
    with pytest.raises(ns.errors.KeyMismatch, match="method"):
        ns.SweepResult.merge([exact, results[0]])


def test_a_figure_and_a_page_say_that_they_are_estimates(tmp_path) -> None:
    result = _attribute(wrap("llama"), "layers[:].heads[:].output[-1]", method="atp*")
    assert result.plot(prompt=0).get_title().startswith("layers[:].heads[:].output[-1], prompt 0, estimated by atp*\n")
    result.to_html(tmp_path / "page.html")
    assert '"method":"atp*"' in (tmp_path / "page.html").read_text()
    exact = ns.sweep(wrap("llama"), CLEAN, CORRUPTED, "layers[:].heads[:].output[-1]", METRIC, progress=False)
    assert exact.method is None and "estimated" not in exact.plot(prompt=0).get_title()
    with pytest.raises(ns.errors.BadArgument, match="none of these estimates"):
        _ = result.verification


def test_checking_goes_on_after_a_stop(tmp_path) -> None:
    model = wrap("llama")
    for options in ({}, {"method": "eap"}):
        journal = tmp_path / f"journal{len(options)}.jsonl"
        first = _attribute(model, verify=4, journal=journal, **options)
        lines = journal.read_text().splitlines(keepends=True)
        journal.write_text("".join(lines[:-1]))
        assert _attribute(model, verify=4, journal=journal, **options) == first
        assert _attribute(model, verify=4, journal=journal, **options) == first


def test_where_nothing_can_differ_there_is_nothing_to_check() -> None:
    same = "the corrupted prompts are the clean ones"
    with pytest.warns(UserWarning, match=same):
        result = ns.attribute(wrap("llama"), CLEAN, CLEAN, SITES, METRIC, verify=4, progress=False)
    seen = result.verification
    assert (seen.k, seen.others, seen.worst) == (0, 0, None) and "nothing to check" in str(seen)
    with pytest.warns(UserWarning, match=same):
        edges = ns.attribute(wrap("llama"), CLEAN, CLEAN, SITES, METRIC, method="eap", verify=4, progress=False)
    assert edges.verification.k == 0


def test_what_can_have_been_missed_is_bounded_as_clopper_and_pearson_do() -> None:
    """The sum of chances in whole numbers, and a bound that holds in at least 95 of 100 draws."""
    from fractions import Fraction
    from math import comb

    from nnsplice.results.estimates import clopper_pearson

    for found, drawn in ((0, 1), (0, 20), (3, 20), (19, 20), (7, 200)):
        bound = Fraction(clopper_pearson(found, drawn, 0.95))
        chance = sum(comb(drawn, n) * bound**n * (1 - bound) ** (drawn - n) for n in range(found + 1))
        assert abs(float(chance) - 0.05) < 1e-9
    assert clopper_pearson(5, 5, 0.95) == 1.0
    generator = np.random.default_rng(0)
    for share in (0.02, 0.1, 0.4):
        held = [clopper_pearson(int(generator.binomial(40, share)), 40, 0.95) >= share for _ in range(2000)]
        assert np.mean(held) > 0.94


@pytest.mark.parametrize("k", [5, 40])
def test_a_result_says_how_many_larger_ones_can_have_been_missed(k: int) -> None:
    from nnsplice.results.estimates import clopper_pearson

    model = double("llama")
    result = _attribute(model, verify=k)
    exact = ns.sweep(model, CLEAN, CORRUPTED, SITES, METRIC, progress=False)
    sizes, truth = _size(result), _size(exact)
    assert result.table.exact is not None
    checked = ~np.isnan(result.table.exact).all(0)
    can = [number for number in range(len(sizes)) if sizes[number] > 0 or truth[number] > 0]
    first = sorted(can, key=lambda number: -sizes[number])[:k]
    others = [number for number in can if checked[number] and number not in first]
    rest = [number for number in can if number not in first]
    larger = sum(truth[number] > truth[first].min() for number in others)
    whole = len(others) == len(rest)
    expected = larger / len(rest) if whole else clopper_pearson(larger, len(others), 0.95)
    assert result.verification.missed == pytest.approx(expected)
    assert whole == (k == 40) and (0 < expected < 1 or whole)
    assert f"at most {expected:.1%}" in repr(result)
    assert expected >= sum(truth[number] > truth[first].min() for number in rest) / len(rest)
