"""Verification of estimates: the largest computed exactly, and as many others drawn at random."""

from __future__ import annotations

from dataclasses import replace
from os import PathLike

import numpy as np

from nnsplice import engine
from nnsplice.attribution.path_patching import run_paths
from nnsplice.results import SweepResult, estimates
from nnsplice.sweeps.jobs import Jobs
from nnsplice.sweeps.plan import Plan
from nnsplice.sweeps.running import run_fresh


def verified(
    model: engine.Model,
    plan: Plan,
    estimated: SweepResult,
    k: int,
    *,
    executor: str,
    max_tokens: int | None,
    journal: str | PathLike[str] | None,
    progress: bool,
) -> SweepResult:
    """The estimates with the exact values of the first k, and of as many others."""
    table = estimated.table
    can_differ = np.zeros(len(plan.targets), dtype=bool)
    can_differ[plan.jobs.columns()[1]] = True
    sizes = estimates.sizes_of(table)
    sizes = np.where(can_differ if table.edges is None else can_differ[:, None], sizes, np.nan)
    chosen = np.concatenate([estimates.first(sizes, k), _others(sizes, k, plan.seed)]).astype(int)
    exact = np.full(table.values.shape if table.edges is None else table.edges.shape, np.nan)
    running = {"max_tokens": max_tokens, "journal": journal, "progress": progress}
    if table.edges is None:
        found = run_fresh(_part(plan, chosen), model, executor=executor, **running)
        exact[:, chosen] = found.table.values[:, chosen]
    else:
        cells, receivers = np.unravel_index(chosen, sizes.shape)
        pairs = [table.receivers[number] for number in receivers]
        if pairs:
            found = run_paths(model, of_edges(plan, cells), pairs, **running)
            exact[:, cells, receivers] = found.table.values
    verify = {"k": k, "of": int((~np.isnan(sizes)).sum()), "seed": plan.seed}
    return SweepResult(replace(table, exact=exact, asked={**table.asked, "verify": verify}))


def _others(sizes: np.ndarray, k: int, seed: int) -> np.ndarray:
    """An equal number of the others, drawn at random; all of them if there are fewer."""
    flat = sizes.reshape(-1)
    rest = np.setdiff1d(np.flatnonzero(~np.isnan(flat)), estimates.first(sizes, k))
    return np.sort(np.random.default_rng(seed).permutation(rest)[:k])


def _part(plan: Plan, cells: np.ndarray) -> Plan:
    """Only these cells of a plan."""
    jobs, known = (some.of_targets(cells.tolist()) for some in (plan.jobs, plan.known))
    return replace(plan, jobs=jobs, known=known)


def of_edges(plan: Plan, cells: np.ndarray) -> Plan:
    """A target for each edge: its sender."""
    numbers: dict[int, list[int]] = {}
    for number, cell in enumerate(cells.tolist()):
        numbers.setdefault(cell, []).append(number)
    jobs, known = (
        Jobs.of((prompt, number) for prompt, cell in some for number in numbers.get(cell, ()))
        for some in (plan.jobs, plan.known)
    )
    return replace(plan, targets=tuple(plan.targets[cell] for cell in cells), jobs=jobs, known=known)
