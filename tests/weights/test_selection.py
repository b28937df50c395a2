"""The algebra of selections is that of sets, and costs bytes until masks are asked for."""

from __future__ import annotations

import operator
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import zoo
from nnsplice import weights as w
from nnsplice.atlas import Selection

SHAPES = {"a": (6, 2), "b": (4,), "c": (3, 5), "d": (2, 2, 3)}
AXES = {"a": 0, "b": 0, "c": 1, "d": 2}


@st.composite
def selections(draw) -> Selection:
    parts = {}
    for name in draw(st.lists(st.sampled_from(sorted(SHAPES)), unique=True)):
        size = SHAPES[name][AXES[name]]
        edges = st.tuples(st.integers(0, size), st.integers(0, size)).map(lambda pair: tuple(sorted(pair)))
        parts[name] = draw(st.none() | st.lists(edges, max_size=4).map(lambda found, n=name: (AXES[n], tuple(found))))
    return Selection.of(parts, SHAPES)


def numbers(selection: Selection) -> set[tuple[str, int]]:
    """The numbers themselves, one by one, by way of the masks."""
    found = set()
    for name, mask in selection.masks().items():
        whole = torch.ones(SHAPES[name], dtype=torch.bool) if mask is None else mask
        found |= {(name, int(i)) for i in whole.flatten().nonzero().flatten()}
    return found


EVERYTHING = numbers(Selection.of(dict.fromkeys(SHAPES), SHAPES))


@given(selections(), selections())
def test_operators_are_those_of_sets(one, other):
    a, b = numbers(one), numbers(other)
    assert numbers(one | other) == a | b
    assert numbers(one & other) == a & b
    assert numbers(one - other) == a - b
    assert numbers(~one) == EVERYTHING - a


@given(selections(), selections(), selections())
def test_laws(a, b, c):
    assert a | b == b | a and a & b == b & a
    assert (a | b) | c == a | (b | c) and (a & b) & c == a & (b & c)
    assert a & (b | c) == (a & b) | (a & c) and a | (b & c) == (a | b) & (a | c)
    assert ~(a | b) == ~a & ~b and ~(a & b) == ~a | ~b and ~~a == a
    assert a - b == a & ~b and a | a == a & a == a


@given(selections(), selections())
def test_parts_of_a_partition_add_up(a, b):
    assert (a - b).numel() + (a & b).numel() == a.numel()
    assert a.numel() + (~a).numel() == len(EVERYTHING)
    assert not len(a - a) and not len(a & ~a) and len(a | ~a) == len(SHAPES)


@given(selections())
def test_a_selection_has_one_form(a):
    """Equal choices are equal values: nothing empty, nothing touching, and all of a parameter is None."""
    assert a.numel() == len(numbers(a)) and set(a) == {name for name, _ in numbers(a)}
    for name, part in a.parts.items():
        if part is not None:
            ranges = part[1]
            assert ranges and ranges != ((0, SHAPES[name][part[0]]),)
            assert all(start < stop for start, stop in ranges)
            assert all(x[1] < y[0] for x, y in pairwise(ranges))
    assert hash(a) == hash(Selection.of(dict(reversed(a.parts.items())), SHAPES))


def test_places_of_a_model_partition_it():
    model = zoo.build("llama")
    heads = [w.select(model, f"l1h{head}.q") for head in range(4)]
    whole = w.select(model, "layers[1].attn.q")
    assert sum(head.numel() for head in heads) == whole.numel()
    assert not len(heads[0] & heads[1]) and heads[0] | heads[1] | heads[2] | heads[3] == whole
    assert whole - heads[2] == heads[0] | heads[1] | heads[3]
    outside = ~w.select(model, "layers[:]")
    assert outside == w.select(model, ["embed", "final_norm", "unembed"])
    # Two query heads of one group share its key.
    shared = w.select(model, "l1h0") & w.select(model, "l1h1")
    assert shared == w.select(model, ["layers[1].groups[0].k", "layers[1].groups[0].v"])


def test_selections_of_different_models_do_not_mix():
    one = Selection.of({"a": None}, {"a": (3, 2)})
    with pytest.raises(ValueError, match="one model"):
        _ = one | Selection.of({"a": None}, {"a": (4, 2)})
    with pytest.raises(ValueError, match="another model"):
        w.select(zoo.build("gpt2"), w.select(zoo.build("llama"), "l0"))


@pytest.mark.parametrize("combine", [operator.or_, operator.and_, operator.sub])
def test_selections_of_models_with_other_names_do_not_mix(combine):
    with pytest.raises(ValueError, match=r"model\.embed_tokens\.weight is a parameter of one"):
        combine(w.select(zoo.build("gpt2"), "l0"), w.select(zoo.build("llama"), "l0"))


def test_two_axes_of_one_parameter_cannot_be_joined():
    rows, columns = (Selection.of({"a": (axis, ((0, 1),))}, {"a": (3, 2)}) for axis in (0, 1))
    for operation in (lambda: rows | columns, lambda: rows & columns, lambda: rows - columns):
        with pytest.raises(ValueError, match="axis 0 and along axis 1"):
            operation()
    whole = Selection.of({"a": None}, {"a": (3, 2)})
    assert rows & whole == rows and columns | whole == whole


def test_a_million_rows_cost_bytes():
    shapes = {"w": (1_000_000, 8192)}
    one, other = Selection.of({"w": (0, ((0, 500_000),))}, shapes), Selection.of({"w": (0, ((7, 9),))}, shapes)
    both = one - other | ~one
    assert both.numel() == (1_000_000 - 2) * 8192 and both.parts["w"] == (0, ((0, 7), (9, 1_000_000)))
    mask = both.mask("w")
    assert mask is not None and mask.untyped_storage().nbytes() == 1_000_000


def test_a_tree_says_how_much():
    selection = Selection.of({"h.10.w": (0, ((0, 1),)), "h.2.w": None}, {"h.10.w": (1000, 4), "h.2.w": (2, 1)})
    assert selection.tree().splitlines() == [
        "h",
        "├── 2.w   ████████████████████████  100.0%  (2 of 2)",
        "└── 10.w  █░░░░░░░░░░░░░░░░░░░░░░░    0.1%  (4 of 4,000)",
        "2 parameters  (6 of 4,002)",
    ]
