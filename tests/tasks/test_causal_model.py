"""Causal models against brute force: every exchange of every pair of inputs, by plain Python."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnsplice.errors import BadArgument
from nnsplice.tasks import CausalModel

SUMS = CausalModel(
    {"a": range(3), "b": range(3), "c": range(3), "ab": None, "even": None, "sum": None},
    {"sum": ("ab", "c"), "ab": ("a", "b"), "even": ("sum",)},
    {"ab": lambda a, b: a + b, "sum": lambda ab, c: ab + c, "even": lambda total: total % 2 == 0},
)


def test_every_run_is_what_plain_python_computes() -> None:
    assert SUMS.inputs == ("a", "b", "c") and SUMS.outputs == ("even",)
    assert len(SUMS.all_inputs()) == 27
    for values in SUMS.all_inputs():
        a, b, c = values.values()
        assert SUMS.run(values) == {**values, "ab": a + b, "sum": a + b + c, "even": (a + b + c) % 2 == 0}


def test_every_interchange_is_what_plain_python_computes() -> None:
    for base, source in product(SUMS.all_inputs(), repeat=2):
        assert SUMS.interchange(base, source, "ab")["sum"] == source["a"] + source["b"] + base["c"]
        assert SUMS.interchange(base, source, "a")["sum"] == source["a"] + base["b"] + base["c"]
        assert SUMS.interchange(base, source, ("ab", "c"))["sum"] == sum(source.values())
        # A variable that is set no longer follows: its own parents stay those of the base.
        assert SUMS.interchange(base, source, "sum")["ab"] == base["a"] + base["b"]


@given(st.sampled_from(["a", "b", "c", "ab", "sum"]), st.integers(0, 50))
def test_counterfactuals_are_interchanges_that_change_the_output(variable: str, seed: int) -> None:
    found = SUMS.counterfactuals(variable, 5, seed)
    assert len(found) == 5 and found == SUMS.counterfactuals(variable, 5, seed)
    for one in found:
        assert one.expected == SUMS.interchange(one.base, one.source, variable)
        assert one.expected["even"] != SUMS.run(one.base)["even"]


def test_unchanged_pairs_come_where_they_are_asked_for() -> None:
    every = SUMS.counterfactuals("c", 60, changed=False)
    assert any(one.expected["even"] == SUMS.run(one.base)["even"] for one in every)


@pytest.mark.parametrize(
    ("variables", "parents", "mechanisms", "text"),
    [
        ({"a": None}, {}, {}, "'a' follows from nothing and has no values"),
        ({"a": [1], "b": None}, {"b": ("a",)}, {}, "'b' has parents and no mechanism"),
        ({"a": [1], "b": None}, {"b": ("c",)}, {"b": abs}, "'c', which is no variable"),
        ({"a": None, "b": None}, {"a": ("b",), "b": ("a",)}, {"a": abs, "b": abs}, "a, b follow from each other"),
        ({"a": [1]}, {"z": ("a",)}, {"z": abs}, "'z' is no variable"),
    ],
)
def test_what_is_no_causal_model_is_refused(variables, parents, mechanisms, text) -> None:
    with pytest.raises(BadArgument, match=text):
        CausalModel(variables, parents, mechanisms)


def test_mistakes_in_use_are_told() -> None:
    with pytest.raises(BadArgument, match="no value for 'c'"):
        SUMS.run({"a": 1, "b": 1})
    with pytest.raises(BadArgument, match="'z' is no variable"):
        SUMS.run({"a": 1, "b": 1, "c": 1}, {"z": 1})
    with pytest.raises(BadArgument, match="'z' is no variable"):
        SUMS.interchange({"a": 1, "b": 1, "c": 1}, {"a": 1, "b": 1, "c": 1}, "z")
    idle = CausalModel({"a": range(2), "b": range(2), "out": None}, {"out": ("a",)}, {"out": lambda a: a})
    with pytest.raises(BadArgument, match="hardly ever changes out"):
        idle.counterfactuals("b", 3)
