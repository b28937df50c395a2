"""Labelled arrays in, matplotlib axes out.

    heatmap    a grid of numbers with names on both sides
    bars       a number for each of a list of names
    lines      numbers along an axis, a line for each name
    network    labelled points with lines between some of them
    save       write the figure of some axes to a file

Only this room imports matplotlib, and only when a figure is drawn. The caller says what the numbers mean. Nothing here
calls `show`: a notebook displays the figure by itself, a script saves it.
"""

from typing import TYPE_CHECKING

from nnsplice.plots.heatmaps import heatmap
from nnsplice.plots.marks import bars, lines, network
from nnsplice.plots.output import save
from nnsplice.plots.style import DIVERGING as DIVERGING
from nnsplice.plots.style import SEQUENTIAL as SEQUENTIAL

if TYPE_CHECKING:
    from matplotlib.axes import Axes as Axes

__all__ = ["bars", "heatmap", "lines", "network", "save"]


def __dir__() -> list[str]:  # what <TAB> shows
    return __all__
