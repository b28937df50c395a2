"""Tables made by hand, for the tests of results."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from nnsplice.results import Cell, Run, SweepResult, Table

#: Of different length, with a token that comes twice.
TOKENS = (("the", " cat", "the", " sat"), ("the", " dog", " ran"))
LAYERS, HEADS = 2, 3
HEAD, STREAM = "layers[:].heads[:].output", "layers[:].output"


def stream_cells() -> list[Cell]:
    return [
        Cell(f"layers[{layer}].output[{position}]", STREAM, layer=layer, position=position)
        for layer in range(LAYERS)
        for position in range(4)
    ]


def head_cells(positions: tuple[int | str, ...] = (-1,)) -> list[Cell]:
    return [
        Cell(f"layers[{layer}].heads[{head}].output[{position}]", HEAD, layer=layer, head=head, position=position)
        for layer in range(LAYERS)
        for head in range(HEADS)
        for position in positions
    ]


def table(cells: list[Cell] | None = None, tokens: tuple[tuple[str, ...], ...] = TOKENS, **other: Any) -> Table:
    """Both kinds of site; the second prompt has no fourth token."""
    cells = [*stream_cells(), *head_cells()] if cells is None else cells
    lengths = np.array([len(row) for row in tokens])
    exists = np.array([[not isinstance(c.position, int) or c.position < n for c in cells] for n in lengths])
    values = np.where(exists, np.random.default_rng(0).normal(size=exists.shape), np.nan)
    ends = np.arange(len(tokens), dtype=np.float64)
    made = Table(
        tuple(cells), values, exists.copy(), exists, ends + 3.0, -ends - 1.0, tokens,
        {"model": "gpt2", "metric": {"name": "logit_diff"}, "seed": 0, "sites": [c.path for c in cells]},
        Run("packed", 1.5, forwards=3, tokens=40, known=2),
    )  # fmt: skip
    return replace(made, **other)


def part(whole: Table, mine: np.ndarray) -> SweepResult:
    """A shard: what is not `mine` was not measured."""
    done = whole.done & mine
    return SweepResult(replace(whole, values=np.where(done, whole.values, np.nan), done=done))
