"""The pairs of an alignment, split into training and held-out ones, and its sites."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from nnsplice import engine
from nnsplice.activations.access import site_of
from nnsplice.atlas import DERIVED
from nnsplice.errors import BadArgument, RefusedPlace
from nnsplice.packed import Cost
from nnsplice.sweeps.choosing import choose
from nnsplice.sweeps.executors import Work
from nnsplice.sweeps.jobs import Job
from nnsplice.sweeps.plan import Plan
from nnsplice.sweeps.unedited import clean_run, corrupted_run


@dataclass(frozen=True)
class PairSplit:
    """The numbers of the pairs that are trained on, and of those that are not."""

    training: tuple[int, ...]
    held_out: tuple[int, ...]


def split(pairs: int, held_out: float | Sequence[int], seed: int) -> PairSplit:
    """Training pairs, shuffled, and held-out ones.

    Args:
        held_out: a share of them, or their numbers.

    Raises:
        BadArgument: one of the two would be empty.
    """
    if isinstance(held_out, float | int):
        count = round(pairs * held_out)
        if not 0 < held_out < 1 or not 0 < count < pairs:
            raise BadArgument(
                f"held_out={held_out} of {pairs} pairs leaves none to train on, or none to measure on",
                expected="a share between 0 and 1 of two pairs or more, or the numbers of some pairs",
            )
        order = torch.randperm(pairs, generator=torch.Generator().manual_seed(seed)).tolist()
        return PairSplit(tuple(order[count:]), tuple(sorted(order[:count])))
    kept = sorted(set(held_out))
    if not kept or len(kept) == pairs or not all(isinstance(n, int) and 0 <= n < pairs for n in kept):
        raise BadArgument(f"held_out={list(held_out)[:8]}", expected=f"some of the numbers from 0 to {pairs - 1}")
    rest = [n for n in range(pairs) if n not in kept]
    order = torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed)).tolist()
    return PairSplit(tuple(rest[n] for n in order), tuple(kept))


@dataclass(frozen=True)
class PairRuns:
    """The recorded runs of the pairs on one model: the user's, or its random twin."""

    #: Its name in seeds and files.
    name: str
    work: Work
    #: `[pair]`: whether the source and the base run, unedited, put the counterfactual answer first.
    clean: np.ndarray
    corrupted: np.ndarray
    cost: Cost

    @property
    def plan(self) -> Plan:
        """The pairs, and every site as a cell."""
        return self.work.plan

    def jobs(self, target: int, pairs: Sequence[int]) -> list[Job]:
        """The cells of a site that have to run for some pairs; the others are known to equal the base run."""
        wanted = set(pairs)
        return [job for job in self.plan.jobs if job[1] == target and job[0] in wanted]

    def width(self, target: int) -> int:
        """The width of a site."""
        assert self.work.source.clean is not None
        ((_, tensor), *_) = self.work.source.clean.values[self.plan.targets[target].places[0].site].values()
        return tensor.shape[-1]


def pair_runs(name: str, model: engine.Model, plan: Plan, room: int) -> PairRuns:
    """Run the pairs through a model, and see that packed rows give its numbers.

    Raises:
        RefusedExecutor: they do not, so nothing could be trained through them.
    """
    clean_logits, source, spent = clean_run(model, plan, room)
    work = Work(model, plan, source, None)
    choose("packed", work)
    corrupted_logits, more = corrupted_run(model, plan, room)
    every = range(len(plan.corrupted))
    clean, corrupted = [plan.metric(one, every).double().cpu().numpy() for one in (clean_logits, corrupted_logits)]
    return PairRuns(name, work, clean, corrupted, spent + more)


def check_sites(plan: Plan) -> None:
    """Raise for sites of which no subspace can be trained.

    Raises:
        RefusedPlace: a site that is derived from several values.
        BadArgument: a set of sites, or pairs that are one run.
    """
    for target in plan.targets:
        if len(target.places) != 1:
            raise BadArgument(
                "a set of sites has no one subspace", path=target.cell.path, expected="one site in a cell"
            )
        if site_of(target.places[0]).kind in DERIVED:
            raise RefusedPlace("this site is derived from several values of a run", path=target.cell.path)
    if not plan.jobs:
        raise BadArgument(
            "at all these sites both runs of every pair are one, so there is nothing to interchange",
            expected="sites at or behind the first token that differs, up to the token that is read",
        )


def seeded(*parts: object) -> torch.Generator:
    """A generator seeded by name, not by order, so that a resumed run draws the same numbers."""
    number = hashlib.sha256(" ".join(map(str, parts)).encode()).digest()[:7]
    return torch.Generator().manual_seed(int.from_bytes(number, "big"))
