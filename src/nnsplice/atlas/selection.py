"""A selection of parameters, kept as index ranges instead of masks: a few numbers per parameter, whatever its size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from types import MappingProxyType

import torch

from nnsplice.atlas.drawing import ParameterShare, draw
from nnsplice.atlas.layouts import merge
from nnsplice.errors import BadArgument

Ranges = tuple[tuple[int, int], ...]
#: None for the whole parameter, else the axis and the ranges along it.
ParameterSlice = tuple[int, Ranges] | None
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class Selection:
    """A choice of a model's parameters, or of slices of them.

    `a | b` is the union, `a & b` the intersection, `a - b` the difference, and `~a` the rest of the model. No masks are
    in memory until `masks` is called.

    >>> rows = Selection.of({"q.weight": (0, ((8, 16),))}, {"q.weight": (32, 64)})
    >>> len(rows), rows.numel()
    (1, 512)
    >>> int(rows.masks()["q.weight"].sum())
    512
    >>> (~rows).parts["q.weight"]
    (0, ((0, 8), (16, 32)))

    Attributes:
        parts: parameter -> None for all of it, or an axis and ranges along it.
        shapes: the shapes of these parameters.
        universe: the shapes of all parameters of the model.
    """

    parts: Mapping[str, ParameterSlice]
    #: The shapes of these parameters.
    shapes: Shapes
    #: The shapes of all parameters of the model, which `~` is taken in.
    universe: Shapes = field(repr=False)

    @classmethod
    def of(cls, parts: Mapping[str, ParameterSlice], shapes: Shapes) -> Selection:
        """A selection in its canonical form, so that equal choices are equal values.

        Args:
            parts: parameter -> None for all of it, or an axis and ranges along it.
            shapes: the shapes of all parameters of the model.

        Returns:
            The selection.
        """
        short = {name: _shorten(part, shapes[name]) for name, part in parts.items()}
        kept = {name: part for name, part in short.items() if part is None or part[1]}
        own = {name: tuple(shapes[name]) for name in kept}
        return cls(MappingProxyType(kept), MappingProxyType(own), shapes)

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters that are selected, in whole or in part."""
        return tuple(self.parts)

    def numel(self) -> int:
        """The number of selected numbers."""
        return sum(map(self._numel, self.parts))

    def _numel(self, name: str) -> int:
        part, shape = self.parts[name], self.shapes[name]
        if part is None:
            return prod(shape)
        axis, ranges = part
        return prod(shape) // shape[axis] * sum(stop - start for start, stop in ranges)

    def masks(self, device: torch.device | str | None = None) -> dict[str, torch.Tensor | None]:
        """A boolean mask for each parameter, or None for a whole one.

        The masks are expanded views of one axis, and read-only.

        >>> masks = ns.weights.select(model, "l1h2").masks()
        >>> {name: int(mask.sum()) for name, mask in masks.items()}
        {'transformer.h.1.attn.c_attn.weight': 192, 'transformer.h.1.attn.c_attn.bias': 12,
         'transformer.h.1.attn.c_proj.weight': 64}

        Args:
            device: the device of the masks.

        Returns:
            The masks by parameter.
        """
        return {name: self.mask(name, device) for name in self.parts}

    def mask(self, name: str, device: torch.device | str | None = None) -> torch.Tensor | None:
        """The boolean mask of one parameter, or None for a whole one.

        Args:
            name: the parameter.
            device: the device of the mask.

        Returns:
            The mask.
        """
        part, shape = self.parts[name], self.shapes[name]
        if part is None:
            return None
        axis, ranges = part
        line = torch.zeros(shape[axis], dtype=torch.bool, device=device)
        for start, stop in ranges:
            line[start:stop] = True
        return line.view(*(-1 if i == axis else 1 for i in range(len(shape)))).expand(shape)

    def tree(self, *, colour: bool = False) -> str:
        """The selection as a tree of modules, with a bar for each parameter.

        Args:
            colour: use the colours of a terminal.

        Returns:
            The text of the tree.
        """
        return draw(
            [ParameterShare(name, self._numel(name), prod(self.shapes[name])) for name in self.parts], colour=colour
        )

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
        joined = dict(self.parts)
        for name, part in other.parts.items():
            joined[name] = join(name, joined[name], part) if name in joined else part
        return Selection.of(joined, self._shared(other))

    def __and__(self, other: Selection) -> Selection:
        """What both select."""
        if not isinstance(other, Selection):
            return NotImplemented
        both = {name: _meet(name, part, other.parts[name]) for name, part in self.parts.items() if name in other}
        return Selection.of(both, self._shared(other))

    def __sub__(self, other: Selection) -> Selection:
        """What this selects and the other does not."""
        if not isinstance(other, Selection):
            return NotImplemented
        left = {
            name: _meet(name, part, rest_of(other.parts[name], self.shapes[name])) if name in other else part
            for name, part in self.parts.items()
        }
        return Selection.of(left, self._shared(other))

    def __invert__(self) -> Selection:
        """Everything else of the model."""
        rest = {n: rest_of(self.parts[n], shape) if n in self else None for n, shape in self.universe.items()}
        return Selection.of(rest, self.universe)

    def _shared(self, other: Selection) -> Shapes:
        """The shapes of the model that both are of."""
        if self.universe is other.universe:
            return self.universe
        for name, shape in other.universe.items():
            if tuple(self.universe.get(name, shape)) != tuple(shape):
                raise BadArgument(
                    f"{name} has shape {list(self.universe[name])} in one selection and {list(shape)} in the other",
                    expected="selections of one model",
                )
        strange = next((name for name in other.universe if name not in self.universe), None)
        if strange is not None and not self.universe.keys() <= other.universe.keys():
            raise BadArgument(
                f"{strange} is a parameter of one selection's model and not of the other's",
                expected="selections of one model",
            )
        return {**self.universe, **other.universe}

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Selection):
            return NotImplemented
        return dict(self.parts) == dict(other.parts) and dict(self.shapes) == dict(other.shapes)

    def __hash__(self) -> int:
        return hash(frozenset(self.parts.items()))

    def __repr__(self) -> str:
        total = sum(map(prod, self.shapes.values()))
        return f"Selection({len(self)} parameters, {self.numel():,} of {total:,})"


def _shorten(part: ParameterSlice, shape: tuple[int, ...]) -> ParameterSlice:
    if part is None:
        return None
    axis, ranges = part[0], merge(part[1])
    return None if ranges == ((0, shape[axis]),) else (axis, ranges)


def join(name: str, one: ParameterSlice, other: ParameterSlice) -> ParameterSlice:
    """Both of two parts of one parameter."""
    if one is None or other is None:
        return None
    _check_axes(name, one, other)
    return one[0], (*one[1], *other[1])


#: Nothing of a parameter, along whatever axis.
_NOTHING: ParameterSlice = (0, ())


def _meet(name: str, one: ParameterSlice, other: ParameterSlice) -> ParameterSlice:
    """What two parts of one parameter have in common."""
    if one is None or other is None:
        return other if one is None else one
    if not one[1] or not other[1]:
        return _NOTHING
    _check_axes(name, one, other)
    pairs = ((max(a, c), min(b, d)) for a, b in one[1] for c, d in other[1])
    return one[0], tuple((start, stop) for start, stop in pairs if start < stop)


def rest_of(part: ParameterSlice, shape: tuple[int, ...]) -> ParameterSlice:
    """What a part leaves of its parameter."""
    if part is None:
        return _NOTHING
    axis, ranges = part
    edges = [0, *(edge for bounds in ranges for edge in bounds), shape[axis]]
    return axis, tuple((a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b)


def _check_axes(name: str, one: tuple[int, Ranges], other: tuple[int, Ranges]) -> None:
    if one[0] != other[0]:
        raise BadArgument(
            f"{name} is selected along axis {one[0]} and along axis {other[0]}; ranges cannot say both",
            expected="selections that cut a parameter along the same axis",
        )
