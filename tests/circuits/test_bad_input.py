"""What bad input gets: what was found, what was expected, and what to write instead."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import pytest

import nnsplice as ns
from zoo import double

METRIC = ns.logit_diff("w7", "w8")
PAIR = "w3 w4 w5 w6 w8", "w3 w9 w5 w16 w7"
SITES = ["embed", "layers[:].heads[:]", "layers[:].mlp"]
errors = ns.errors


@lru_cache
def gpt2() -> Any:
    return double("gpt2")


@lru_cache
def llama() -> Any:
    return double("llama")


@lru_cache
def scores(family: str = "gpt2", prompts: int = 1) -> ns.SweepResult:
    pair = PAIR if prompts == 1 else ([PAIR[0]] * prompts, [PAIR[1]] * prompts)
    return ns.attribute(double(family), *pair, SITES, METRIC, method="eap", progress=False)


@lru_cache
def node_scores() -> ns.SweepResult:
    return ns.ablate(gpt2(), PAIR[0], SITES[1:], METRIC, progress=False)


def with_nan(prompts: int, sender: int, receiver: int) -> ns.SweepResult:
    table = scores(prompts=prompts).table
    assert table.edges is not None
    edges = table.edges.copy()
    assert not np.isnan(edges[0, sender, receiver])
    edges[0, sender, receiver] = np.nan
    return ns.SweepResult(replace(table, edges=edges))


def circuit() -> ns.Circuit:
    return ns.Circuit.top(scores(), 20)


def edge(sender: str, receiver: str, model: Any = None) -> ns.Circuit:
    return ns.Circuit.of(edges=[(sender, receiver)], model=model)


#: What is done, the error, what it finds, what it expects, what it says to write.
CASES: dict[str, tuple[Callable[[], Any], type[Exception], str, str, str]] = {
    "an edge against the order": (
        lambda: edge("layers[2].mlp", "layers[0].mlp"), errors.BadArgument,
        "layers[2].mlp runs after layers[0].mlp", "a sender that runs before", "Circuit.full(model).edges",
    ),
    "an edge against the order of one model, at its run": (
        lambda: edge("layers[0].heads[0]", "layers[0].mlp").run(double("gptj"), *PAIR, METRIC), errors.BadArgument,
        "layers[0].heads[0] runs after layers[0].mlp", "a sender that runs before", "Circuit.full(model).edges",
    ),
    "a receiver that is not there": (
        lambda: edge("embed", "layers[0].groups[3].k", llama()), errors.UnknownPath,
        "no receiver layers[0].groups[3].k", "layers[0].groups[1].k", "in_degree",
    ),
    "a receiver that is not there, at the run": (
        lambda: edge("embed", "layers[7].mlp").run(gpt2(), *PAIR, METRIC), errors.UnknownPath,
        "no receiver layers[7].mlp", "layers[2].mlp", "in_degree",
    ),
    "a circuit of another model": (
        lambda: circuit().run(llama(), *PAIR, METRIC), errors.KeyMismatch,
        "made of GPT2LMHeadModel", "the model that it was made of", "circuit.on(model)",
    ),
    "scores of another model": (
        lambda: ns.faithfulness(llama(), scores(), *PAIR, METRIC, progress=False), errors.KeyMismatch,
        "made of GPT2LMHeadModel", "the model that it was made of", "circuit.on(model)",
    ),
    "circuits of two models": (
        lambda: circuit() | ns.Circuit.full(llama()), errors.KeyMismatch,
        "other heads or layers", "one model's", "circuit.on(model)",
    ),
    "scores without edges": (
        lambda: ns.Circuit.greedy(node_scores(), 3), errors.BadArgument,
        "scores of nodes alone", "a result with edges", 'method="eap-ig"',
    ),
    "a NaN score, of several prompts": (
        lambda: ns.Circuit.top(with_nan(2, 0, 0), 3), errors.BadArgument,
        "1 scores are NaN", "a metric that is a number", "result.frame()",
    ),
    "a NaN score, of one prompt": (
        lambda: ns.Circuit.top(with_nan(1, 0, 0), 3), errors.BadArgument,
        "the score of embed -> layers[0].heads[0].q is NaN", "a metric that is a number", "result.edges()",
    ),
    "a NaN score of a head and its own MLP": (
        lambda: ns.faithfulness(gpt2(), with_nan(1, 1, 12), *PAIR, METRIC, progress=False), errors.BadArgument,
        "the score of layers[0].heads[0] -> layers[0].mlp is NaN", "a metric that is a number", "result.edges()",
    ),
    "unequal lengths in a pair": (
        lambda: circuit().run(gpt2(), "w3 w4 w5", "w3 w4", METRIC), errors.ShapeError,
        "pair 0: the clean prompt has 3 tokens, the corrupted one 2", "prompts of one length", 'ablation="mean"',
    ),
    "unequal numbers of prompts": (
        lambda: circuit().run(gpt2(), ["w3 w4 w5"] * 2, "w3 w4 w7", METRIC), errors.ShapeError,
        "2 clean prompts and 1 corrupted", "prompt i with prompt i", 'ablation="mean"',
    ),
    "unequal lengths in a pair of scores": (
        lambda: ns.attribute(gpt2(), "w3 w4 w5", "w3 w4", SITES, METRIC, method="eap"), errors.ShapeError,
        "pair 0: the clean prompt has 3 tokens, the corrupted one 2", "prompts of one length", 'align="end"',
    ),
    "more edges than there are": (
        lambda: ns.Circuit.top(scores(), 263), errors.BadArgument,
        "k=263, and there are 262 scored edges", "from 0 to 262", "Circuit.top(result, 262)",
    ),
    "more edges than there are, grown": (
        lambda: ns.Circuit.greedy(scores(), 263), errors.BadArgument,
        "k=263, and there are 262 scored edges", "from 0 to 262", "Circuit.top(result, 262)",
    ),
    "a share in the place of a number": (
        lambda: ns.Circuit.top(scores(), 0.02), errors.BadArgument,  # type: ignore[arg-type]
        "k=0.02", "a whole number", "Circuit.select(result, 0.02)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_it_says_what_was_found_what_was_expected_and_what_to_write(name: str) -> None:
    call, kind, found, expected, write = CASES[name]
    with pytest.raises(kind) as raised:
        call()
    lines = str(raised.value).splitlines()
    assert found in lines[0]
    assert any(line.strip().startswith("expected:") and expected in line for line in lines), lines
    assert any(line.strip().startswith("write:") and write in line for line in lines), lines


@pytest.mark.parametrize("family", ["gpt2", "gptj", "llama"])
def test_edges_that_a_model_has_not_are_no_nan(family: str) -> None:
    assert len(ns.Circuit.top(scores(family), 30)) == 30  # heads and MLP of a layer beside each other among them
