"""Confidence intervals, tests and stability of averages over prompts.

All are about the pooled effect (differences averaged, then divided), or the mean change where there is no effect.
Prompts are resampled as a whole, with all their cells and unedited runs, so that correlations between cells are kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from nnsplice.errors import BadArgument
from nnsplice.results import labelled, measures
from nnsplice.results.table import Table

#: Numbers in memory at once.
AT_ONCE = 4_000_000
#: Up to this number of prompts, all patterns of signs are tried.
EXACT = 12


@dataclass(frozen=True)
class _Sums:
    """`[prompt, cell]`: numerator and denominator of the pooled effect, 0 where a prompt lacks the cell."""

    moved: np.ndarray
    #: The total effects of the prompts that have the cell; ones where changes are averaged.
    whole: np.ndarray

    @classmethod
    def of(cls, table: Table, flat: bool) -> _Sums:
        moved = measures.change(table)
        ends = np.ones(len(moved)) if flat else measures.span(table)
        # Where there is no effect, as total effects cancel, there is none of a draw either.
        there = ~np.isnan(moved if flat else measures.effect(table))
        return cls(np.where(there, moved, 0.0), np.where(there, ends[:, None], 0.0))

    def drawn(self, weights: np.ndarray) -> np.ndarray:
        """`[draw, cell]`: the averages with these weights, `[draw, prompt]`; NaN where total effects cancel."""
        with measures.quiet():
            whole, size = weights @ self.whole, weights @ np.abs(self.whole)
            return np.where(np.abs(whole) > measures.TINY * size, (weights @ self.moved) / whole, np.nan)


def interval(table: Table, level: float, draws: int, seed: int) -> np.ndarray:
    """`[cell, 2]`: a percentile bootstrap interval over prompts."""
    if not 0 < level < 1:
        raise BadArgument(f"level={level}", expected="a share between 0 and 1, such as 0.95")
    sums = _sums(table, draws)
    found = np.full((len(table.cells), 2), np.nan)
    tail = (1 - level) / 2
    for cells in _chunks(len(table.cells), draws):
        part = _Sums(sums.moved[:, cells], sums.whole[:, cells])
        drawn = part.drawn(_resampled(len(table.clean), draws, seed))
        some = np.flatnonzero(np.isfinite(drawn).any(0))
        if len(some):
            found[cells.start + some] = np.nanquantile(drawn[:, some], [tail, 1 - tail], axis=0).T
    found[_in_few(table)] = np.nan
    return found


def pvalues(table: Table, draws: int, seed: int) -> np.ndarray:
    """`[cell]`: the p-values of a sign-flip test of the mean change.

    Signs are flipped for whole prompts. With few prompts all patterns are tried; with many, `draws` are drawn, and the
    observed one counts among them, so that no p is 0.
    """
    moved = _sums(table, draws, flat=True).moved
    prompts = len(moved)
    exact = prompts <= EXACT
    observed = np.abs(moved.sum(0))
    with measures.quiet():  # a tolerance for sums of the same numbers in another order; they may nearly cancel
        least = observed - 1e-12 * np.abs(moved).sum(0)
    if exact:
        patterns = np.arange(2**prompts)
        signs = 1.0 - 2.0 * ((patterns[:, None] >> np.arange(prompts)) & 1)
    else:
        signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(draws, prompts))
    as_far = np.zeros(len(table.cells))
    for cells in _chunks(len(table.cells), len(signs)):
        as_far[cells] = (np.abs(signs @ moved[:, cells]) >= least[cells]).sum(0)
    found = as_far / len(signs) if exact else (as_far + 1) / (len(signs) + 1)
    found[_in_few(table) | ~np.isfinite(observed)] = np.nan
    return found


def stability(table: Table, k: int, draws: int, seed: int) -> float:
    """The mean Jaccard overlap of the first k cells with the first k of bootstrap draws of the prompts."""
    count = int((measures.size(table, measures.change(table)) >= 0).sum())
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= count:
        raise BadArgument(f"stability({k!r})", expected=f"how many of the first cells to compare: 1 to {count}")
    if len(table.clean) < 2:
        raise BadArgument("one prompt cannot be drawn anew", expected="a result of several prompts")
    sums = _sums(table, draws, flat=bool(np.isnan(measures.effect(table)).all()))  # as `best` decides
    first = _first(sums.drawn(np.ones((1, len(table.clean)))), k)[0]
    shared: list[float] = []
    weights = _resampled(len(table.clean), draws, seed)
    step = max(AT_ONCE // max(len(table.cells), 1), 1)
    for start in range(0, draws, step):
        for other in _first(sums.drawn(weights[start : start + step]), k):
            both = len(first & other)
            shared.append(both / (len(first) + len(other) - both))
    return float(np.mean(shared))


def _sums(table: Table, draws: int, *, flat: bool | None = None) -> _Sums:
    if isinstance(draws, bool) or not isinstance(draws, int) or draws < 1:
        raise BadArgument(f"draws={draws!r}", expected="a number of draws, such as 2000")
    if problem := labelled.no_mean(table):
        raise BadArgument(problem, expected="prompts that have the same cells, or roles", write="result.by_role()")
    return _Sums.of(table, measures.shown(table) == "change" if flat is None else flat)


def _in_few(table: Table) -> np.ndarray:
    """`[cell]`: cells of fewer than two prompts, which have no uncertainty."""
    return (~np.isnan(table.values)).sum(0) < 2


def _resampled(prompts: int, draws: int, seed: int) -> np.ndarray:
    """`[draw, prompt]`: the number of times that each prompt is drawn; the same for every cell."""
    chosen = np.random.default_rng(seed).integers(prompts, size=(draws, prompts))
    weights = np.zeros((draws, prompts))
    np.add.at(weights, (np.arange(draws)[:, None], chosen), 1.0)
    return weights


def _chunks(cells: int, draws: int) -> Iterator[slice]:
    step = max(AT_ONCE // draws, 1)
    return (slice(start, start + step) for start in range(0, cells, step))


def _first(averages: np.ndarray, k: int) -> list[set[int]]:
    """For each draw, the k cells with the largest averages in size."""
    order = np.argsort(np.where(np.isnan(averages), np.inf, -np.abs(averages)), axis=1, kind="stable")[:, :k]
    return [set(row.tolist()) for row in order]
