"""Figures: what stands on the axes, what the colours mean, and what is left visible."""

from __future__ import annotations

import itertools
import math
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.colors import to_rgba

from nnsplice import plots
from nnsplice.errors import BadArgument, MissingPackage


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def draw(values, rows=None, columns=None, **options):
    grid = np.asarray(values, dtype=float)
    return plots.heatmap(
        values,
        rows=range(grid.shape[0]) if rows is None else rows,
        columns=range(grid.shape[1]) if columns is None else columns,
        **{"row_label": "layer", "column_label": "token", **options},
    )


def image(ax) -> Any:
    """What was drawn; its `.colorbar` stands beside it."""
    return ax.images[0]


def tick_texts(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def pixels(ax):
    """The drawn figure as [height, width, 3], and where data coordinates fall in it."""
    canvas = ax.figure.canvas
    canvas.draw()
    drawn = np.asarray(canvas.buffer_rgba())[..., :3]

    def at(column, row):
        x, y = ax.transData.transform((column, row))
        return drawn[round(drawn.shape[0] - y), round(x)]

    def cell(column, row):
        left, top = ax.transData.transform((column - 0.4, row - 0.4))
        right, bottom = ax.transData.transform((column + 0.4, row + 0.4))
        height = drawn.shape[0]
        return drawn[round(height - top) : round(height - bottom), round(left) : round(right)]

    return at, cell


# --- names -----------------------------------------------------------------------------------------------------------


def test_every_row_and_column_is_named_at_its_number():
    ax = draw(
        np.arange(6).reshape(2, 3), rows=[4, 5], columns=["The", "cat", "sat"], title="a title", value_label="effect"
    )
    assert tick_texts(ax.xaxis) == ["The", "cat", "sat"]
    assert tick_texts(ax.yaxis) == ["4", "5"]
    assert list(ax.get_xticks()) == [0, 1, 2]
    assert list(ax.get_yticks()) == [0, 1]
    assert (ax.get_ylabel(), ax.get_xlabel(), ax.get_title()) == ("layer", "token", "a title")
    assert image(ax).colorbar.ax.get_ylabel() == "effect"


def test_first_row_is_on_top():
    at, _ = pixels(draw([[0.0], [1.0]]))
    colours = mpl.colormaps[plots.SEQUENTIAL]
    assert at(0, 0) == pytest.approx(np.array(colours(0.0)[:3]) * 255, abs=1)
    assert at(0, 1) == pytest.approx(np.array(colours(1.0)[:3]) * 255, abs=1)


def test_repeated_tokens_keep_their_columns():
    ax = draw([[1.0, 2.0, 3.0, 4.0]], columns=["the", "cat", "the", "the"])
    assert tick_texts(ax.xaxis) == ["the", "cat", "the", "the"]
    assert image(ax).get_array().shape == (1, 4)
    at, _ = pixels(ax)
    assert len({tuple(at(column, 0)) for column in range(4)}) == 4


def test_many_columns_are_all_drawn_and_named_in_steps():
    names = [f"t{i}" for i in range(500)]
    ax = draw(np.arange(500.0)[None], columns=names)
    shown = [int(tick) for tick in ax.get_xticks()]
    assert 10 < len(shown) < 120
    assert tick_texts(ax.xaxis) == [names[i] for i in shown]
    assert image(ax).get_array().shape == (1, 500)


@pytest.mark.parametrize("token", ["$x$", "costs $5 or $6", r"a\$b$", "$"])
def test_dollars_start_no_formula(token):
    ax = draw([[1.0, 2.0]], columns=[token, "b"], title=token, value_label=token)
    ax.figure.canvas.draw()
    for text in (ax.get_xticklabels()[0], ax.title, image(ax).colorbar.ax.yaxis.label):
        # What the text becomes just before it is drawn; there is no public way to ask.
        cleaned, mathtext = text._preprocess_math(text.get_text())  # pyright: ignore[reportAttributeAccessIssue]
        assert (cleaned, mathtext) == (token, False)


def test_a_broken_formula_is_only_text():
    ax = draw([[1.0]], columns=[r"$\frac{$"])
    ax.figure.canvas.draw()  # mathtext would raise here


def test_line_breaks_in_tokens_stay_on_one_line():
    assert tick_texts(draw([[1.0, 2.0]], columns=["\n", "a\tb"]).xaxis) == ["\\n", "a\\tb"]


# --- colours ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "centre", "limits", "colours"),
    [
        ([[-1.0, 3.0]], None, (-3, 3), plots.DIVERGING),
        ([[-5.0, np.nan, 3.0]], None, (-5, 5), plots.DIVERGING),
        ([[1.0, 3.0]], None, (1, 3), plots.SEQUENTIAL),
        ([[-4.0, -1.0]], None, (-4, -1), plots.SEQUENTIAL),
        ([[0.0, 3.0]], None, (0, 3), plots.SEQUENTIAL),
        ([[1.0, 3.0]], 0, (-3, 3), plots.DIVERGING),
        ([[0.0, 0.8]], 0.5, (0, 1), plots.DIVERGING),
        ([[2.0, 2.0]], 2, (1, 3), plots.DIVERGING),
        ([[2.0, 2.0]], None, (2, 3), plots.SEQUENTIAL),
        ([[np.nan, np.nan]], None, (0, 1), plots.SEQUENTIAL),
    ],
)
def test_colour_limits(values, centre, limits, colours):
    drawn = image(draw(values, centre=centre))
    assert drawn.get_clim() == pytest.approx(limits)
    assert drawn.get_cmap().name == colours


def test_infinite_values_are_marked_as_beyond_the_scale():
    drawn = image(draw([[-np.inf, -2.0, -1.0]]))
    assert drawn.get_clim() == (-2, -1)
    assert drawn.colorbar.extend == "min"
    assert image(draw([[-2.0, -1.0]])).colorbar.extend == "neither"


def test_nan_is_hatched_and_no_colour_of_the_scale():
    ax = draw([[np.nan, -1.0, 1.0]])
    _, cell = pixels(ax)
    ground = np.array(to_rgba("0.88")[:3]) * 255
    empty = cell(0, 0).reshape(-1, 3)
    assert (np.abs(empty - ground).max(axis=1) <= 1).any(), "the grey ground shows"
    assert len(np.unique(empty, axis=0)) > 1, "and so does the hatching"
    assert np.ptp(empty, axis=1).max() <= 2, "in greys only"
    assert len(np.unique(cell(1, 0).reshape(-1, 3), axis=0)) == 1, "a cell with a number has one colour"


# --- axes and files --------------------------------------------------------------------------------------------------


def test_given_axes_are_drawn_on_and_returned():
    _, (left, right) = plt.subplots(1, 2)
    assert draw([[1.0]], ax=right) is right
    assert not left.images
    assert len(plt.get_fignums()) == 1


def test_nothing_is_shown(monkeypatch):
    monkeypatch.setattr(plt, "show", lambda *args, **kwargs: pytest.fail("a library does not call show"))
    draw([[1.0]])


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_save_writes_the_figure_and_nothing_else(tmp_path, ending):
    path = plots.save(draw([[1.0, 2.0]]), tmp_path / f"figure.{ending}")
    assert path.stat().st_size > 1000
    assert list(tmp_path.iterdir()) == [path]
    assert len(plt.get_fignums()) == 1


def test_save_leaves_no_half_file(tmp_path):
    with pytest.raises(ValueError, match="not supported"):
        plots.save(draw([[1.0]]), tmp_path / "figure.nonsense")
    assert not list(tmp_path.iterdir())


def test_save_asks_for_an_ending_that_says_the_format(tmp_path):
    with pytest.raises(BadArgument, match=r"figure has no ending(.|\n)*figure\.png"):
        plots.save(draw([[1.0]]), tmp_path / "figure")
    assert list(tmp_path.iterdir()) == []
    assert plots.save(draw([[1.0]]), tmp_path / "figure", format="svg").read_text().startswith("<?xml")


def test_save_can_close(tmp_path):
    plots.save(draw([[1.0]]), str(tmp_path / "figure.png"), close=True)
    assert not plt.get_fignums()


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "rows", "columns", "message"),
    [
        (np.zeros(3), [0], [0, 1, 2], r"shape \[3\]"),
        (np.zeros((2, 0)), [0, 1], [], r"shape \[2, 0\]"),
        (np.zeros((2, 3)), [0, 1], ["a", "b"], r"shape \[2, 3\] do not fit 2 rows and 2 columns"),
    ],
)
def test_values_and_names_that_do_not_fit(values, rows, columns, message):
    with pytest.raises(BadArgument, match=message):
        plots.heatmap(values, rows=rows, columns=columns, row_label="", column_label="")
    assert not plt.get_fignums()


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(MissingPackage, match=r'pip install "nnsplice\[plots\]"'):
        draw([[1.0]])


# -- bars --------------------------------------------------------------------------------------------------------------


def test_bars_from_the_top():
    ax = plots.bars([3.0, 0.0, 1.5], names=["a", "$b", "c"], label="layer", value_label="energy", title="one")
    bars: list[Any] = list(ax.patches)
    assert [bar.get_width() for bar in bars] == [3.0, 0.0, 1.5]
    assert [bar.get_y() + bar.get_height() / 2 for bar in bars] == pytest.approx([0, 1, 2])
    assert ax.get_ylim() == (2.5, -0.5)  # the first name on top
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", r"\$b", "c"]
    assert (ax.get_ylabel(), ax.get_xlabel(), ax.get_title()) == ("layer", "energy", "one")


@pytest.mark.parametrize(("values", "names"), [([], []), ([1.0], ["a", "b"]), ([[1.0]], ["a"])])
def test_bars_that_do_not_fit(values, names):
    with pytest.raises(BadArgument, match="one number for each name"):
        plots.bars(values, names=names, label="layer", value_label="energy")


# --- lines ------------------------------------------------------------------------------------------------------------


def test_each_line_has_its_numbers_and_its_name():
    ax: Any = plots.lines(
        [0, 1, 2], {"a $b$": [1, float("nan"), 3], "c": [4, 5, 6]}, x_label="x", y_label="y", level=0.5
    )
    assert [line.get_xydata()[:, 1].tolist() for line in ax.lines[1:2]] == [[4, 5, 6]]
    assert np.isnan(ax.lines[0].get_ydata()[1]) and ax.lines[0].get_ydata()[2] == 3
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [r"a \$b\$", "c"]
    assert ax.lines[2].get_ydata() == [0.5, 0.5]  # the level
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("x", "y")


def test_lines_may_have_places_of_their_own_and_colours_in_order():
    figure, given = plt.subplots()
    places = {"first": [0, 2], "second": [5, 1]}
    ax: Any = plots.lines(places, {"first": [1, 2], "second": [3, 4]}, x_label="", y_label="", ordered=True, ax=given)
    assert ax is given and ax.lines[1].get_xdata().tolist() == [5, 1]
    assert ax.lines[0].get_color()[:3].sum() < ax.lines[1].get_color()[:3].sum()  # dark to light
    assert plots.lines([1], {"only": [2]}, x_label="", y_label="").get_legend() is None
    plt.close(figure)


def test_the_legend_of_many_lines_in_order_names_some_from_the_first_to_the_last():
    many = {f"layer {n}": [n, n + 1] for n in range(30)}
    axes: Any = plots.lines([0, 1], many, x_label="a", y_label="b", ordered=True)
    named = [text.get_text() for text in axes.get_legend().get_texts()]
    assert len(axes.lines) == 30 and len(named) == 8
    assert (named[0], named[-1]) == ("layer 0", "layer 29")
    axes.figure.canvas.draw()  # a warning of matplotlib, that the axes have no room, is an error here
    axes = plots.lines([0, 1], many, x_label="a", y_label="b")
    assert len(axes.get_legend().get_texts()) == 30  # colours that repeat need all names


def test_lines_that_do_not_fit_are_named():
    for x, values in (([0, 1], [1, 2, 3]), ([[0, 1]], [[1, 2]]), ([], [])):
        with pytest.raises(BadArgument, match="second has values of shape"):
            plots.lines({"first": [0], "second": x}, {"first": [1], "second": values}, x_label="", y_label="")


def _apart(labels: list[Any], figure: Any) -> bool:
    """Whether texts of one angle do not touch: measured across their lines."""
    renderer = figure.canvas.get_renderer()
    turned = math.radians(labels[0].get_rotation())
    ends = [label.get_window_extent(renderer) for label in labels]
    high = labels[0].get_fontsize() * figure.dpi / 72
    if not labels[0].get_rotation():
        return all(a.x1 <= b.x0 or b.y1 <= a.y0 or a.y1 <= b.y0 for a, b in itertools.pairwise(ends))
    # The right upper end of a label that is turned stands at its tick.
    return all((b.x1 - a.x1) * math.sin(turned) >= high for a, b in itertools.pairwise(ends))


@pytest.mark.parametrize("shape", [(30, 60), (12, 1), (30, 9), (4, 200), (120, 60), (6, 14)])
@pytest.mark.parametrize("own", [True, False])
def test_labels_never_overlap(shape: tuple[int, int], own: bool) -> None:
    rows, columns = shape
    given = None if own else plt.subplots(figsize=(6, 4), layout="constrained")[1]
    names = [f" token{n % 7}" for n in range(columns)]
    names[-1] = "Eiffel -> Brandenburg"
    title = "\n".join(["layers[:].output", "clean: " + "one two three " * 30])
    ax = plots.heatmap(
        np.zeros(shape), rows=range(rows), columns=names, row_label="layer", column_label="token", title=title, ax=given
    )
    ax.figure.canvas.draw()
    figure: Any = ax.figure
    assert _apart(ax.get_xticklabels(), figure) and _apart(ax.get_yticklabels()[::-1], figure)
    if own and shape == (30, 60):  # all of them fit
        assert len(ax.get_xticks()) == 60 and len(ax.get_yticks()) == 30
    assert ax.title.get_window_extent().x1 <= figure.bbox.x1 * 1.02
    plt.close(figure)


def test_files_have_150_dots_per_inch_and_vectors_keep_their_letters(tmp_path: Path) -> None:
    ax = draw([[1.0, 2.0]], columns=["alpha", "beta"])
    figure: Any = ax.figure
    width, height = map(float, figure.get_size_inches())
    png = plots.save(ax, tmp_path / "a.png")
    held: Any = plt.imread(png)
    assert held.shape[:2] == (round(height * 150), round(width * 150))
    assert ">alpha<" in plots.save(ax, tmp_path / "a.svg").read_text()
    assert plots.save(ax, tmp_path / "a.pdf", close=True).read_bytes().startswith(b"%PDF")


def test_bars_of_both_signs_stand_on_a_line_at_zero() -> None:
    ax = plots.bars([0.5, -0.25], names=["0", "1"], label="layer", value_label="effect")
    up, down = (bar.get_facecolor() for bar in ax.patches)
    assert up != down and float(np.asarray(ax.lines[0].get_xdata())[0]) == 0.0
    assert not plots.bars([0.5, 0.25], names=["0", "1"], label="layer", value_label="effect").lines


def test_a_dashed_line_leaves_an_equal_one_below_it_in_sight() -> None:
    ax: Any = plots.lines([0, 1], {"all": [1, 2], "pruned": [1, 2]}, x_label="", y_label="", dashed=["pruned"])
    assert [line.get_linestyle() for line in ax.lines] == ["-", "--"]
