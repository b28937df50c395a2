"""Layouts as an algebra: whatever the numbers, heads and groups share out the axis."""

from __future__ import annotations

from itertools import chain, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nnsplice.atlas.layouts import ROLES, Layout, fits, merge

KINDS = ("separate", "latent", "concat", "interleaved", "grouped", "quartered")


@st.composite
def layouts(draw) -> Layout:
    kind = draw(st.sampled_from(KINDS))
    n_kv = draw(st.integers(1, 4)) * (4 if kind == "quartered" else 1)
    shared = 1 if kind in ("interleaved", "quartered", "latent") else draw(st.integers(1, 4))
    apart = kind in ("separate", "latent")
    sizes = [draw(st.integers(0, 5)) if apart else 0 for _ in range(3)]
    return Layout(kind, n_kv * shared, n_kv, draw(st.integers(1, 5)), *sizes)


def numbers(ranges) -> list[int]:
    return [i for start, stop in ranges for i in range(start, stop)]


@given(layouts())
def test_heads_and_groups_partition_the_axis(layout):
    found = {role: numbers(layout.range(role, i) for i in range(layout.count(role))) for role in ROLES}
    found["q"] += numbers(gate for head in range(layout.n_heads) if (gate := layout.gate(head)))
    if layout.fused:
        assert sorted(chain(*found.values())) == list(range(layout.width("q")))
    elif layout.kind == "latent":
        assert sorted(found["q"]) == list(range(layout.width("q")))
        assert sorted(found["k"] + found["v"]) == list(range(layout.width("k"))) == list(range(layout.width("v")))
    else:
        assert all(sorted(found[role]) == list(range(layout.width(role))) for role in ROLES)


@given(layouts())
def test_every_range_is_one_head_wide(layout):
    for role in ROLES:
        for i in range(layout.count(role)):
            start, stop = layout.range(role, i)
            assert stop - start == layout.size(role)
            assert not layout.fused or start % layout.head_dim == 0


@given(layouts())
def test_heads_of_a_group_read_it(layout):
    assert [layout.group_of(h) for g in range(layout.n_kv) for h in layout.heads_of(g)] == [
        g for g in range(layout.n_kv) for _ in range(layout.per_group)
    ]


@given(layouts())
def test_whole_roles_are_their_heads(layout):
    for role in ROLES:
        heads = numbers(layout.range(role, i) for i in range(layout.count(role)))
        assert numbers(layout.whole(role)) == sorted(heads)


@pytest.mark.parametrize(
    ("kind", "n_heads", "n_kv", "role", "index", "slot"),
    [
        ("concat", 4, 2, "k", 1, 5),
        ("concat", 4, 2, "v", 0, 6),
        ("interleaved", 4, 4, "v", 2, 8),
        ("grouped", 4, 2, "q", 3, 5),
        ("grouped", 4, 2, "k", 1, 6),
        ("grouped", 4, 1, "v", 0, 5),
        ("quartered", 8, 8, "q", 2, 6),
        ("quartered", 8, 8, "v", 0, 2),
        ("quartered", 8, 8, "k", 1, 5),
    ],
)
def test_slots_written_out(kind, n_heads, n_kv, role, index, slot):
    assert Layout(kind, n_heads, n_kv, 3).range(role, index) == (slot * 3, slot * 3 + 3)


def test_grouped_with_a_group_per_head_is_interleaved():
    one, other = Layout("grouped", 6, 6, 2), Layout("interleaved", 6, 6, 2)
    assert all(one.range(role, i) == other.range(role, i) for role in ROLES for i in range(6))


def test_quartered_as_codegen_cuts_it():
    """The cuts of CodeGen's own forward, done to numbers instead of activations."""
    layout, axis = Layout("quartered", 8, 8, 2), torch.arange(48)
    parts = axis.reshape(4, -1).split(4, dim=-1)  # q, v, k of each of four parts, two heads of width two each
    for role, part in zip(("q", "v", "k"), parts, strict=True):
        for head, columns in enumerate(part.reshape(8, 2).tolist()):
            assert list(range(*layout.range(role, head))) == columns


def test_an_index_past_the_last_head_is_an_error():
    with pytest.raises(IndexError, match="k has heads 0 to 1, not 2"):
        Layout("grouped", 4, 2, 3).range("k", 2)


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=8))
def test_merged_ranges_hold_the_same_numbers(pairs):
    merged = merge(pairs)
    assert numbers(merged) == sorted({i for start, stop in pairs for i in range(start, stop)})
    assert all(one[1] < other[0] for one, other in pairwise(merged))


def test_what_cannot_be():
    assert fits("grouped", 4, 2, 3) and fits("quartered", 8, 8, 3)
    assert not fits("interleaved", 4, 2, 3) and not fits("quartered", 6, 6, 3) and not fits("concat", 4, 3, 2)
    assert not fits("concat", 4, 0, 2)


def test_a_gate_stands_behind_each_query():
    layout = Layout("separate", 4, 2, 8, gate_dim=8)
    assert [layout.range("q", head) for head in range(4)] == [(0, 8), (16, 24), (32, 40), (48, 56)]
    assert [layout.gate(head) for head in range(4)] == [(8, 16), (24, 32), (40, 48), (56, 64)]
    assert layout.range("k", 1) == (8, 16) and layout.shares("q") and not layout.shares("k")
    assert Layout("separate", 4, 2, 8).gate(0) is None


def test_latent_keys_and_values_stand_side_by_side():
    layout = Layout("latent", 3, 3, 5, query_dim=7, key_dim=4)
    assert [layout.range("k", head) for head in range(3)] == [(0, 4), (9, 13), (18, 22)]
    assert [layout.range("v", head) for head in range(3)] == [(4, 9), (13, 18), (22, 27)]
    assert layout.range("q", 2) == (14, 21) and layout.shares("v") and not layout.shares("q")
