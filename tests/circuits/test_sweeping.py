"""Many circuits as one result: the numbers of single runs, on a scale from the empty circuit to the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import nnsplice as ns
from zoo import double

METRIC = ns.logit_diff("w7", "w8")
PAIRS = ["w3 w4 w27", "w9 w4 w27", "w11 w4 w13 w27"], ["w3 w4 w28", "w9 w4 w28", "w11 w4 w13 w28"]


@pytest.fixture(scope="module")
def model() -> Any:
    return double("llama")


@pytest.fixture(scope="module")
def circuits(model: Any) -> dict[str, ns.Circuit]:
    rng = np.random.default_rng(0)
    full = ns.Circuit.full(model)
    some = {f"{share}": [edge for edge in full.edges if rng.random() < share] for share in (0.2, 0.5, 0.9)}
    found = {name: ns.Circuit.of(edges=edges, model=model) for name, edges in some.items()}
    return {**found, "heads": ns.Circuit.of(nodes=["embed", "layers[1:].heads[:]"], model=model), "all": full}


def test_each_cell_is_the_run_of_that_circuit(model: Any, circuits: dict[str, ns.Circuit]) -> None:
    result = ns.sweep_circuits(model, circuits, *PAIRS, METRIC, progress=False)
    for name, circuit in circuits.items():
        np.testing.assert_allclose(result.grid().sel(set=name), circuit.run(model, *PAIRS, METRIC), atol=1e-7)
    np.testing.assert_allclose(result.clean, circuits["all"].run(model, *PAIRS, METRIC), atol=1e-7)
    np.testing.assert_allclose(result.corrupted, ns.Circuit.empty(model).run(model, *PAIRS, METRIC), atol=1e-7)
    report = ns.faithfulness(model, list(circuits.values()), *PAIRS, METRIC, progress=False)
    np.testing.assert_allclose(result.effect().mean("prompt"), report.f(), atol=1e-7)
    assert result.run.executor == "circuits" and result.run.tokens > 0


@pytest.mark.parametrize("max_tokens", [1, 12, 20])
def test_how_many_run_at_once_changes_nothing(model: Any, circuits: dict[str, ns.Circuit], max_tokens: int) -> None:
    whole = ns.sweep_circuits(model, circuits, *PAIRS, METRIC, progress=False)
    part = ns.sweep_circuits(model, circuits, *PAIRS, METRIC, max_tokens=max_tokens, progress=False)
    np.testing.assert_allclose(part.table.values, whole.table.values, atol=1e-7)
    assert part.run.block_calls > whole.run.block_calls  # or it was not heard


def test_the_streams_that_are_held_count_as_tokens(model: Any, circuits: dict[str, ns.Circuit]) -> None:
    from nnsplice.circuits.measuring import STREAMS, Question, measure

    question = Question.of(model, *PAIRS, METRIC, "patch")
    masks = [one.mask(question.wiring.shape) for one in circuits.values()]
    each = 1 + (len(question.wiring.shape.senders) + 8) / STREAMS  # four heads, keys and values of two groups
    for room in (4, 12, 30, 1000):
        peak = measure(question, masks, max_tokens=room).cost.peak
        assert peak <= max(room / each, 4)  # a prompt of four tokens is never cut
    assert peak > 20


def test_a_result_goes_to_a_file_a_figure_and_a_page(
    model: Any, circuits: dict[str, ns.Circuit], tmp_path: Path
) -> None:
    result = ns.sweep_circuits(model, list(circuits.values()), *PAIRS, METRIC, progress=False)
    result.to_file(tmp_path / "r.safetensors")
    back = ns.SweepResult.from_file(tmp_path / "r.safetensors")
    assert back == result and back.cells[0].set == "circuit 0"
    assert len(result.frame()) == 3 * len(circuits) and result.best(1)["path"].tolist()
    result.plot()
    result.to_html(tmp_path / "r.html")


def test_other_circuits_are_another_question(model: Any, circuits: dict[str, ns.Circuit]) -> None:
    first, second = (
        ns.sweep_circuits(model, {"one": one}, *PAIRS, METRIC, progress=False)
        for one in (circuits["all"], ns.Circuit.of(nodes=["embed", "layers[:].heads[:]", "layers[:].mlp"], model=model))
    )
    np.testing.assert_allclose(first.table.values, second.table.values, atol=1e-7)
    assert first != second


@pytest.mark.parametrize("given", [[], ns.Circuit.of(nodes=["embed"]), ["embed"], {"a": 3}, "all"])
def test_what_is_no_list_of_circuits_is_told(model: Any, given: Any) -> None:
    with pytest.raises(ns.errors.NnspliceError, match="circuit"):
        ns.sweep_circuits(model, given, *PAIRS, METRIC, progress=False)


def doubled(logits: torch.Tensor) -> torch.Tensor:
    """Another number of the same logits."""
    return 2.0 * (logits[:, 7] - logits[:, 8]) + 0.1


def test_several_metrics_are_those_of_runs_for_each(model: Any, circuits: dict[str, ns.Circuit]) -> None:
    metrics = {"diff": METRIC, "p": ns.Metric.of(doubled), "kl": ns.kl_divergence()}
    result = ns.sweep_circuits(model, circuits, *PAIRS, metrics, progress=False)
    assert result.metrics == ("diff", "p", "kl")
    report = ns.faithfulness(model, list(circuits.values()), *PAIRS, metrics, progress=False)
    run = circuits["0.5"].run(model, *PAIRS, metrics)
    assert run.shape == (3, 3)
    for at, (name, metric) in enumerate(metrics.items()):
        alone = ns.sweep_circuits(model, circuits, *PAIRS, metric, progress=False)
        np.testing.assert_allclose(result.only(name).table.values, alone.table.values, rtol=0, atol=1e-12)
        np.testing.assert_allclose(run[:, at], circuits["0.5"].run(model, *PAIRS, metric), rtol=0, atol=1e-12)
        one = ns.faithfulness(model, list(circuits.values()), *PAIRS, metric, progress=False)
        np.testing.assert_allclose(report.only(name).f(), one.f(), rtol=0, atol=1e-9)
    assert report.frame()["metric"].tolist() == [name for name in metrics for _ in circuits]
    assert repr(report).count("Faithfulness") == 3
    scores = ns.attribute(model, *PAIRS, ["embed", "layers[:].heads[:]", "layers[:].mlp"], METRIC, method="eap",
                          progress=False)  # fmt: skip
    curve = ns.faithfulness(model, scores, *PAIRS, metrics, shares=[0.2, 1.0], progress=False)
    assert np.isfinite(curve.only("p").cpr) and curve.only("diff").ci("cpr").shape == (2,)
    for what in (lambda: report.f(), lambda: curve.cpr, lambda: curve.ci(), lambda: curve.plot()):
        with pytest.raises(ns.errors.BadArgument, match=r"report.only\('diff'\)"):
            what()
    with pytest.raises(ns.errors.BadArgument, match="no metric 'q'"):
        report.only("q")


def test_what_is_about_one_number_refuses_several(model: Any, circuits: dict[str, ns.Circuit]) -> None:
    metrics = [METRIC, ns.probability("w7")]
    for call in (
        lambda: ns.acdc(model, *PAIRS, metrics, threshold=0.1),  # type: ignore[arg-type]
        lambda: ns.minimality(model, circuits["0.5"], *PAIRS, metrics),  # type: ignore[arg-type]
        lambda: ns.completeness(model, circuits["0.5"], *PAIRS, metrics),  # type: ignore[arg-type]
    ):
        with pytest.raises(ns.errors.BadArgument, match="one metric"):
            call()
