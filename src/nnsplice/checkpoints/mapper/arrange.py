"""Mappers that conversions between families need: other shapes, dealt ranges, numbers changed by a formula.

one to one      Reshape, Scale, Shift
one to many     Deal
many to one     Collect
from nothing    Zeros
to nothing      Drop
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nnsplice.checkpoints.mapper.one_group import InPlace, Leaf
from nnsplice.errors import MapperError

Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class ModelStateMapperReshape(InPlace):
    """Reshape a tensor.

    >>> from nnsplice.checkpoints import Reshape
    >>> Reshape("W_Q", (2, 2)).apply({"W_Q": torch.arange(4)})
    {'W_Q': tensor([[0, 1],
            [2, 3]])}

    Attributes:
        name: the name.
        shape: the new shape.
    """

    name: str
    shape: tuple[int, ...]

    def _compute(self, *tensors: Tensor) -> Sequence[Tensor]:
        return [tensors[0].reshape(self.shape)]


@dataclass(frozen=True)
class ModelStateMapperScale(InPlace):
    """Multiply a tensor by a factor.

    >>> from nnsplice.checkpoints import Scale
    >>> Scale("norm", 0.5).apply({"norm": torch.tensor([1.0, 3.0])})
    {'norm': tensor([0.5000, 1.5000])}

    Attributes:
        name: the name.
        factor: the factor.
    """

    name: str
    factor: float

    def _compute(self, *tensors: Tensor) -> Sequence[Tensor]:
        return [tensors[0] * self.factor]


@dataclass(frozen=True)
class ModelStateMapperShift(InPlace):
    """Add a term to a tensor.

    >>> from nnsplice.checkpoints import Shift
    >>> Shift("norm", 1.0).apply({"norm": torch.tensor([-0.5, 0.5])})   # Gemma keeps its norms less one
    {'norm': tensor([0.5000, 1.5000])}

    Attributes:
        name: the name.
        term: the term.
    """

    name: str
    term: float

    def _compute(self, *tensors: Tensor) -> Sequence[Tensor]:
        return [tensors[0] + self.term]


@dataclass(frozen=True)
class ModelStateMapperDeal(Leaf):
    """Split a dimension by ranges, as heads of a fused projection: each target is the concatenation of its ranges.

    >>> from nnsplice.checkpoints import Deal
    >>> Deal("qkv", ("q", "k"), (((0, 1), (2, 3)), ((1, 2),)), 0).apply({"qkv": torch.arange(3)})
    {'q': tensor([0, 2]), 'k': tensor([1])}

    Attributes:
        source_name: the old name.
        target_names: the new names.
        ranges: the ranges of each target.
        dim: the dimension.
    """

    source_name: str
    target_names: tuple[str, ...]
    ranges: tuple[Ranges, ...]
    dim: int

    @property
    def names(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return (self.source_name,), self.target_names

    def _compute(self, *tensors: Tensor) -> Sequence[Tensor]:
        (tensor,) = tensors
        _covers(self, tensor.shape[self.dim], self.ranges)
        return [
            torch.cat([tensor.narrow(self.dim, start, stop - start) for start, stop in own], self.dim)
            for own in self.ranges
        ]


@dataclass(frozen=True)
class ModelStateMapperCollect(Leaf):
    """The inverse of `Deal`: each source fills its ranges of the target.

    >>> from nnsplice.checkpoints import Collect
    >>> ranges = ((0, 1), (2, 3)), ((1, 2),)
    >>> Collect(("q", "k"), "qkv", ranges, 0).apply({"q": torch.tensor([0, 2]), "k": torch.tensor([1])})
    {'qkv': tensor([0, 1, 2])}

    Attributes:
        source_names: the old names.
        target_name: the new name.
        ranges: the ranges of each source.
        dim: the dimension.
    """

    source_names: tuple[str, ...]
    target_name: str
    ranges: tuple[Ranges, ...]
    dim: int

    @property
    def names(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return self.source_names, (self.target_name,)

    def _compute(self, *tensors: Tensor) -> Sequence[Tensor]:
        _covers(self, sum(tensor.shape[self.dim] for tensor in tensors), self.ranges)
        pieces: list[tuple[int, Tensor]] = []
        for tensor, own in zip(tensors, self.ranges, strict=True):
            parts = torch.split(tensor, [stop - start for start, stop in own], self.dim)
            pieces += [(start, part) for (start, _), part in zip(own, parts, strict=True)]
        return [torch.cat([part for _, part in sorted(pieces, key=lambda piece: piece[0])], self.dim)]


def _covers(leaf: Leaf, length: int, ranges: Sequence[Ranges]) -> None:
    """Raise where ranges are not all of a dimension, once."""
    at = 0
    for start, stop in sorted(one for own in ranges for one in own):
        if start != at:
            raise MapperError(f"ranges meet or leave out {min(at, start)}:{max(at, start)}", path=repr(leaf))
        at = stop
    if at != length:
        raise MapperError(f"ranges end at {at}, and the dimension has length {length}", path=repr(leaf))


@dataclass(frozen=True)
class ModelStateMapperZeros(Leaf):
    """A tensor of zeros without inputs, where only the target has a bias.

    >>> from nnsplice.checkpoints import Parallel, Rename, Zeros
    >>> Zeros("attn.b_Q", (2,), torch.float32).apply({})
    {'attn.b_Q': tensor([0., 0.])}
    >>> Parallel([Rename("q_proj.weight", "attn.W_Q"), Zeros("attn.b_Q", (2,), torch.float32)]).explain()
    2 groups, 1 inputs, 2 outputs
    (nothing)      ->  attn.b_Q
    q_proj.weight  ->  attn.W_Q

    Attributes:
        name: the name.
        shape: the shape.
        dtype: the type.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def names(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return (), (self.name,)

    def _compute(self, *tensors: Tensor) -> Sequence[Tensor]:
        return [torch.zeros(self.shape, dtype=self.dtype)]


@dataclass(frozen=True)
class ModelStateMapperDrop(Leaf):
    """Remove a tensor.

    >>> from nnsplice.checkpoints import Drop, Sequential, Split
    >>> Sequential([Split("kv", ["k", "v"], [1, 1], 0), Drop("v")]).apply({"kv": torch.tensor([1, 2])})
    {'k': tensor([1])}

    Attributes:
        name: the name.
    """

    name: str

    @property
    def names(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return (self.name,), ()

    def _compute(self, *tensors: Tensor) -> Sequence[Tensor]:
        return []
