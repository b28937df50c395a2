"""Mappers from one tensor to several: UnstackTensors, ChunkTensors, Split, Deal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nnsplice.checkpoints.mapper.leaf import Leaf, set_field, unique_names
from nnsplice.errors import BadArgument, MapperError

#: Ranges `(start, stop)` of one dimension.
Ranges = tuple[tuple[int, int], ...]


class _FromOne(Leaf):
    """A mapper from one tensor to several."""

    source_name: str
    target_names: Sequence[str]

    def __post_init__(self) -> None:
        set_field(self, "target_names", unique_names("target_names", self.target_names))

    @property
    def names(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return (self.source_name,), tuple(self.target_names)

    def _one_for_each_name(self, found: Sequence[Tensor], tensor: Tensor, dim: int) -> Sequence[Tensor]:
        if len(found) != len(self.target_names):
            raise MapperError(
                f"dimension {dim} of {self.source_name} {list(tensor.shape)} gives {len(found)} tensors",
                path=repr(self),
                expected=f"{len(self.target_names)}, one for each name",
            )
        return [part.contiguous() for part in found]


@dataclass(frozen=True)
class UnstackTensors(_FromOne):
    """Split a dimension into one tensor for each index.

    >>> from nnsplice.checkpoints import UnstackTensors
    >>> UnstackTensors("experts", ["e.0", "e.1"], dim=0).apply({"experts": torch.tensor([[1, 2], [3, 4]])})
    {'e.0': tensor([1, 2]), 'e.1': tensor([3, 4])}

    Attributes:
        source_name: the old name.
        target_names: the new names.
        dim: the dimension.
    """

    source_name: str
    target_names: Sequence[str]
    dim: int

    def _compute(self, *tensors: Tensor) -> Sequence[Tensor]:
        return self._one_for_each_name(tensors[0].unbind(self.dim), tensors[0], self.dim)


@dataclass(frozen=True)
class ChunkTensors(_FromOne):
    """Split a dimension into equal chunks, as `torch.chunk`.

    >>> from nnsplice.checkpoints import ChunkTensors
    >>> ChunkTensors("gate_up", ["gate", "up"], dim=0).apply({"gate_up": torch.arange(4)})
    {'gate': tensor([0, 1]), 'up': tensor([2, 3])}
    >>> ChunkTensors("gate_up", ["gate", "up"], dim=0).apply({"gate_up": torch.arange(1)})
    Traceback (most recent call last):
    nnsplice.errors.MapperError: dimension 0 of gate_up [1] gives 1 tensors
        ChunkTensors(source_name='gate_up', target_names=('gate', 'up'), dim=0)
      expected: 2, one for each name

    Attributes:
        source_name: the old name.
        target_names: the new names.
        dim: the dimension.
    """

    source_name: str
    target_names: Sequence[str]
    dim: int

    def _compute(self, *tensors: Tensor) -> Sequence[Tensor]:
        return self._one_for_each_name(tensors[0].chunk(len(self.target_names), self.dim), tensors[0], self.dim)


@dataclass(frozen=True)
class Split(Leaf):
    """Split a dimension into chunks of given sizes, as fused queries, keys and values of grouped-query attention.

    >>> from nnsplice.checkpoints import Split
    >>> Split("qkv", ["q", "k", "v"], [4, 1, 1], dim=0).apply({"qkv": torch.arange(6)})
    {'q': tensor([0, 1, 2, 3]), 'k': tensor([4]), 'v': tensor([5])}

    Attributes:
        name: the old name.
        target_names: the new names.
        sizes: the size of each chunk.
        dim: the dimension.
    """

    name: str
    target_names: Sequence[str]
    sizes: Sequence[int]
    dim: int

    def __post_init__(self) -> None:
        set_field(self, "target_names", unique_names("target_names", self.target_names))
        set_field(self, "sizes", tuple(self.sizes))
        if len(self.sizes) != len(self.target_names):
            raise BadArgument(
                f"{len(self.sizes)} sizes for {len(self.target_names)} names", expected="a size for each name"
            )

    @property
    def names(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return (self.name,), tuple(self.target_names)

    def _compute(self, *tensors: Tensor) -> Sequence[Tensor]:
        return [part.contiguous() for part in torch.split(tensors[0], list(self.sizes), self.dim)]


@dataclass(frozen=True)
class Deal(Leaf):
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
        check_ranges(self, tensor.shape[self.dim], self.ranges)
        return [
            torch.cat([tensor.narrow(self.dim, start, stop - start) for start, stop in own], self.dim)
            for own in self.ranges
        ]


def check_ranges(leaf: Leaf, length: int, ranges: Sequence[Ranges]) -> None:
    """Raise unless ranges cover a dimension, each index once."""
    at = 0
    for start, stop in sorted(one for own in ranges for one in own):
        if start != at:
            raise MapperError(f"ranges meet or leave out {min(at, start)}:{max(at, start)}", path=repr(leaf))
        at = stop
    if at != length:
        raise MapperError(f"ranges end at {at}, and the dimension has length {length}", path=repr(leaf))
