"""Sizes, colours, titles and labels that all figures share."""

from __future__ import annotations

import math
import textwrap
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from nnsplice.errors import MissingPackage

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Colour maps of numbers with both signs, and of numbers with one.
DIVERGING, SEQUENTIAL = "RdBu_r", "viridis"
#: Dots per inch of raster formats.
DPI = 150
#: Font sizes in points, of labels and of titles.
LABEL, TITLE = 9.0, 10.0
#: The height of a line of text, in font sizes.
LINE = 1.25
#: The rotation of column labels, in degrees.
SLANT = 60


def label_sides(ax: Axes, rows: Sequence[object], columns: Sequence[object] | None = None) -> None:
    """Label rows and columns, or every second, third, ... of them where all labels would overlap.

    The space for labels is known only after the layout, which depends on the labels; so both are done twice.
    """
    figure: Figure = ax.figure.figure
    for _ in range(2):
        ax.set_yticks(*_spaced(rows, ax.bbox.height / figure.dpi, LABEL * LINE), fontsize=LABEL)
        if columns is not None:
            slanted = max(len(literal(name)) for name in columns) > 2
            need = LABEL * LINE / math.sin(math.radians(SLANT)) if slanted else LABEL * 1.6
            labels = ax.set_xticks(
                *_spaced(columns, ax.bbox.width / figure.dpi, need),
                rotation=SLANT if slanted else 0, ha="right" if slanted else "center", fontsize=LABEL,
            )  # fmt: skip
            for tick in labels if slanted else ():
                # The end of the word, not the middle of its box, is at the tick.
                tick.label1.set_rotation_mode("anchor")
        with warnings.catch_warnings():  # the final drawing warns of missing glyphs again
            warnings.simplefilter("ignore")
            figure.draw_without_rendering()


def _spaced(names: Sequence[object], inches: float, points: float) -> tuple[list[int], list[str]]:
    """The names that fit on a side, and their numbers.

    Args:
        inches: the length of the side.
        points: the length that a name needs.
    """
    step = max(1, math.ceil(points / (72 * max(inches, 0.1) / len(names))))
    shown = list(range(0, len(names), step))
    return shown, [literal(names[i]) for i in shown]


def set_title(ax: Axes, title: str | None) -> None:
    """Set a title of one or more lines, each wrapped at the width of the figure."""
    if title is None:
        return
    lines = wrapped(title, ax.figure.bbox.width / ax.figure.dpi)
    shown = ax.set_title("\n".join(map(literal, lines)), fontsize=TITLE)
    if len(lines) > 1:
        shown.set(horizontalalignment="left", x=0.0)


def wrapped(title: str, inches: float) -> list[str]:
    """The lines of a title, wrapped at a width; a letter is about 0.6 of its font size wide."""
    room = max(24, int(72 * inches / (TITLE * 0.6)))
    return [line for text in title.split("\n") for line in textwrap.wrap(text, room) or [""]]


def literal(text: object) -> str:
    """Text that matplotlib prints as it is: one line, and no formula between two dollars."""
    shown = str(text).replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")
    return shown.replace("$", r"\$")


def new_axes(shape: tuple[int, ...], title: str | None = None) -> Axes:
    """Axes of a new figure, large enough for a grid of this shape `[row, column]`."""
    height, width = shape
    wide = min(max(2.5 + 0.35 * width, 5.5), 16.0)
    above = 0.2 * len(wrapped(title, wide)) if title else 0.0
    size = (wide, min(max(1.8 + 0.28 * height, 3.0), 14.0) + above)
    _, ax = pyplot().subplots(figsize=size, layout="constrained", dpi=DPI)
    return ax


def pyplot() -> Any:
    """`matplotlib.pyplot`, or an error with the command that installs it."""
    try:
        import matplotlib.pyplot as plt
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise  # a dependency of matplotlib is missing
        raise MissingPackage(
            "figures need matplotlib, which is not installed", write='pip install "nnsplice[plots]"'
        ) from None
    return plt
