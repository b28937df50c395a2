"""A place as a cell of a result: its address, its kind, and its numbers along the axes of a grid."""

from __future__ import annotations

from dataclasses import replace

from nnsplice.paths import Path, Slice, Span
from nnsplice.results import AXES, Cell


def cell_of(path: Path) -> Cell:
    """The cell of a place at a token or a span; at `[:]`, or without tokens as weights are, it has no position."""
    place, position = path.place, path.position
    open_ = tuple(replace(step, index=None if step.index is None else Slice()) for step in place.steps)
    if isinstance(position, Span):
        shown = f'"{position.name}"' + ("" if position.token is None else f"[{position.token}]")
    else:
        shown = position if isinstance(position, int) else None
    numbers = [number_of(place, axis) for axis in AXES]
    return Cell(str(path), str(replace(place, steps=open_, site=None)), *numbers, position=shown)


def number_of(place: Path, axis: str) -> int | None:
    """The number of a place along an axis: `"layer"`, `"head"`, ..."""
    for step in place.steps:
        if step.name == f"{axis}s" and isinstance(step.index, int):
            return step.index
    if axis == "layer" and place.native:  # a native path counts its layers by whatever list they stand in
        return next((step.index for step in place.steps if isinstance(step.index, int)), None)
    return None
