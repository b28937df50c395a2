"""Figures written to files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnsplice.errors import BadArgument
from nnsplice.files import whole
from nnsplice.plots.style import DPI, pyplot

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


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
    figure: Figure = axes.figure.figure  # a subfigure belongs to a figure
    if not (kind := options.pop("format", path.suffix.removeprefix("."))):
        raise BadArgument(f"{path.name} has no ending, so no format", expected="a name like figure.png or figure.svg")
    # Vector formats keep text as text, so that it can be searched and take a paper's fonts.
    text_as_text = {"svg.fonttype": "none", "pdf.fonttype": 42, "ps.fonttype": 42}
    with whole(path) as temporary, pyplot().rc_context(text_as_text):
        figure.savefig(temporary, format=kind, **{"dpi": DPI, **options})
    if close:
        pyplot().close(figure)
    return path
