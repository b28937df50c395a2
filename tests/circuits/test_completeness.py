"""Completeness and minimality, against runs of circuits that are put together by hand."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest

import nnsplice as ns
from nnsplice.circuits.completeness import Completeness
from nnsplice.results import Run
from zoo import double

METRIC = ns.logit_diff("w7", "w8")
PAIRS = ["w3 w4 w5", "w9 w4 w5"], ["w3 w4 w3", "w9 w4 w3"]
NODES = ["embed", "layers[0].mlp", "layers[1].heads[2]", "layers[2].mlp"]


@pytest.fixture(scope="module")
def model() -> Any:
    return double("llama")


def mean(model: Any, circuit: ns.Circuit) -> float:
    return float(circuit.run(model, *PAIRS, METRIC).mean())


def everything(model: Any) -> ns.Circuit:
    return ns.Circuit.of(nodes=["embed", "layers[:].heads[:]", "layers[:].mlp"], model=model)


def test_completeness_is_the_circuit_beside_the_model_without_the_same_nodes(model: Any) -> None:
    circuit = ns.Circuit.of(nodes=NODES)
    sets = [["layers[0].mlp"], ["layers[1].heads[2]", "layers[2].mlp"], []]
    report = ns.completeness(model, circuit, *PAIRS, METRIC, sets=sets, random=0, progress=False)
    for nodes, score in zip(sets, report.scores, strict=True):
        out = ns.Circuit.of(nodes=nodes)
        expected = abs(mean(model, circuit - out) - mean(model, everything(model) - out))
        np.testing.assert_allclose(score, expected, atol=1e-7)
    assert report.scores.min() > 1e-3
    assert report.frame()["score"].is_monotonic_decreasing


def test_the_whole_model_is_complete(model: Any) -> None:
    report = ns.completeness(model, everything(model), *PAIRS, METRIC, random=4, greedy=1, progress=False)
    np.testing.assert_allclose(report.scores, 0.0, atol=1e-7)
    assert sorted(set(report.found_by)) == ["greedy", "random"]


def test_what_is_taken_out_greedily_makes_the_difference_largest(model: Any) -> None:
    circuit = ns.Circuit.of(nodes=NODES)
    report = ns.completeness(model, circuit, *PAIRS, METRIC, random=0, greedy=2, progress=False)

    def apart(nodes: tuple[str, ...]) -> float:
        out = ns.Circuit.of(nodes=nodes)
        return abs(mean(model, circuit - out) - mean(model, everything(model) - out))

    first = max(((node,) for node in NODES[1:]), key=apart)
    second = max((pair for pair in combinations(NODES[1:], 2) if first[0] in pair), key=apart)
    assert [tuple(map(str, nodes)) for nodes in report.sets] == [first, second]


def test_of_edges_a_node_is_taken_out_with_all_that_starts_there(model: Any) -> None:
    edges = [("embed", "layers[0].mlp"), ("layers[0].mlp", "layers[2].mlp"), ("layers[2].mlp", "unembed")]
    circuit = ns.Circuit.of(edges=edges)
    report = ns.completeness(model, circuit, *PAIRS, METRIC, sets=[["layers[2].mlp"]], random=0, progress=False)
    full = ns.Circuit.full(model)
    out = [edge for edge in full.edges if str(edge[0]) == "layers[2].mlp"]
    np.testing.assert_allclose(report.circuit.mean(), mean(model, ns.Circuit.of(edges=edges[:2])), atol=1e-7)
    np.testing.assert_allclose(report.model.mean(), mean(model, full - ns.Circuit.of(edges=out)), atol=1e-7)


def test_minimality_is_the_most_that_a_node_does_beside_any_of_the_sets(model: Any) -> None:
    circuit = ns.Circuit.of(nodes=NODES)
    sets = [["layers[2].mlp"], ["layers[0].mlp", "layers[2].mlp"]]
    report = ns.minimality(model, circuit, *PAIRS, METRIC, sets=sets, random=0, progress=False)
    for node, score, with_ in zip(report.nodes, report.scores, report.sets, strict=True):
        moves: dict[tuple[str, ...], float] = {}
        for nodes in ([], *sets):
            left = [one for one in nodes if one != str(node)]
            without = circuit - ns.Circuit.of(nodes=left)
            # Nothing of the prompt enters a circuit without embed: it is the empty one.
            less = without - ns.Circuit.of(nodes=[node])
            less = less if "embed" in less else ns.Circuit.of(nodes=[])
            moves[tuple(left)] = abs(mean(model, less) - mean(model, without))
        np.testing.assert_allclose(score, max(moves.values()), atol=1e-7)
        np.testing.assert_allclose(moves[tuple(map(str, with_))], score, atol=1e-7)


def test_a_node_that_does_nothing_has_no_minimality(model: Any) -> None:
    loose = ns.Circuit.of(edges=[("embed", "unembed"), ("layers[0].mlp", "unembed")])
    report = ns.minimality(model, loose, *PAIRS, METRIC, random=3, progress=False)
    assert dict(zip(map(str, report.nodes), report.scores, strict=True))["layers[0].mlp"] == 0.0


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"sets": ["layers[0].mlp"]}, "no set of nodes"),
        ({"sets": [["layers[1].mlp"]]}, "no node of the circuit"),
        ({"random": 0}, "no sets of nodes"),
        ({"random": -1}, "random=-1"),
        ({"greedy": 1.5}, "greedy=1.5"),
        ({"circuit": ns.Circuit.of(nodes=[])}, "empty circuit"),
        ({"circuit": "layers[0].mlp"}, "no circuit"),
    ],
)
def test_mistakes_are_answered(model: Any, given: dict[str, Any], match: str) -> None:
    asked = {"circuit": ns.Circuit.of(nodes=NODES), "progress": False, **given}
    with pytest.raises(ns.errors.NnspliceError, match=match):
        ns.completeness(model, asked.pop("circuit"), *PAIRS, METRIC, **asked)


def test_scores_are_differences_of_means_in_which_prompts_may_cancel() -> None:
    circuit, whole = np.array([[1.0, 5.0], [3.0, 1.0]]), np.array([[3.0, 2.0], [1.0, 0.0]])
    report = Completeness(((), ()), ("given", "given"), circuit, whole, Run("circuits", 0.0))
    np.testing.assert_array_equal(report.scores, [0.0, 2.0])
