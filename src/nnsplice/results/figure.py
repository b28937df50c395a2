"""The plane of a result that a figure shows, and the labels of its axes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from nnsplice import plots
from nnsplice.results import labelled, measures, wording
from nnsplice.results.table import AXES, OF_TOKENS, SETS, Table

if TYPE_CHECKING:
    import xarray as xr


#: How many letters of a set's name a figure has room for.
ROOM = 44


@dataclass(frozen=True)
class Plane:
    """The arguments of `plots.heatmap`."""

    values: np.ndarray
    rows: list[str]
    columns: list[str]
    row_label: str
    column_label: str


def draw(
    table: Table,
    array: xr.DataArray,
    chosen: str,
    prompt: int | None,
    metric: str,
    method: str | None,
    ax: plots.Axes | None,
) -> plots.Axes:
    """A heatmap of an array of effects, values or changes, with its labels."""
    shown = plane(table, array, prompt)
    words = wording.metric_words(table, metric, prompt)
    labels = {"effect": f"share of the effect on {metric} restored", "value": words, "change": f"change of {words}"}
    prompts = len(table.clean)
    many = f", {'pooled over' if chosen == 'effect' else 'mean of'} {prompts} prompts"
    which = "" if prompts == 1 else many if prompt is None else f", prompt {table.prompts[prompt]}"
    through = wording.receivers(table.asked)
    heading = place_of(table, array.attrs["component"]) + (f" through {through}" if through else "") + which
    heading += f", estimated by {method}" if method else ""
    pair = [f"{name}: {wording.brief(text)}" for name, text in wording.prompt_lines(table, prompt)]
    title = "\n".join([heading, *([words] if words != metric else []), *pair])
    if len(shown.columns) == 1 and len(shown.rows) > 1:
        # One column: bars are easier to compare than colours.
        return plots.bars(
            list(map(float, shown.values[:, 0])),
            names=shown.rows,
            label=shown.row_label,
            value_label=labels[chosen],
            title=title,
            ax=ax,
        )
    return plots.heatmap(
        shown.values,
        rows=shown.rows,
        columns=shown.columns,
        row_label=shown.row_label,
        column_label=shown.column_label,
        title=title,
        value_label=labels[chosen],
        centre=None if chosen == "value" else 0.0,
        ax=ax,
    )


def place_of(table: Table, kind: str) -> str:
    """A kind of site, with the indices that all of its cells share: `layers[:].heads[4].output[-1]`."""
    pieces = [re.split(r"(\[[^]]*\])", cell.path) for cell in table.cells if cell.component == kind]
    if kind == SETS or len(set(map(len, pieces))) != 1 or len({tuple(one[::2]) for one in pieces}) != 1:
        return kind
    joined = "".join(column[0] if len(set(column)) == 1 else "[:]" for column in zip(*pieces, strict=True))
    return joined if kind.endswith("[:]") else joined.removesuffix("[:]")


def plane(table: Table, grid: xr.DataArray, prompt: int | None) -> Plane:
    """Layers as rows; tokens as columns, or heads where there is one position.

    Args:
        prompt: the prompt; None is the mean over all prompts.
    """
    labelled.check_prompt(table, prompt)
    labelled.check_mean(table, prompt, "plot", grid.attrs["component"])
    values = measures.mean(grid.values) if prompt is None else grid.values[prompt]
    axes = [str(axis) for axis in grid.dims[1:]]
    down, across = sides(axes, [grid.sizes[axis] for axis in axes])
    labels = {axis: _labels(table, grid, axis, prompt) for axis in axes}
    order = [axes.index(axis) for axis in down + across]
    rows = _joined(labels, down) or [grid.attrs["component"]]
    # A single column; the tokens of a set are in its name.
    column, column_label = ("together", "") if "set" in axes else ("all tokens", "position")
    columns = _joined(labels, across) or [column]
    return Plane(
        values.transpose(order).reshape(len(rows), len(columns)),
        rows,
        columns,
        ".".join(_named(labels, down)) or "site",
        across[0] if len(across) > 1 and grid.sizes[across[-1]] == 1 else ".".join(across) or column_label,
    )


def sides(axes: list[str], sizes: list[int]) -> tuple[list[str], list[str]]:
    """The axes of rows and of columns: heads and the like are columns, unless there are several tokens."""
    parts = [axis for axis in axes if axis in AXES[1:]]
    named = [axis for axis in axes if axis in OF_TOKENS]
    tokens = bool(named) and (sizes[axes.index(named[0])] > 1 or not parts)
    across = named if tokens else [*parts, *named]
    # An axis on neither side has one label.
    return [axis for axis in axes if axis in ("layer", "set") or (tokens and axis in parts)], across


def _joined(labels: dict[str, list[str]], axes: list[str]) -> list[str]:
    if not axes:
        return []
    found = [""]
    for axis in _named(labels, axes):
        found = [f"{before}.{label}" if before else label for before in found for label in labels[axis]]
    return found


def _named(labels: dict[str, list[str]], axes: list[str]) -> list[str]:
    """The axes whose labels are shown: those with several, or else the first."""
    return [axis for axis in axes if len(labels[axis]) > 1] or axes[:1]


def _labels(table: Table, grid: xr.DataArray, axis: str, prompt: int | None) -> list[str]:
    """The labels of an axis; positions are labelled by their tokens where all shown prompts have the same."""
    numbers = [str(label) for label in grid.coords[axis].values]
    if axis == "set":
        return [short(name) for name in numbers]
    if axis != "position" or "token" not in grid.coords:
        return numbers
    texts: Any = grid.coords["token"].values
    if texts.ndim == 2:
        texts = texts if prompt is None else texts[prompt][None]
    else:
        texts = texts[None]
    only = 0 if len(table.clean) == 1 else prompt

    def text(n: str, column: Any) -> str:
        if len(set(column)) > 1 or not column[0] or not n.lstrip("-").isdigit():  # a span has its name
            return n
        word = str(column[0])
        return wording.visible(word) if only is None else wording.token_label(table, only, int(n), word)

    return [text(n, column) for n, column in zip(numbers, texts.T, strict=True)]


def short(name: str) -> str:
    """A set's name with heads in short form, cut to `ROOM` characters."""
    text = re.sub(r"layers\[(\d+)\]\.heads\[(\d+)\]\.output", r"L\1H\2", name)
    return text if len(text) <= ROOM else f"{text[: ROOM - 3]}..."
