"""Captures made by hand, one or many of them, for tests of what a capture is outside of any run."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

import nnsplice as ns

LAYERS = ("layers[0].output", "layers[1].output", "layers[1].mlp.output")


def hand(*paths: str, rows: int = 2, width: int = 4, dtype: torch.dtype = torch.float64) -> ns.SavedActivation:
    """A capture of these sites; every number in it is another one."""
    entry = torch.arange(1.0, rows * width + 1, dtype=dtype).reshape(rows, width)
    return ns.SavedActivation.from_pairs(*((path, entry + 100 * n) for n, path in enumerate(paths)))


def random_tensor(rows: int, width: int = 4, seed: int = 0) -> Tensor:
    """The same numbers for the same arguments, none of them zero."""
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 5


@st.composite
def keys(draw: st.DrawFn) -> list[str]:
    """Some keys, in any order; at least one."""
    positions = st.integers(-3, 5).map(str) | st.sampled_from(['"subject"][0', '"subject"][-1', '"mean"'])
    pairs = st.tuples(st.sampled_from(LAYERS), positions)
    return [f"{place}[{position}]" for place, position in draw(st.lists(pairs, min_size=1, max_size=8, unique=True))]


@st.composite
def captures(draw: st.DrawFn, rows: int | None = None, of: list[str] | None = None) -> ns.SavedActivation:
    """A capture of any keys, rows and numbers."""
    count = draw(st.integers(1, 4)) if rows is None else rows
    seed = draw(st.integers(0, 2**16))
    chosen = draw(keys()) if of is None else of
    return ns.SavedActivation.from_pairs(*((key, random_tensor(count, 4, seed + n)) for n, key in enumerate(chosen)))


@st.composite
def pairs_of_captures(draw: st.DrawFn) -> tuple[ns.SavedActivation, ns.SavedActivation]:
    """Two captures of the same sites and rows, each with its keys in an order of its own."""
    chosen, rows = draw(keys()), draw(st.integers(1, 4))
    return draw(captures(rows, chosen)), draw(captures(rows, draw(st.permutations(chosen))))


def same(a: ns.SavedActivation, b: ns.SavedActivation) -> bool:
    """Whether two captures hold the same keys and, bit for bit, the same numbers of the same dtype."""
    return sorted(a) == sorted(b) and all(a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a)
