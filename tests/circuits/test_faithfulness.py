"""Shares, areas and intervals of circuits, against plain arithmetic on runs of single circuits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nnsplice as ns
from nnsplice.circuits.curves import Faithfulness, Point
from nnsplice.errors import FileError
from nnsplice.results import Run
from zoo import double

SITES = ["embed", "layers[:].heads[:]", "layers[:].mlp"]
METRIC = ns.logit_diff("w7", "w8")
PAIRS = (
    ["w3 w4 w5", "w9 w4 w5", "w20 w4 w5", "w11 w4 w13 w5"],
    ["w3 w4 w3", "w9 w4 w3", "w20 w4 w3", "w11 w4 w13 w3"],
)


@pytest.fixture(scope="module")
def model() -> Any:
    return double("gpt2")


@pytest.fixture(scope="module")
def scores(model: Any) -> ns.SweepResult:
    return ns.attribute(model, *PAIRS, SITES, METRIC, method="eap", progress=False)


def area(y: np.ndarray, x: list[float]) -> float:
    """By trapezoids, as numpy has it under a name that changed with its version 2."""
    return float((np.diff(x) * (y[1:] + y[:-1]) / 2).sum())


def test_f_is_the_share_of_means_for_each_circuit_that_scores_choose(model: Any, scores: ns.SweepResult) -> None:
    shares = [0.01, 0.1, 0.4, 1.0]
    report = ns.faithfulness(model, scores, *PAIRS, METRIC, shares=shares, progress=False)
    full = ns.Circuit.full(model).run(model, *PAIRS, METRIC).mean()
    empty = ns.Circuit.empty(model).run(model, *PAIRS, METRIC).mean()
    frame = report.frame()
    assert len(frame) == 2 * 2 * len(shares)
    for by in ("signed", "absolute"):
        expected: list[float] = []
        for share in shares:
            circuit = ns.Circuit.select(scores, share, by)
            f = (circuit.run(model, *PAIRS, METRIC).mean() - empty) / (full - empty)
            rows = frame[(frame["by"] == by) & (frame["share"] == share)]
            np.testing.assert_allclose(rows["f"], f, atol=1e-10)  # as it is and pruned
            assert set(rows["n"]) == {len(circuit)} and set(rows["connected"]) == {len(circuit.pruned())}
            expected.append(f)
        y = np.array(expected)
        np.testing.assert_allclose(report.area(by), area(y, shares), atol=1e-10)
        np.testing.assert_allclose(report.area(by, distance=True), area(np.abs(1 - y), shares), atol=1e-10)
    assert (report.cpr, report.cmd) == (report.area("signed"), report.area("absolute", distance=True))
    assert len({round(f, 3) for f in frame["f"]}) > 4  # or an order that is ignored would go unnoticed


def test_the_ends_of_a_curve_are_nothing_and_everything(model: Any, scores: ns.SweepResult) -> None:
    report = ns.faithfulness(model, scores, *PAIRS, METRIC, shares=[0.0, 1.0], progress=False)
    np.testing.assert_allclose(report.f(), [0, 0, 1, 1] * 2, atol=1e-10)
    np.testing.assert_allclose(report.cpr, 0.5, atol=1e-10)


def test_intervals_are_those_of_prompts_drawn_again(model: Any, scores: ns.SweepResult) -> None:
    report = ns.faithfulness(model, scores, *PAIRS, METRIC, shares=[0.05, 0.3, 1.0], progress=False)
    rng = np.random.default_rng(1)
    drawn: list[np.ndarray] = []
    for _ in range(4000):
        rows = rng.integers(0, 4, 4)
        full, empty = report.full[rows].mean(), report.empty[rows].mean()
        drawn.append((report.values[rows].mean(0) - empty) / (full - empty))
    expected = np.quantile(np.array(drawn), [0.1, 0.9], axis=0).T
    found = report.ci(level=0.8, draws=4000)
    assert np.abs(found - expected).max() < 0.05 * np.abs(expected).max()
    low, high = report.ci("cpr", 0.8)
    assert low <= report.cpr <= high and low < high
    np.testing.assert_array_equal(found, report.ci(level=0.8, draws=4000))


def test_scores_of_nodes_make_a_curve_of_nodes(model: Any) -> None:
    scored = ns.ablate(model, PAIRS[0], SITES[1:], METRIC, progress=False)
    report = ns.faithfulness(model, scored, *PAIRS, METRIC, shares=[0.2, 1.0], progress=False)
    np.testing.assert_allclose(report.f()[[2, 3]], 1.0, atol=1e-10)
    circuit = ns.Circuit.top(scored, 3)
    assert len(circuit) == 4 and "embed" in circuit
    with_empty = circuit.run(model, *PAIRS, METRIC).mean() - report.empty.mean()
    f = with_empty / (report.full - report.empty).mean()
    np.testing.assert_allclose(report.frame().query("by == 'absolute' and share == 0.2")["f"], f, atol=1e-10)


@pytest.mark.parametrize("operation", ["zero", "mean", lambda value: value / 2])
def test_the_score_of_an_ablated_node_is_what_is_lost_without_it(model: Any, operation: Any) -> None:
    reference = ns.capture(model, PAIRS[1], [f"{site}.output[0]" for site in SITES[1:]])
    more: dict[str, Any] = {"reference": reference} if operation == "mean" else {}
    ablated = ns.ablate(model, PAIRS[0], SITES[1:], METRIC, operation=operation, progress=False, **more)
    lost = (ablated.table.corrupted[:, None] - ablated.table.values).mean(0)
    top = ns.Circuit.top(ablated, 3, by="signed")
    assert [name for name in map(str, top.nodes) if name != "embed"] == [
        cell.path.removesuffix(".output[:]")
        for cell, score in zip(ablated.table.cells, lost, strict=True)
        if score in sorted(lost)[-3:]
    ]
    assert sorted(top.scores or ())[-3:] == sorted(lost)[-3:]
    report = ns.faithfulness(model, ablated, *PAIRS, METRIC, shares=[3 / len(lost), 1.0], progress=False)
    first = report.values[:, [point.by for point in report.points].index("signed")]
    np.testing.assert_allclose(first, top.run(model, *PAIRS, METRIC), rtol=0, atol=1e-10)


def test_with_other_ablations_pruning_is_measured(model: Any, scores: ns.SweepResult) -> None:
    report = ns.faithfulness(model, scores, PAIRS[0], None, METRIC, ablation="zero", shares=[0.05, 0.3], progress=False)
    empty = ns.Circuit.empty(model).run(model, PAIRS[0], None, METRIC, ablation="zero")
    np.testing.assert_allclose(report.empty, empty, atol=1e-10)
    for number, point in enumerate(report.points):
        circuit = ns.Circuit.select(scores, point.share, point.by)  # type: ignore[arg-type]
        circuit = circuit.pruned() if point.pruned else circuit
        found = circuit.run(model, PAIRS[0], None, METRIC, ablation="zero")
        np.testing.assert_allclose(report.values[:, number], found, atol=1e-10)


def test_ends_that_lie_within_chance_are_told(model: Any) -> None:
    near = ["w3 w4 w3", "w9 w4 w3"], ["w3 w4 w6", "w9 w4 w6"]
    circuit = ns.Circuit.of(edges=[("embed", "unembed")])
    with pytest.warns(UserWarning, match="standard error") as caught:
        report = ns.faithfulness(model, circuit, *near, METRIC, progress=False)
    assert "say little" in report.run.note and len(caught) == 1
    assert caught[0].filename == __file__


def test_a_circuit_without_a_path_is_told(model: Any) -> None:
    circuit = ns.Circuit.of(edges=[("layers[0].mlp", "layers[1].mlp"), ("layers[1].mlp", "unembed")])
    with pytest.warns(UserWarning, match="none of the 2 edges") as caught:
        report = ns.faithfulness(model, circuit, *PAIRS, METRIC, progress=False)
    assert "path from embed to unembed" in report.run.note and caught[0].filename == __file__
    np.testing.assert_allclose(report.values[:, 0], report.empty, atol=1e-10)


def test_one_circuit_and_several_are_points_without_a_curve(model: Any) -> None:
    first = ns.Circuit.of(edges=[("embed", "unembed")])
    report = ns.faithfulness(model, [first, ns.Circuit.full(model)], *PAIRS, METRIC, progress=False)
    assert [point.n for point in report.points] == [1, 262]
    np.testing.assert_allclose(report.values[:, 0], first.run(model, *PAIRS, METRIC), atol=1e-10)
    with pytest.raises(ns.errors.BadArgument, match="no curve"):
        _ = report.cpr


def test_what_it_cost_is_told(model: Any, scores: ns.SweepResult) -> None:
    report = ns.faithfulness(model, scores, *PAIRS, METRIC, shares=[0.1, 1.0], progress=False)
    assert report.run.forwards > 0 and report.run.tokens > 0 and report.run.flops > 0


def test_it_is_drawn_as_lines(model: Any, scores: ns.SweepResult) -> None:
    report = ns.faithfulness(model, scores, *PAIRS, METRIC, shares=[0.1, 1.0], progress=False)
    axes = report.plot()
    assert len(axes.get_lines()) == 5  # four curves and the level
    assert "CPR" in repr(report) and "CMD" in repr(report)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"shares": [0.5, 0.1]}, "growing"),
        ({"shares": []}, "growing"),
        ({"shares": [0.1, 1.5]}, "growing"),
        ({"circuits": "scores"}, "neither circuits nor scores"),
        ({"circuits": []}, "neither circuits nor scores"),
        ({"ablation": "noise"}, "no ablation 'noise'"),
        ({"ablation": 3}, "no ablation"),
        ({"reference": "w3 w4"}, "only ablation"),
        ({"corrupted": None}, "corrupted is None"),
        ({"corrupted": ["w3 w4 w5 w6"] * 4}, "do not correspond"),
        ({"corrupted": ["w3 w4 w5"]}, "4 clean prompts and 1"),
    ],
)
def test_mistakes_are_answered(model: Any, scores: ns.SweepResult, given: dict[str, Any], match: str) -> None:
    asked = {"circuits": scores, "clean": PAIRS[0], "corrupted": PAIRS[1], "metric": METRIC, "progress": False, **given}
    with pytest.raises(ns.errors.NnspliceError, match=match):
        ns.faithfulness(model, **asked)


def test_an_area_is_of_the_circuits_of_one_order_as_they_are_or_pruned() -> None:
    """By hand, with values that no two points share: f of the points is 0, 1 | 0.5, 0.25 | 2, 4."""
    kinds = [("signed", False), ("signed", False), ("signed", True), ("signed", True), ("absolute", False)]
    points = [Point(by, pruned, share, 1, 1) for (by, pruned), share in zip(kinds, (0, 0.5, 0, 0.5, 0), strict=True)]
    points.append(Point("absolute", False, 0.5, 1, 1))
    values = np.array([[1.0, 3.0, 2.0, 1.5, 5.0, 9.0]])
    report = Faithfulness(tuple(points), values, np.array([3.0]), np.array([1.0]), "m", Run("circuits", 0.0))
    np.testing.assert_allclose(report.f(), [0, 1, 0.5, 0.25, 2, 4])
    np.testing.assert_allclose([report.cpr, report.area("signed", pruned=True), report.cmd], [0.25, 0.1875, 1.0])


@pytest.mark.parametrize("changed", [False, True])
def test_a_file_with_another_number_is_refused(tmp_path: Path, changed: bool) -> None:
    points = (Point("signed", False, 0.5, 3, 2), Point(None, True, 1.0, 6, 6))
    values = np.arange(4, dtype=np.float64).reshape(2, 2)
    report = Faithfulness(points, values, np.array([3.0, 4.0]), np.array([1.0, 2.0]), "m", Run("circuits", 0.5))
    path = tmp_path / "report.safetensors"
    report.to_file(path)
    if not changed:
        back = Faithfulness.from_file(path)
        assert (back.points, back.metric, back.run, back.values.tolist()) == (points, "m", report.run, values.tolist())
        return
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(FileError, match="not what was written"):
        Faithfulness.from_file(path)
