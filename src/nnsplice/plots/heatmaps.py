"""A grid of numbers as colours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from nnsplice.errors import BadArgument
from nnsplice.plots.style import DIVERGING, SEQUENTIAL, label_sides, literal, new_axes, set_title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike


def heatmap(
    values: ArrayLike,
    *,
    rows: Sequence[object],
    columns: Sequence[object],
    row_label: str,
    column_label: str,
    title: str | None = None,
    value_label: str | None = None,
    centre: float | None = None,
    texts: Sequence[Sequence[str]] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw a grid of numbers as a heatmap, the first row on top.

    The axes count 0, 1, 2, ... and the names are tick labels, so a repeated token keeps both columns. Text is literal:
    a `$` starts no formula. NaN cells are hatched.

    >>> effect, tokens = [[1.0, 0.2, 0.0], [0.1, 0.4, -0.8]], ["the", "cat", "the"]
    >>> axes = ns.plots.heatmap(effect, rows=[0, 1], columns=tokens, row_label="layer", column_label="token")
    >>> [label.get_text() for label in axes.get_xticklabels()]
    ['the', 'cat', 'the']
    >>> axes.images[0].get_clim()   # both signs, so zero is in the middle
    (-1.0, 1.0)

    Args:
        values: the numbers, `[row, column]`.
        rows: the name of each row, for example layer numbers.
        columns: the name of each column, for example tokens.
        row_label: the axis label of the rows.
        column_label: the axis label of the columns.
        title: a title above the figure.
        value_label: the label of the colour bar.
        centre: the number with the neutral colour, in the middle of the scale. If left out, it is zero where the
            numbers have both signs, and a scale without a neutral colour is used otherwise.
        texts: the text in each cell, `[row][column]`.
        ax: axes to draw on; a new figure if left out.

    Returns:
        The axes; the figure is `axes.figure`.

    Raises:
        BadArgument: values whose shape does not fit the names.
    """
    grid = np.asarray(values, dtype=float)
    _check_shape(grid, rows, columns)
    if texts is not None and [len(row) for row in texts] != [grid.shape[1]] * grid.shape[0]:
        raise BadArgument(
            f"{len(texts)} rows of texts for values of shape {list(grid.shape)}", expected="a text for each cell"
        )
    if ax is None:
        ax = new_axes(grid.shape if texts is None else (grid.shape[0], 2 * grid.shape[1]), title)

    low, high, colours = _scale(grid, centre)
    image = ax.imshow(grid, cmap=colours, vmin=low, vmax=high, aspect="auto", interpolation="nearest")
    # NaN cells are transparent and show the patch behind them.
    ax.patch.set(facecolor="0.88", edgecolor="0.6", hatch="///", linewidth=0)

    for row, line in enumerate(texts or ()):
        for column, text in enumerate(line):
            dark = sum(image.cmap(image.norm(grid[row, column]))[:3]) < 1.5 and not np.isnan(grid[row, column])
            ax.text(
                column, row, literal(text), ha="center", va="center", fontsize=7, color="1" if dark else "0.1",
                clip_on=True,
            )  # fmt: skip

    ax.set_xlabel(literal(column_label))
    ax.set_ylabel(literal(row_label))
    set_title(ax, title)

    # The colour bar has the same width on wide and narrow figures.
    share = min(0.15, 0.8 / (ax.figure.bbox.width / ax.figure.dpi))
    bar = ax.figure.colorbar(image, ax=ax, extend=_off_scale(grid, low, high), fraction=share, aspect=25)
    if value_label is not None:
        bar.set_label(literal(value_label))
    label_sides(ax, rows, columns)
    return ax


def _check_shape(grid: np.ndarray, rows: Sequence[object], columns: Sequence[object]) -> None:
    if grid.ndim != 2 or grid.size == 0:
        raise BadArgument(
            f"a heatmap cannot be drawn from values of shape {list(grid.shape)}",
            expected="[row, column], at least one of each",
        )
    if grid.shape != (len(rows), len(columns)):
        raise BadArgument(
            f"values of shape {list(grid.shape)} do not fit {len(rows)} rows and {len(columns)} columns",
            expected="one name for each row and each column",
        )


def _scale(grid: np.ndarray, centre: float | None) -> tuple[float, float, str]:
    """The numbers at both ends of the colour scale, and the scale's name."""
    finite = grid[np.isfinite(grid)]
    if finite.size == 0:
        finite = np.zeros(1) if centre is None else np.full(1, centre)
    low, high = float(finite.min()), float(finite.max())
    if centre is None and low < 0 < high:
        centre = 0.0
    if centre is not None:
        # The `or` keeps a scale when every number is the centre.
        reach = max(abs(low - centre), abs(high - centre)) or 1.0
        return centre - reach, centre + reach, DIVERGING
    return (low, high, SEQUENTIAL) if low < high else (low, low + 1.0, SEQUENTIAL)


def _off_scale(grid: np.ndarray, low: float, high: float) -> str:
    """The ends at which the colour bar gets an arrow, as infinite values are off the scale."""
    below, above = bool((grid < low).any()), bool((grid > high).any())
    return {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}[below, above]
