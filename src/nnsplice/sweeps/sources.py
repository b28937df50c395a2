"""The values that a sweep writes: from the clean run, a reference, or noise."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nnsplice.activations.saved_activation import SavedActivation
from nnsplice.errors import ShapeError, UnknownPath
from nnsplice.paths import Path, Span
from nnsplice.sweeps.plan import Plan
from nnsplice.sweeps.targets import At, TargetPart


@dataclass(frozen=True)
class Captured:
    """Captured values by site and prompt: an index from position to row, and the rows `[row, width]`."""

    values: Mapping[object, Mapping[int, tuple[Mapping[int, int], Tensor]]]
    #: `[prompt]`: the prompt whose run has its values; equal prompts share a run.
    run_of: Sequence[int]

    def at(self, place: Path, prompt: int, position: int) -> Tensor:
        """The value of a site in one prompt, at one of the prompt's own tokens: `[width]`."""
        index, tensor = self.values[place.site][self.run_of[prompt]]
        return tensor[index[position]]


@dataclass(frozen=True)
class Source:
    """The values that the operation of a plan writes."""

    plan: Plan
    clean: Captured | None = None
    #: A cache of means of the reference, by key, and by prompt if each prompt has its own row.
    _means: dict[tuple[Path, int | None], Tensor] = field(default_factory=dict, repr=False, compare=False)

    def value(self, prompt: int, part: TargetPart, place: Path, order: int, position: int, width: int) -> Tensor | None:
        """The value to write at a site and token, `[width]`; None if the operation computes it from the current one.

        Args:
            part: the part of a cell, with its site.
            order: the index of this token among the tokens of the part: a patch takes the token of the same index from
                the clean run.
            position: the token, in the edited prompt.
            width: the width of the site; 0 if the caller checks it.
        """
        plan = self.plan
        if plan.operation.way in ("compute", "cut"):
            return None
        if plan.operation.name == "patch":
            assert self.clean is not None
            there = plan.positions(part, prompt, of_clean=True)[order]
            return self.clean.at(place, prompt, there)
        if plan.operation.name == "noise":
            return torch.randn(width, generator=self._generator(prompt, part, place, position), dtype=torch.float64)
        assert plan.reference is not None
        keys = [place.at(key) for key in _positions_in_reference(part.position, order, position)]
        key, values = _lookup(plan.reference, place, keys)
        if width not in (0, values.shape[-1]):
            raise ShapeError(f"the reference is {values.shape[-1]} wide, the site {width}", path=place.place)
        if plan.operation.name == "add" and len(values) == plan.runs:
            return self._mean((key, prompt), values[plan.number(prompt)])
        rows = values.flatten(0, 1)
        if plan.operation.name == "resample":
            generator = self._generator(prompt, part, place, position)
            return rows[int(torch.randint(len(rows), (1,), generator=generator))]
        return self._mean((key, None), rows)

    def _mean(self, of: tuple[Path, int | None], rows: Tensor) -> Tensor:
        if of not in self._means:
            self._means[of] = rows.mean(0)
        return self._means[of]

    def _generator(self, prompt: int, part: TargetPart, place: Path, position: int) -> torch.Generator:
        # Seeded by the cell, so that every executor, shard and resumed run draws the same numbers.
        text = f"{self.plan.seed} {self.plan.number(prompt)} {part.cell.path} {place.place} {position}"
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
        return torch.Generator().manual_seed(seed)


def _positions_in_reference(position: At, order: int, token: int) -> list[int | Span]:
    """The positions under which a reference may hold a token of a cell: as the path has it, and by number."""
    if isinstance(position, Span) and position.token is None:
        position = Span(position.name, order)
    return [position, token] if isinstance(position, int | Span) else [token]


def _lookup(reference: SavedActivation, place: Path, keys: Sequence[Path]) -> tuple[Path, Tensor]:
    """The first of these keys that a reference holds, else the site; and its values `[row, position, width]`."""
    for key in keys:
        if key in reference:
            return key, reference.get(key)[:, None]
    try:
        values = reference.get(place.place)
    except UnknownPath as error:
        raise UnknownPath(f"the reference does not hold this site\n{error}", path=place.place) from None
    return place.place, values if values.dim() == 3 else values[:, None]
