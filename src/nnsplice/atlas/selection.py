"""A selection of parameters, kept as index ranges instead of masks: a few numbers per parameter, whatever its size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from types import MappingProxyType

import torch

from nnsplice.atlas.layouts import merge
from nnsplice.errors import BadArgument

Ranges = tuple[tuple[int, int], ...]
#: None for the whole parameter, else the axis and the ranges along it.
Part = tuple[int, Ranges] | None


@dataclass(frozen=True, eq=False)
class Selection:
    """Which parameters of a model, and which slices of them.

    >>> rows = Selection.of({"q.weight": (0, ((8, 16),))}, {"q.weight": (32, 64)})
    >>> len(rows), rows.numel()
    (1, 512)
    >>> int(rows.masks()["q.weight"].sum())
    512
    """

    parts: Mapping[str, Part]
    shapes: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, parts: Mapping[str, Part], shapes: Mapping[str, tuple[int, ...]]) -> Selection:
        """A selection with ranges in their shortest form, so that equal choices are equal values."""
        short = {name: _shorten(part, shapes[name]) for name, part in parts.items()}
        return cls(MappingProxyType(short), MappingProxyType({name: tuple(shapes[name]) for name in short}))

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters of which anything is selected."""
        return tuple(self.parts)

    def numel(self) -> int:
        """How many numbers are selected."""
        return sum(self._numel(name) for name in self.parts)

    def _numel(self, name: str) -> int:
        part, shape = self.parts[name], self.shapes[name]
        if part is None:
            return prod(shape)
        axis, ranges = part
        return prod(shape) // shape[axis] * sum(stop - start for start, stop in ranges)

    def masks(self, device: torch.device | str | None = None) -> dict[str, torch.Tensor | None]:
        """A bool mask per parameter, or None for the whole of it.

        The masks have the parameter's shape but not its memory: they are expanded from one axis, and are read only.
        """
        return {name: self._mask(name, device) for name in self.parts}

    def _mask(self, name: str, device: torch.device | str | None) -> torch.Tensor | None:
        part, shape = self.parts[name], self.shapes[name]
        if part is None:
            return None
        axis, ranges = part
        line = torch.zeros(shape[axis], dtype=torch.bool, device=device)
        for start, stop in ranges:
            line[start:stop] = True
        return line.view(*(-1 if i == axis else 1 for i in range(len(shape)))).expand(shape)

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts)

    def __contains__(self, name: object) -> bool:
        return name in self.parts

    def __or__(self, other: Selection) -> Selection:
        """Everything that either selects; the names keep the left one's order."""
        if not isinstance(other, Selection):
            return NotImplemented
        shapes = {**self.shapes, **other.shapes}
        joined = dict(self.parts)
        for name, part in other.parts.items():
            joined[name] = join(name, joined[name], part) if name in joined else part
        return Selection.of(joined, shapes)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Selection):
            return NotImplemented
        return dict(self.parts) == dict(other.parts) and dict(self.shapes) == dict(other.shapes)

    def __hash__(self) -> int:
        return hash(frozenset(self.parts.items()))

    def __repr__(self) -> str:
        total = sum(prod(shape) for shape in self.shapes.values())
        return f"Selection({len(self)} parameters, {self.numel():,} of {total:,})"


def _shorten(part: Part, shape: tuple[int, ...]) -> Part:
    if part is None:
        return None
    axis, ranges = part[0], merge(part[1])
    return None if ranges == ((0, shape[axis]),) else (axis, ranges)


def join(name: str, one: Part, other: Part) -> Part:
    """Both of two parts of one parameter."""
    if one is None or other is None:
        return None
    if one[0] != other[0]:
        raise BadArgument(
            f"{name} is selected along axis {one[0]} and along axis {other[0]}; ranges cannot say both",
            expected="selections that cut a parameter along the same axis",
        )
    return one[0], (*one[1], *other[1])
