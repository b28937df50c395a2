"""Targets: each cell of a result with the sites and positions that are changed for it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from nnsplice.activations.access import site_of
from nnsplice.activations.prompts import Prompts
from nnsplice.paths import Path, Position, Slice, Span
from nnsplice.results import AXES, Cell

#: The changed tokens of each prompt: a position, a span, a slice; None for all of them.
At = int | Span | Slice | None


@dataclass(frozen=True)
class TargetPart:
    """Sites that are changed at the same tokens."""

    #: The cell of this site by itself.
    cell: Cell
    #: The sites: several for a window of layers, in execution order.
    places: tuple[Path, ...]
    #: The changed tokens; None for all tokens at once.
    position: At
    #: For a knockout: the keys that these tokens do not attend to.
    key: At = None

    @property
    def tower(self) -> str:
        """The tower whose tokens the position counts."""
        return site_of(self.places[0]).tower


@dataclass(frozen=True)
class Target:
    """One cell of the result, and the sites that are changed together for it."""

    cell: Cell
    #: Several for a set of sites, in execution order.
    parts: tuple[TargetPart, ...]

    @property
    def places(self) -> tuple[Path, ...]:
        """Every site that is changed."""
        return tuple(place for part in self.parts for place in part.places)

    @property
    def is_set(self) -> bool:
        """Whether the cell is a set of sites."""
        return self.cell.set is not None

    @property
    def tower(self) -> str:
        """The tower of its first site."""
        return self.parts[0].tower


def cell_of(path: Path) -> Cell:
    """The cell of a site at a token or a span; without a position for `[:]` and for weights."""
    place = path.place
    open_ = tuple(replace(step, index=None if step.index is None else Slice()) for step in place.steps)
    numbers = [number_of(place, axis) for axis in AXES if axis != "feature"]
    feature = None if place.sae is None else place.sae.features
    parts = None if place.sae is None else replace(place.sae, features=None if feature is None else Slice())
    component = str(replace(place, steps=open_, sae=parts, site=None))
    at, key = _shown(path.position), _shown(path.key)
    return Cell(str(path), component, *numbers, position=at, key=key, feature=number_of(place, "feature"))


def _shown(at: Position | None) -> int | str | None:
    if isinstance(at, Span):
        return f'"{at.name}"' + ("" if at.token is None else f"[{at.token}]")
    return at if isinstance(at, int) else None


def number_of(place: Path, axis: str) -> int | None:
    """The number of a site along an axis: `"layer"`, `"head"`, ..."""
    if axis == "feature":
        return place.sae.features if place.sae is not None and isinstance(place.sae.features, int) else None
    for step in place.steps:
        if step.name == f"{axis}s" and isinstance(step.index, int):
            return step.index
    if axis == "layer" and place.native:  # in a native path the first index is that of the layer
        return next((step.index for step in place.steps if isinstance(step.index, int)), None)
    return None


def own_tokens(at: At, prompts: Prompts, prompt: int, length: int) -> list[int]:
    """The tokens at a position of a prompt of this length, by their numbers from 0."""
    if isinstance(at, Span):
        assert prompts.spans is not None
        start, stop = prompts.spans[at.name][prompt]
        if at.token is None:
            return list(range(start, stop))
        return [(start if at.token >= 0 else stop) + at.token]
    if at is None or isinstance(at, Slice):
        return list((at or Slice()).range(length))
    return [at % length if at < 0 else at]


def has_tokens(at: At, length: int) -> bool:
    """Whether a prompt of this length has the tokens of a position."""
    if isinstance(at, int):
        return -length <= at < length
    if isinstance(at, Slice):
        return all(bound is None or -length <= bound <= length for bound in (at.start, at.stop)) and bool(
            at.range(length)
        )
    return True
