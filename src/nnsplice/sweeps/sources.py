"""Where a sweep's values come from: the clean run, a reference, or a generator of noise."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nnsplice.activations.saved_activation import SavedActivation
from nnsplice.errors import UnknownPath
from nnsplice.paths import Path
from nnsplice.sweeps.plan import Job, Plan


@dataclass(frozen=True)
class Captured:
    """Values of a run at many places: site -> prompt -> (position -> number, `[number, width]`)."""

    values: Mapping[object, Mapping[int, tuple[Mapping[int, int], Tensor]]]

    def at(self, place: Path, prompt: int, position: int) -> Tensor:
        """The value of one prompt at one own token: `[width]`."""
        index, tensor = self.values[place.site][prompt]
        return tensor[index[position]]


@dataclass(frozen=True)
class Source:
    """What a job writes at a place and a token."""

    plan: Plan
    clean: Captured | None = None

    def value(self, job: Job, place: Path, order: int, position: int, width: int) -> Tensor | None:
        """`[width]`, or None where the operation computes its value from the current one.

        Args:
            order: the number of this token among those of the cell; the token of the same number is taken from the
                clean run.
            position: the token, in the edited prompt.
        """
        plan, prompt = self.plan, job[0]
        if plan.operation.way == "compute":
            return None
        if plan.operation.name == "patch":
            assert self.clean is not None
            there = plan.positions(plan.targets[job[1]], prompt, of_clean=True)[order]
            return self.clean.at(place, prompt, there)
        if plan.operation.name == "noise":
            return torch.randn(width, generator=self._generator(job, place, position), dtype=torch.float64)
        assert plan.reference is not None
        rows = _rows_at(plan.reference, place, position)
        if plan.operation.name == "resample":
            generator = self._generator(job, place, position)
            return rows[int(torch.randint(len(rows), (1,), generator=generator))]
        if plan.operation.name == "add" and len(rows) == len(plan.corrupted):
            return rows[prompt]
        return rows.mean(0)

    def _generator(self, job: Job, place: Path, position: int) -> torch.Generator:
        # Seeded by what is changed, not by when: every executor, shard and resumed run draws the same numbers.
        text = f"{self.plan.seed} {job[0]} {self.plan.targets[job[1]].cell.path} {place.place} {position}"
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
        return torch.Generator().manual_seed(seed)


def _rows_at(reference: SavedActivation, place: Path, position: int) -> Tensor:
    """`[row, width]` of a reference at this position; where it has no such position, all that it holds of the place."""
    exact = place.at(position)
    if exact in reference:
        return reference.get(exact)
    try:
        held = reference.get(place.place)
    except UnknownPath as error:
        raise UnknownPath(f"the reference does not hold this site\n{error}", path=place.place) from None
    return held.flatten(0, 1) if held.dim() == 3 else held
