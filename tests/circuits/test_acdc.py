"""`acdc` against the same search with one run for each edge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nnsplice as ns
from zoo import double

METRIC = ns.logit_diff("w7", "w8")
PAIRS = ["w3 w4 w5", "w9 w4 w5"], ["w3 w4 w3", "w9 w4 w3"]


def some_of(model: Any) -> ns.Circuit:
    """A part of the edges, as trying all of them one by one takes long."""
    rng = np.random.default_rng(0)
    edges = ns.Circuit.full(model).edges
    kept = [edge for edge in edges if rng.random() < 0.25 or "unembed" in map(str, edge)]
    return ns.Circuit.of(edges=kept, model=model)


def one_by_one(model: Any, circuit: ns.Circuit, threshold: float) -> ns.Circuit:
    """The search as it is told, an edge at a time."""
    start = circuit.shape
    assert start is not None
    now = circuit.run(model, *PAIRS, METRIC).mean()
    for receiver in reversed(start.receivers):
        for sender in reversed(start.senders):
            if (sender, receiver) not in circuit:
                continue
            without = circuit - ns.Circuit.of(edges=[(sender, receiver)])
            value = without.run(model, *PAIRS, METRIC).mean()
            if abs(value - now) < threshold:
                circuit, now = without, value
    return circuit.pruned()


@pytest.mark.parametrize(("family", "threshold"), [("gpt2", 0.05), ("llama", 0.02), ("gptj", 0.02), ("olmo2", 0.02)])
def test_batches_give_what_one_run_for_each_edge_gives(family: str, threshold: float) -> None:
    model = double(family)
    start = some_of(model)
    found = ns.acdc(model, *PAIRS, METRIC, threshold=threshold, start=start, progress=False)
    assert found == one_by_one(model, start, threshold)
    assert 3 < len(found) < 0.7 * len(start)
    assert found.scores is not None and min(found.scores) >= threshold
    assert found.provenance["threshold"] == threshold


def test_it_begins_with_the_edges_that_it_is_given() -> None:
    model = double("gpt2")
    start = ns.Circuit.of(edges=[("embed", "unembed"), ("embed", "layers[0].mlp"), ("layers[0].mlp", "unembed")])
    found = ns.acdc(model, *PAIRS, METRIC, threshold=1e-9, start=start, progress=False)
    assert found == start
    assert len(ns.acdc(model, *PAIRS, METRIC, threshold=1e9, start=start, progress=False)) == 0


def test_after_a_stop_it_goes_on_from_its_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = double("gpt2")
    path = tmp_path / "acdc.jsonl"
    runs: list[int] = []
    inside = ns.acdc.__globals__  # where it looks its runs up
    plain = inside["measure"]

    def counted(question: Any, masks: Any, **options: Any) -> Any:
        runs.append(len(masks))
        if len(runs) == stop:
            raise KeyboardInterrupt
        return plain(question, masks, **options)

    monkeypatch.setitem(inside, "measure", counted)
    stop = -1
    asked: dict[str, Any] = {"threshold": 0.05, "start": some_of(model), "progress": False}
    expected = ns.acdc(model, *PAIRS, METRIC, **asked)
    whole, stop = len(runs), 6
    assert whole > 6
    runs.clear()
    with pytest.raises(KeyboardInterrupt):
        ns.acdc(model, *PAIRS, METRIC, journal=path, **asked)
    runs.clear()
    stop = -1
    found = ns.acdc(model, *PAIRS, METRIC, journal=path, **asked)
    assert found == expected and len(runs) == whole - 5
    np.testing.assert_array_equal(found.scores, expected.scores)  # type: ignore[arg-type]
    with pytest.raises(ns.errors.FileError, match="threshold"):
        ns.acdc(model, *PAIRS, METRIC, journal=path, **{**asked, "threshold": 0.06})


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"threshold": 0}, "threshold=0"),
        ({"threshold": "small"}, "threshold='small'"),
        ({"start": ns.Circuit.of(nodes=["embed"])}, "a circuit of edges"),
        ({"metric": ns.Metric.of(lambda logits: logits[:, 0] * float("nan"))}, "is NaN"),
    ],
)
def test_mistakes_are_answered(given: dict[str, Any], match: str) -> None:
    asked = {"metric": METRIC, "threshold": 0.1, "progress": False, **given}
    with pytest.raises(ns.errors.NnspliceError, match=match):
        ns.acdc(double("gpt2"), *PAIRS, asked.pop("metric"), **asked)


def test_pruning_keeps_what_heads_read_through_a_norm_over_all_of_them(tmp_path: Path) -> None:
    model = double("olmo2")
    rng = np.random.default_rng(3)
    every = ns.Circuit.full(model).edges
    pruned = 0
    for _ in range(6):
        circuit = ns.Circuit.of(edges=[edge for edge in every if rng.random() < 0.25], model=model)
        circuit.to_file(tmp_path / "circuit.json")
        for one in (circuit, ns.Circuit.from_file(tmp_path / "circuit.json")):
            smaller = one.pruned()
            pruned += len(one) - len(smaller)
            np.testing.assert_allclose(
                smaller.run(model, *PAIRS, METRIC), one.run(model, *PAIRS, METRIC), rtol=0, atol=1e-12
            )
    assert pruned > 10
