"""Figures of a steering sweep; all values are `[layer, coefficient]`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nnsplice import plots


def heatmap(
    values: np.ndarray,
    layers: Sequence[int],
    coefficients: Sequence[float],
    title: str,
    label: str,
    centre: float | None,
    ax: plots.Axes | None,
) -> plots.Axes:
    """Layers by coefficients."""
    return plots.heatmap(
        values, rows=layers, columns=[f"{c:g}" for c in coefficients], row_label="layer", column_label="coefficient",
        title=title, value_label=label, centre=centre, ax=ax,
    )  # fmt: skip


def lines(
    values: np.ndarray,
    layers: Sequence[int],
    coefficients: Sequence[float],
    metric: str,
    level: float,
    ax: plots.Axes | None,
) -> plots.Axes:
    """The metric by coefficient, a line for each layer."""
    named = {f"layer {layer}": row for layer, row in zip(layers, values, strict=True)}
    return plots.lines(coefficients, named, x_label="coefficient", y_label=metric, level=level, ordered=True, ax=ax)


def frontier(
    change: np.ndarray,
    kl: np.ndarray,
    layers: Sequence[int],
    coefficients: Sequence[float],
    metric: str,
    kl_label: str,
    ax: plots.Axes | None,
) -> plots.Axes:
    """The change of the metric by KL divergence, a line for each layer."""
    order = np.argsort(coefficients)
    x, y = ({f"layer {n}": row[order] for n, row in zip(layers, each, strict=True)} for each in (kl, change))
    return plots.lines(x, y, x_label=kl_label, y_label=f"change of {metric}", level=0.0, ordered=True, ax=ax)
