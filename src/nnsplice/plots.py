"""Labelled arrays in, matplotlib axes out.

    heatmap    a grid of numbers with names on both sides
    bars       a number for each of a list of names
    lines      numbers along an axis, a line for each name
    network    marks with lines between some of them
    save       write the figure of some axes to a file

The only file that imports matplotlib, and only when a figure is drawn. It knows no other room: what the numbers mean is
said by the caller. Nothing here calls `show`; a notebook displays the figure by itself, a script saves it.
"""

from __future__ import annotations

import math
import os
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nnsplice.errors import BadArgument, MissingPackage
from nnsplice.files import whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike

__all__ = ["bars", "heatmap", "lines", "network", "save"]

DIVERGING = "RdBu_r"
SEQUENTIAL = "viridis"

#: Dots per inch of what is no vector format.
DPI = 150
#: Points of the labels along the sides, of a title, and what the height of a line is to its font's size.
LABEL, TITLE, LINE = 9.0, 10.0, 1.25
#: How far labels that stand on their sides are turned, in degrees.
SLANT = 60


def __dir__() -> list[str]:  # what <TAB> shows
    return __all__


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
        texts: what is written in each cell, `[row][column]`.
        ax: axes to draw on; a new figure if left out.

    Returns:
        The axes; the figure is `axes.figure`.

    Raises:
        BadArgument: values whose shape does not fit the names.
    """
    grid = np.asarray(values, dtype=float)
    _check(grid, rows, columns)
    if texts is not None and [len(row) for row in texts] != [grid.shape[1]] * grid.shape[0]:
        raise BadArgument(
            f"{len(texts)} rows of texts for values of shape {list(grid.shape)}", expected="a text for each cell"
        )
    if ax is None:
        ax = _new_axes(grid.shape if texts is None else (grid.shape[0], 2 * grid.shape[1]), title)

    low, high, colours = _scale(grid, centre)
    image = ax.imshow(grid, cmap=colours, vmin=low, vmax=high, aspect="auto", interpolation="nearest")
    # NaN is drawn transparent, so whatever is empty shows the ground.
    ax.patch.set(facecolor="0.88", edgecolor="0.6", hatch="///", linewidth=0)

    for row, line in enumerate(texts or ()):
        for column, text in enumerate(line):
            dark = sum(image.cmap(image.norm(grid[row, column]))[:3]) < 1.5 and not np.isnan(grid[row, column])
            ax.text(
                column, row, _literal(text), ha="center", va="center", fontsize=7, color="1" if dark else "0.1",
                clip_on=True,
            )  # fmt: skip

    ax.set_xlabel(_literal(column_label))
    ax.set_ylabel(_literal(row_label))
    _title(ax, title)

    # As wide on a wide figure as on a narrow one.
    share = min(0.15, 0.8 / (ax.figure.bbox.width / ax.figure.dpi))
    bar = ax.figure.colorbar(image, ax=ax, extend=_beyond(grid, low, high), fraction=share, aspect=25)
    if value_label is not None:
        bar.set_label(_literal(value_label))
    _label_sides(ax, rows, columns)
    return ax


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
        ax = _new_axes((round(0.75 * len(names)), 8), title)
    places = range(len(names))
    signed = bool((numbers < 0).any())
    up, down = _pyplot().get_cmap(DIVERGING)([0.9, 0.1])
    ax.barh(places, numbers, color=[up if n >= 0 else down for n in numbers] if signed else "#3b6ea5", height=0.7)
    if signed:
        ax.axvline(0.0, color="0.3", linewidth=0.8)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.set_ylabel(_literal(label))
    ax.set_xlabel(_literal(value_label))
    _title(ax, title)
    _label_sides(ax, names)
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
        ordered: colour the lines by their order, for example by layer.
        ax: axes to draw on; a new figure if left out.

    Returns:
        The axes; the figure is `axes.figure`.

    Raises:
        BadArgument: a line with another number of y values than of x values, or without any.
    """
    places = x if isinstance(x, Mapping) else dict.fromkeys(ys, x)
    for name, values in ys.items():
        if np.shape(values) != np.shape(places[name]) or np.ndim(values) != 1 or not np.size(values):
            raise BadArgument(
                f"{name} has values of shape {list(np.shape(values))} at {list(np.shape(places[name]))} places",
                expected="one number for each place, at least one",
            )
    pyplot = _pyplot()
    ax = pyplot.subplots(figsize=(6.0, 3.6), layout="constrained", dpi=DPI)[1] if ax is None else ax
    assert ax is not None
    colours = pyplot.get_cmap(SEQUENTIAL)(np.linspace(0, 0.92, len(ys))) if ordered else [None] * len(ys)
    for (name, values), colour in zip(ys.items(), colours, strict=True):
        numbers = np.asarray(values, dtype=float)
        ax.plot(np.asarray(places[name], dtype=float), numbers, marker="o", ms=4, label=_literal(name), color=colour)
    if level is not None:
        ax.axhline(level, color="0.5", linewidth=1, linestyle="--", zorder=0)
    ax.set_xlabel(_literal(x_label))
    ax.set_ylabel(_literal(y_label))
    _title(ax, title)
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
            f"{len(labels)} labels for {len(places)} places, {len(widths)} sizes for {len(links)} links",
            expected="one for each",
        )
    ends = np.asarray(places, dtype=float).reshape(-1, 2)
    width, height = (float(np.ptp(column)) + 1.0 if len(ends) else 1.0 for column in ends.T)
    ax = _new_axes((round(height), round(width))) if ax is None else ax
    up, down = _pyplot().get_cmap(DIVERGING)([0.95, 0.05])
    for (start, end), size in zip(links, widths, strict=True):
        (x1, y1), (x2, y2) = ends[start], ends[end]
        line = 0.4 + 3.0 * min(abs(size), 1.0)
        ax.plot([x1, x2], [y1, y2], color=up if size >= 0 else down, linewidth=line, alpha=0.6, zorder=1)
    box = {"boxstyle": "round,pad=0.3", "facecolor": "1", "edgecolor": "0.35", "linewidth": 0.8}
    for (x, y), label in zip(ends, labels, strict=True):
        ax.scatter([x], [y], s=10, color="0.35", zorder=2)
        if text := _literal(label):
            ax.annotate(text, (x, y), ha="center", va="center", fontsize=7, color="0.1", bbox=box, zorder=3)
    ax.set_axis_off()
    _title(ax, title)
    return ax


def save(axes: Axes, path: str | os.PathLike[str], *, close: bool = False, **options: Any) -> Path:
    """Write the figure of `axes` to a file, in the format of the file's ending.

    `.pdf` and `.svg` are vector formats, for papers; others have 150 dots per inch. The file is written completely or
    not at all.

    >>> from tempfile import TemporaryDirectory
    >>> axes = ns.plots.bars([0.1, 0.7], names=["attn", "mlp"], label="part", value_label="energy")
    >>> with TemporaryDirectory() as folder:
    ...     path = ns.plots.save(axes, f"{folder}/energy.svg", close=True)
    ...     print([file.name for file in path.parent.iterdir()])
    ['energy.svg']

    Args:
        axes: any axes of the figure.
        path: the file, such as `figure.png` or `figure.svg`.
        close: close the figure afterwards, for a script that draws many.
        **options: arguments of matplotlib's `savefig` (`dpi=`, `transparent=`, ...).

    Returns:
        The path of the file.

    Raises:
        BadArgument: a path without an ending.
    """
    path = Path(path)
    figure: Figure = axes.figure.figure  # through a subfigure to the real one
    if not (kind := options.pop("format", path.suffix.removeprefix("."))):
        raise BadArgument(f"{path.name} has no ending, so no format", expected="a name like figure.png or figure.svg")
    # In vector formats letters stay letters, which a paper's fonts may replace and a reader may search.
    letters = {"svg.fonttype": "none", "pdf.fonttype": 42, "ps.fonttype": 42}
    with whole(path) as temporary, _pyplot().rc_context(letters):
        figure.savefig(temporary, format=kind, **{"dpi": DPI, **options})
    if close:
        _pyplot().close(figure)
    return path


def _check(grid: np.ndarray, rows: Sequence[object], columns: Sequence[object]) -> None:
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


def _beyond(grid: np.ndarray, low: float, high: float) -> str:
    """At which ends the colour bar gets an arrow: infinite values are off the scale."""
    below, above = bool((grid < low).any()), bool((grid > high).any())
    return {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}[below, above]


def _label_sides(ax: Axes, rows: Sequence[object], columns: Sequence[object] | None = None) -> None:
    """Name rows and columns: every second, third, ... where all would be printed over each other.

    How much room there is, is known when the figure has arranged itself around all that stands beside the axes; and
    the longest names take part of it, so they stand there then.
    """
    figure: Figure = ax.figure.figure
    for _ in range(2):
        ax.set_yticks(*_thinned(rows, ax.bbox.height / figure.dpi, LABEL * LINE), fontsize=LABEL)
        if columns is not None:
            slanted = max(len(_literal(name)) for name in columns) > 2
            need = LABEL * LINE / math.sin(math.radians(SLANT)) if slanted else LABEL * 1.6
            labels = ax.set_xticks(
                *_thinned(columns, ax.bbox.width / figure.dpi, need),
                rotation=SLANT if slanted else 0, ha="right" if slanted else "center", fontsize=LABEL,
            )  # fmt: skip
            for tick in labels if slanted else ():
                tick.label1.set_rotation_mode(
                    "anchor"
                )  # the end of the word, not the middle of its box, is at the tick
        with warnings.catch_warnings():  # of letters that a font lacks it is told when the figure is drawn
            warnings.simplefilter("ignore")
            figure.draw_without_rendering()


def _thinned(names: Sequence[object], inches: float, points: float) -> tuple[list[int], list[str]]:
    """Which names are shown, and where.

    Args:
        inches: the length of their side.
        points: how much of it a name takes.
    """
    step = max(1, math.ceil(points / (72 * max(inches, 0.1) / len(names))))
    shown = list(range(0, len(names), step))
    return shown, [_literal(names[i]) for i in shown]


def _title(ax: Axes, title: str | None) -> None:
    """A title of one or more lines, each broken where the figure ends."""
    if title is None:
        return
    lines = _broken(title, ax.figure.bbox.width / ax.figure.dpi)
    shown = ax.set_title("\n".join(map(_literal, lines)), fontsize=TITLE)
    if len(lines) > 1:
        shown.set(horizontalalignment="left", x=0.0)


def _broken(title: str, inches: float) -> list[str]:
    """The lines of a title in a figure of this width; letters are about half as wide as they are high."""
    room = max(24, int(72 * inches / (TITLE * 0.6)))
    return [line for text in title.split("\n") for line in textwrap.wrap(text, room) or [""]]


def _literal(text: object) -> str:
    """Text that matplotlib prints as it is: one line, and no formula between two dollars."""
    shown = str(text).replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")
    return shown.replace("$", r"\$")


def _new_axes(shape: tuple[int, ...], title: str | None = None) -> Axes:
    height, width = shape
    wide = min(max(2.5 + 0.35 * width, 5.5), 16.0)
    above = 0.2 * len(_broken(title, wide)) if title else 0.0
    size = (wide, min(max(1.8 + 0.28 * height, 3.0), 14.0) + above)
    _, ax = _pyplot().subplots(figsize=size, layout="constrained", dpi=DPI)
    return ax


def _pyplot() -> Any:
    try:
        import matplotlib.pyplot as plt
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise  # matplotlib is there, and something that it needs is not
        raise MissingPackage(
            "figures need matplotlib, which is not installed", write="pip install nnsplice[plots]"
        ) from None
    return plt
