"""Bars, lines, and networks of labelled points."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from nnsplice.errors import BadArgument
from nnsplice.plots.style import DIVERGING, DPI, SEQUENTIAL, label_sides, literal, new_axes, pyplot, set_title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike

#: How many of the lines that are coloured by their order the legend names.
LEGEND = 8


def bars(
    values: Sequence[float],
    *,
    names: Sequence[object],
    label: str,
    value_label: str,
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw a horizontal bar for each name, the first name on top.

    >>> axes = ns.plots.bars([0.1, 0.7, 0.2], names=["embed", "layer 0", "layer 1"], label="part", value_label="energy")
    >>> [label.get_text() for label in axes.get_yticklabels()], bool(axes.yaxis_inverted())
    (['embed', 'layer 0', 'layer 1'], True)

    Args:
        values: one number for each name.
        names: the names, for example layer numbers.
        label: the axis label of the names.
        value_label: the axis label of the numbers.
        title: a title above the figure.
        ax: axes to draw on; a new figure if left out.

    Returns:
        The axes; the figure is `axes.figure`.

    Raises:
        BadArgument: another number of values than of names.
    """
    numbers = np.asarray(values, dtype=float)
    if numbers.shape != (len(names),) or not len(names):
        raise BadArgument(
            f"values of shape {list(numbers.shape)} do not fit {len(names)} names", expected="one number for each name"
        )
    if ax is None:
        ax = new_axes((round(0.75 * len(names)), 8), title)
    signed = bool((numbers < 0).any())
    up, down = pyplot().get_cmap(DIVERGING)([0.9, 0.1])
    ax.barh(
        range(len(names)), numbers, color=[up if n >= 0 else down for n in numbers] if signed else "#3b6ea5", height=0.7
    )
    if signed:
        ax.axvline(0.0, color="0.3", linewidth=0.8)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.set_ylabel(literal(label))
    ax.set_xlabel(literal(value_label))
    set_title(ax, title)
    label_sides(ax, names)
    return ax


def lines(
    x: ArrayLike | Mapping[str, ArrayLike],
    ys: Mapping[str, ArrayLike],
    *,
    x_label: str,
    y_label: str,
    title: str | None = None,
    level: float | None = None,
    ordered: bool = False,
    dashed: Collection[str] = (),
    ax: Axes | None = None,
) -> Axes:
    """Draw one or several lines over one axis, with a legend for several.

    >>> quality = {"attn": [0.6, 0.9, 0.8], "mlp": [0.5, float("nan"), 0.7]}
    >>> axes = ns.plots.lines([0, 1, 2], quality, x_label="layer", y_label="AUC", level=0.5)
    >>> [text.get_text() for text in axes.get_legend().get_texts()]
    ['attn', 'mlp']

    Args:
        x: the x values: for all lines, or for each line by name.
        ys: the y values of each line by name; NaN leaves a gap.
        x_label: the label of the x axis.
        y_label: the label of the y axis.
        title: a title above the figure.
        level: a number marked by a dashed line, such as chance.
        ordered: colour the lines by their order, for example by layer; of many, the legend names some.
        dashed: the names of lines that are drawn dashed, so that an equal line below them is seen.
        ax: axes to draw on; a new figure if left out.

    Returns:
        The axes; the figure is `axes.figure`.

    Raises:
        BadArgument: a line with another number of y values than of x values, or without any.
    """
    xs = x if isinstance(x, Mapping) else dict.fromkeys(ys, x)
    for name, values in ys.items():
        if np.shape(values) != np.shape(xs[name]) or np.ndim(values) != 1 or not np.size(values):
            raise BadArgument(
                f"{name} has values of shape {list(np.shape(values))} at {list(np.shape(xs[name]))} x values",
                expected="one y value for each x value, at least one",
            )
    ax = pyplot().subplots(figsize=(6.0, 3.6), layout="constrained", dpi=DPI)[1] if ax is None else ax
    assert ax is not None
    colours = pyplot().get_cmap(SEQUENTIAL)(np.linspace(0, 0.92, len(ys))) if ordered else [None] * len(ys)
    # A legend of many lines would be larger than the figure; colours in order can be read between those it names.
    some = np.linspace(0, len(ys) - 1, min(len(ys), LEGEND)).round() if ordered else range(len(ys))
    for number, ((name, values), colour) in enumerate(zip(ys.items(), colours, strict=True)):
        style = "--" if name in dashed else "-"
        ax.plot(
            np.asarray(xs[name], dtype=float), np.asarray(values, dtype=float), style, marker="o", ms=4,
            label=literal(name) if number in some else None, color=colour,
        )  # fmt: skip
    if level is not None:
        ax.axhline(level, color="0.5", linewidth=1, linestyle="--", zorder=0)
    ax.set_xlabel(literal(x_label))
    ax.set_ylabel(literal(y_label))
    set_title(ax, title)
    if len(ys) > 1:
        ax.legend(frameon=False, fontsize="small")
    return ax


def network(
    places: Sequence[tuple[float, float]],
    labels: Sequence[object],
    links: Sequence[tuple[int, int]],
    *,
    sizes: Sequence[float] | None = None,
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw labelled points with lines between some of them.

    >>> axes = ns.plots.network([(0, 0), (0, 1), (1, 1)], ["in", "a", "b"], [(0, 1), (0, 2)], sizes=[1.0, -0.2])
    >>> len(axes.lines)
    2

    Args:
        places: `(x, y)` of each point.
        labels: a text for each point; an empty one draws a dot.
        links: the numbers of the two points of each line.
        sizes: the width of each line, from -1 to 1; negative ones have another colour.
        title: a title above the figure.
        ax: axes to draw on; a new figure if left out.

    Returns:
        The axes; the figure is `axes.figure`.

    Raises:
        BadArgument: another number of labels than of points, or of sizes than of lines.
    """
    widths = [1.0] * len(links) if sizes is None else list(sizes)
    if len(labels) != len(places) or len(widths) != len(links):
        raise BadArgument(
            f"{len(labels)} labels for {len(places)} points, {len(widths)} sizes for {len(links)} lines",
            expected="one for each",
        )
    ends = np.asarray(places, dtype=float).reshape(-1, 2)
    width, height = (float(np.ptp(column)) + 1.0 if len(ends) else 1.0 for column in ends.T)
    ax = new_axes((round(height), round(width))) if ax is None else ax
    up, down = pyplot().get_cmap(DIVERGING)([0.95, 0.05])
    for (start, end), size in zip(links, widths, strict=True):
        (x1, y1), (x2, y2) = ends[start], ends[end]
        line = 0.4 + 3.0 * min(abs(size), 1.0)
        ax.plot([x1, x2], [y1, y2], color=up if size >= 0 else down, linewidth=line, alpha=0.6, zorder=1)
    box = {"boxstyle": "round,pad=0.3", "facecolor": "1", "edgecolor": "0.35", "linewidth": 0.8}
    for (x, y), label in zip(ends, labels, strict=True):
        ax.scatter([x], [y], s=10, color="0.35", zorder=2)
        if text := literal(label):
            ax.annotate(text, (x, y), ha="center", va="center", fontsize=7, color="0.1", bbox=box, zorder=3)
    ax.set_axis_off()
    set_title(ax, title)
    return ax
