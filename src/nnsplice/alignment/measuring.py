"""Interchange-intervention accuracy: how often the counterfactual answer comes first."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import numpy as np
import torch

from nnsplice import packed
from nnsplice.alignment.pairs import PairRuns
from nnsplice.packed import BaseRuns, Cost
from nnsplice.subspaces import Subspace
from nnsplice.sweeps.jobs import Job
from nnsplice.sweeps.operations import operation_of
from nnsplice.sweeps.packing import measured_states, row_of, tokens_of

T = TypeVar("T")


def accuracies(
    side: PairRuns, subspaces: Mapping[int, Subspace | None], pairs: Sequence[int], room: int
) -> tuple[np.ndarray, Cost]:
    """`[pair, site]`, 1 where the counterfactual answer is first, in the order of the mapping; NaN where there is none.

    Args:
        subspaces: the part of each site, by its number; None for the whole of it.
        room: how many tokens run at once.
    """
    plan, work, cost = side.plan, side.work, Cost()
    exists = plan.exists()[np.ix_(list(pairs), list(subspaces))]
    values = np.where(exists, side.corrupted[list(pairs)][:, None], np.nan)
    changes = {target: operation_of("patch", subspace).apply for target, subspace in subspaces.items()}
    where = {pair: n for n, pair in enumerate(pairs)}, {target: n for n, target in enumerate(subspaces)}
    for some in blocks(side, pairs, room):
        base = BaseRuns(work.model, plan.corrupted, memo=memo_of(side))
        jobs = [job for target in subspaces for job in side.jobs(target, some)]
        for chunk in fitting(side, jobs, room):
            ran = packed.run(base, [row_of(work, job, changes[job[1]]) for job in chunk], prompts=some)
            with torch.no_grad():
                found, more = measured_states(work, ran.head, ran.states(), chunk)
            cost += ran.cost + more
            for (pair, target), value in zip(chunk, found, strict=True):
                values[where[0][pair], where[1][target]] = value
    return values, cost


def memo_of(side: PairRuns) -> dict[str, object]:
    """The attention of packed rows on this model, found before a pass is recorded."""
    return {"way": side.work.memo["way"]} if "way" in side.work.memo else {}


def blocks(side: PairRuns, pairs: Sequence[int], room: int) -> Iterator[list[int]]:
    """Pairs whose base prompts fit into one recorded pass."""
    lengths = side.plan.corrupted.lengths("decoder")
    return within(pairs, [lengths[pair] for pair in pairs], room)


def fitting(side: PairRuns, jobs: Sequence[Job], room: int) -> Iterator[list[Job]]:
    """Jobs whose own tokens fit into one pack."""
    return within(jobs, tokens_of(side.work, jobs), room)


def within(items: Iterable[T], sizes: Iterable[int], room: int) -> Iterator[list[T]]:
    """Items in order, in batches that have room; an item that is too large is a batch."""
    some: list[T] = []
    held = 0
    for item, size in zip(items, sizes, strict=True):
        if some and held + size > room:
            yield some
            some, held = [], 0
        some.append(item)
        held += size
    if some:
        yield some
