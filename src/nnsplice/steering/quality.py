"""The AUC of a direction, on states that it was not fitted on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def auc(positive: Tensor, negative: Tensor) -> float:
    """The probability that a positive score is higher than a negative one; a tie counts half.

    >>> from nnsplice.steering.quality import auc
    >>> auc(torch.tensor([2.0, 3.0]), torch.tensor([1.0, 2.0]))
    0.875
    """
    higher = positive[:, None] > negative[None]
    same = positive[:, None] == negative[None]
    return (higher.double() + same.double() / 2).mean().item()


def held_out(
    positive: Tensor, negative: Tensor, find: Callable[[Tensor, Tensor], Tensor], folds: int, seed: int
) -> float | None:
    """The cross-validated AUC of a direction, averaged over folds; None for too few rows.

    Paired rows are in one fold, so that no held-out prompt has its pair among the fitted ones.
    """
    n, m = positive.shape[0], negative.shape[0]
    folds = min(folds, n, m)
    if folds < 2:
        return None
    shuffled = torch.Generator().manual_seed(seed)
    first = torch.randperm(n, generator=shuffled)
    second = first if n == m else torch.randperm(m, generator=shuffled)
    total, weight = 0.0, 0
    for fold in range(folds):
        out = [order[fold::folds] for order in (first, second)]
        rest = [torch.cat([order[k::folds] for k in range(folds) if k != fold]) for order in (first, second)]
        found = find(positive[rest[0]], negative[rest[1]])
        size = len(out[0]) * len(out[1])
        total += size * auc(positive[out[0]] @ found, negative[out[1]] @ found)
        weight += size
    return total / weight
