"""Results about sites and pairs of sites: a square figure, and both names of a pair in a table."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from nnsplice import plots
from nnsplice.errors import BadArgument
from nnsplice.results import measures
from nnsplice.results.figure import short
from nnsplice.results.labelled import check_prompt
from nnsplice.results.table import Table

if TYPE_CHECKING:
    import pandas as pd


def are_pairs(table: Table) -> bool:
    """Whether the cells are sites and then pairs of these."""
    return table.asked.get("operation") == "interactions"


def _places(table: Table) -> list[str]:
    return [cell.path for cell in table.cells[: len(table.cells) - len(table.asked["pairs"])]]


def named(table: Table, frame: pd.DataFrame) -> pd.DataFrame:
    """A table with the columns `first` and `second`: the sites of a pair; a single site has only the first."""
    places = _places(table)
    names: dict[str, tuple[str, str | None]] = {place: (place, None) for place in places}
    for (a, b), cell in zip(table.asked["pairs"], table.cells[len(places) :], strict=True):
        names[cell.path] = places[a], places[b]
    both = [names[path] for path in frame["path"]]
    at = frame.columns.get_loc("set")
    assert isinstance(at, int)
    frame.insert(at + 1, "first", [first for first, _ in both])
    frame.insert(at + 2, "second", [second for _, second in both])
    return frame


def draw(table: Table, prompt: int | None, of: str | None, ax: plots.Axes | None) -> plots.Axes:
    """A square of sites by sites; with two metrics, the first is above the diagonal and the second below it.

    The diagonal is empty, as the effect of one site has another scale than an interaction.
    """
    if of not in (None, "change"):
        raise BadArgument(f"of={of!r}, and interactions are changes of the metric", expected='of="change", or nothing')
    check_prompt(table, prompt)
    places, pairs = _places(table), np.array(table.asked["pairs"], dtype=int).reshape(-1, 2)
    moved = table.values - table.corrupted[:, None]
    found = (measures.mean(moved) if prompt is None else moved[prompt])[len(places) :]
    square = np.full((len(places), len(places)), np.nan)
    above, below = (found[:, 0], found[:, 1]) if table.metrics else (found, found)
    square[pairs[:, 0], pairs[:, 1]] = above
    square[pairs[:, 1], pairs[:, 0]] = below
    identity = table.asked.get("metric")
    metric = identity.get("name", "the metric") if isinstance(identity, Mapping) else "the metric"
    names = [re.sub(r"layers\[(\d+)\]\.(\w+)\.output", r"L\1 \2", short(place)) for place in places]
    title = f"{table.metrics[0]} above the diagonal, {table.metrics[1]} below" if table.metrics else "interaction"
    many = len(table.clean)
    title += "" if many == 1 else f", mean of {many} prompts" if prompt is None else f", prompt {prompt}"
    return plots.heatmap(
        square, rows=names, columns=names, row_label="site", column_label="site", title=title,
        value_label=f"effect on {metric} beyond the sum", centre=0.0, ax=ax,
    )  # fmt: skip
