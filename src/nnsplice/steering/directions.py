"""The direction between two groups of states: one function for each method, on `[row, width]` in float64.

All of them use the inner products of the rows, whose number is far below the width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nnsplice.errors import BadArgument, ShapeError


@dataclass(frozen=True, slots=True)
class DirectionMethod:
    """A function that finds a direction, and its options with their defaults."""

    find: Callable[..., Tensor]
    options: dict[str, Any] = field(default_factory=dict)


def direction(positive: Tensor, negative: Tensor, method: str, options: dict[str, Any]) -> Tensor:
    """The vector of a method: it points to the positive states, and its length is the distance of the means along it.

    So a coefficient of 1.0 means the same for every method: from the negative mean to the positive.
    """
    found = METHODS[method].find(positive, negative, **options)
    u = found / found.norm()
    gap = (positive.mean(0) - negative.mean(0)) @ u
    return u * gap


def mean_difference(positive: Tensor, negative: Tensor) -> Tensor:
    """From the mean of the negative states to that of the positive ones."""
    return positive.mean(0) - negative.mean(0)


def pca(positive: Tensor, negative: Tensor, *, centring: str) -> Tensor:
    """The first principal axis.

    Args:
        centring: `"pair"`: each pair about its own mean, which is the axis of the differences about zero; `"global"`:
            all states about their common mean.
    """
    if centring == "pair":
        if positive.shape != negative.shape:
            raise ShapeError(
                f"{positive.shape[0]} positive and {negative.shape[0]} negative rows are no pairs",
                expected="row i of one to belong to row i of the other",
                write='fit(..., method="pca", centring="global")',
            )
        rows = positive - negative
    else:
        rows = torch.cat([positive, negative])
        rows = rows - rows.mean(0)
    values, vectors = torch.linalg.eigh(rows @ rows.T)
    return rows.T @ vectors[:, values.argmax()]


def lda(positive: Tensor, negative: Tensor, *, shrinkage: float) -> Tensor:
    """Fisher's discriminant: the mean difference, in the metric of what varies within the groups.

    Args:
        shrinkage: the weight of a multiple of the identity in the covariance, above 0 and at most 1.
    """
    difference = positive.mean(0) - negative.mean(0)
    within = torch.cat([positive - positive.mean(0), negative - negative.mean(0)])
    free = max(within.shape[0] - 2, 1)
    spread = (within**2).sum() / free / within.shape[1]
    if shrinkage == 1 or spread == 0:
        return difference
    ridge = shrinkage * spread
    small = within @ within.T + ridge * free / (1 - shrinkage) * torch.eye(within.shape[0]).to(within)
    return difference - within.T @ torch.linalg.solve(small, within @ difference)


def logistic(positive: Tensor, negative: Tensor, *, ridge: float) -> Tensor:
    """The weights of a logistic regression with an intercept, found by Newton's method.

    Args:
        ridge: the weight of the squared norm of the weights, for states of a mean squared length of 1.
    """
    rows = torch.cat([positive, negative])
    rows = rows - rows.mean(0)
    rows = rows / (rows**2).sum(-1).mean().sqrt()
    labels = torch.cat([torch.ones(len(positive)), torch.zeros(len(negative))]).to(rows)
    values, vectors = torch.linalg.eigh(rows @ rows.T)
    kept = values > 1e-10 * values.max()
    roots, vectors = values[kept].sqrt(), vectors[:, kept]
    # Coordinates along the span of the rows, and a constant for the intercept, which is not regularised.
    features = torch.cat([vectors * roots, torch.ones_like(labels)[:, None]], dim=1)
    cost = torch.full((features.shape[1],), ridge).to(rows)
    cost[-1] = 1e-9
    weights = _newton(features, labels, cost)
    return rows.T @ (vectors @ (weights[:-1] / roots))


def _newton(features: Tensor, labels: Tensor, cost: Tensor) -> Tensor:
    weights = torch.zeros(features.shape[1]).to(features)

    def loss(w: Tensor) -> Tensor:
        scores = features @ w
        return torch.nn.functional.softplus(scores).sum() - scores @ labels + (cost * w**2).sum() / 2

    for _ in range(100):
        chance = torch.sigmoid(features @ weights)
        gradient = features.T @ (chance - labels) + cost * weights
        curvature = features.T @ (features * (chance * (1 - chance))[:, None]) + torch.diag(cost)
        step = torch.linalg.solve(curvature, gradient)
        size = 1.0
        while loss(weights - size * step) > loss(weights) and size > 1e-6:
            size /= 2
        weights = weights - size * step
        if gradient.abs().max() < 1e-10:
            break
    return weights


METHODS: dict[str, DirectionMethod] = {
    "mean_difference": DirectionMethod(mean_difference),
    "pca": DirectionMethod(pca, {"centring": "pair"}),
    "logistic": DirectionMethod(logistic, {"ridge": 1e-2}),
    "lda": DirectionMethod(lda, {"shrinkage": 0.1}),
}


def checked(method: str, given: dict[str, Any]) -> dict[str, Any]:
    """The options of a method, with its defaults.

    Raises:
        BadArgument: no such method, an option that it does not have, or a value out of its domain.
    """
    if method not in METHODS:
        raise BadArgument(f"there is no method {method!r}", expected=", ".join(METHODS))
    known = METHODS[method].options
    idle = [name for name in given if name not in known]
    if idle:
        raise BadArgument(
            f"{method} has no option {', '.join(idle)}, so it would have no effect",
            expected=", ".join(known) or "no option",
        )
    options = {**known, **given}
    if options.get("centring", "pair") not in ("pair", "global"):
        raise BadArgument(f"centring={options['centring']!r}", expected='"pair" or "global"')
    if not 0 < options.get("shrinkage", 1.0) <= 1:
        raise BadArgument(f"shrinkage={options['shrinkage']}", expected="a number above 0, at most 1")
    if not options.get("ridge", 1.0) > 0:
        raise BadArgument(f"ridge={options['ridge']}", expected="a number above 0")
    return options
