"""Edges that are measured: by hooks on the bare module, and where everything is a straight line, the estimates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nnsplice as ns
from attribution.oracle import bare, ends, ids
from attribution.test_nodes import linear
from circuits.oracle import by_hooks, recorded
from circuits.test_running import graph_of
from zoo import double

CLEAN, CORRUPTED = "w3 w4 w5 w6 w8", "w3 w9 w5 w16 w7"
METRIC = ns.logit_diff("w7", "w8")
SENDERS = ["embed", "layers[:].heads[:]", "layers[:].mlp"]


def _scored(model: Any, method: str, **options: Any) -> ns.SweepResult:
    return ns.attribute(model, CLEAN, CORRUPTED, SENDERS, METRIC, method=method, progress=False, **options)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "olmo2", "gptj", "qwen3_moe", "bloom"])
def test_each_edge_is_the_clean_sender_in_one_receiver_of_the_corrupted_run(family: str) -> None:
    model, module = double(family), bare(family)
    graph = graph_of(model)
    every = set(graph.edges())
    clean = recorded(module, ids(CLEAN), graph)
    frame: Any = _scored(model, "exact").edges()
    assert len(frame) == len(every)
    base = ends(module, ids(CORRUPTED))
    for number in np.random.default_rng(0).choice(len(frame), 6, replace=False):
        sender, receiver, score = (frame[name].iloc[number] for name in ("sender", "receiver", "score"))
        edge = sender.removesuffix(".output"), receiver.removesuffix(".output")
        expected = by_hooks(module, graph, ids(CORRUPTED), clean, every - {edge}) - base
        np.testing.assert_allclose(score, expected, atol=1e-7, err_msg=f"{edge}")
    assert frame["score"].abs().max() > 1e-2


def test_of_a_straight_line_estimates_are_exact() -> None:
    model = linear()
    receivers = ["layers[:].groups[:].v", "layers[:].mlp", "unembed"]
    exact, estimated = (_scored(model, method, receivers=receivers).table for method in ("exact", "eap"))
    assert exact.edges is not None and estimated.edges is not None
    np.testing.assert_allclose(exact.edges, estimated.edges, atol=1e-11)
    np.testing.assert_allclose(exact.values, estimated.values, atol=1e-11)


def test_it_says_that_it_was_measured() -> None:
    result = _scored(double("gpt2"), "exact", receivers="unembed")
    assert "measured, of" in repr(result) and "estimated" not in repr(result)
    assert result.method == "exact" and result.run.forwards > 0


def test_it_goes_on_from_its_journal(tmp_path: Path) -> None:
    model = double("gpt2")
    first = _scored(model, "exact", receivers="unembed", journal=tmp_path / "edges.jsonl")
    again = _scored(model, "exact", receivers="unembed", journal=tmp_path / "edges.jsonl")
    assert first == again and again.run.tokens < first.run.tokens


def test_checking_what_is_exact_is_refused() -> None:
    with pytest.raises(ns.errors.BadArgument, match="would do nothing"):
        _scored(double("gpt2"), "exact", verify=3)
