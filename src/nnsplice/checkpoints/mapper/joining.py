"""Mappers from several tensors to one: StackTensors, ConcatenateTensors, Collect."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import InitVar, dataclass

import torch
from torch import Tensor

from nnsplice.checkpoints.mapper.leaf import Leaf, set_field, unique_names
from nnsplice.checkpoints.mapper.splitting import Ranges, check_ranges
from nnsplice.errors import BadArgument, MapperError


class _ToOne(Leaf):
    """A mapper from several tensors to one."""

    source_names: Sequence[str]
    target_name: str

    @property
    def names(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return tuple(self.source_names), (self.target_name,)

    def _same_type(self, tensors: Sequence[Tensor]) -> None:
        kinds = list(dict.fromkeys(str(tensor.dtype) for tensor in tensors))
        if len(kinds) > 1:  # torch would promote them silently
            raise MapperError(
                f"tensors of {' and '.join(kinds)} are put together",
                path=repr(self),
                write="Cast(name, dtype) before it",
            )


@dataclass(frozen=True)
class StackTensors(_ToOne):
    """Stack tensors of equal shapes along a new dimension.

    >>> from nnsplice.checkpoints import StackTensors
    >>> StackTensors(["e.0", "e.1"], "experts", dim=0).apply({"e.0": torch.tensor([1, 2]), "e.1": torch.tensor([3, 4])})
    {'experts': tensor([[1, 2],
            [3, 4]])}

    Attributes:
        source_names: the old names.
        target_name: the new name.
        dim: the new dimension.
        stack_dim: another name of `dim`.
    """

    source_names: Sequence[str]
    target_name: str
    dim: int | None = None
    stack_dim: InitVar[int | None] = None

    def __post_init__(self, stack_dim: int | None) -> None:
        set_field(self, "source_names", unique_names("source_names", self.source_names))
        if (self.dim is None) == (stack_dim is None):
            raise BadArgument("dim and stack_dim are two names of one argument", expected="one of them")
        set_field(self, "dim", stack_dim if self.dim is None else self.dim)

    def _compute(self, *tensors: Tensor) -> Sequence[Tensor]:
        self._same_type(tensors)
        return [torch.stack(tensors, self.dim or 0)]


@dataclass(frozen=True)
class ConcatenateTensors(_ToOne):
    """Concatenate tensors along a dimension.

    >>> from nnsplice.checkpoints import ConcatenateTensors
    >>> ConcatenateTensors(["q", "k"], "qk", dim=0).apply({"q": torch.tensor([1, 2]), "k": torch.tensor([3])})
    {'qk': tensor([1, 2, 3])}

    Attributes:
        source_names: the old names.
        target_name: the new name.
        dim: the dimension.
    """

    source_names: Sequence[str]
    target_name: str
    dim: int

    def __post_init__(self) -> None:
        set_field(self, "source_names", unique_names("source_names", self.source_names))

    def _compute(self, *tensors: Tensor) -> Sequence[Tensor]:
        self._same_type(tensors)
        return [torch.cat(tensors, self.dim)]


@dataclass(frozen=True)
class Collect(Leaf):
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
        check_ranges(self, sum(tensor.shape[self.dim] for tensor in tensors), self.ranges)
        pieces: list[tuple[int, Tensor]] = []
        for tensor, own in zip(tensors, self.ranges, strict=True):
            parts = torch.split(tensor, [stop - start for start, stop in own], self.dim)
            pieces += [(start, part) for (start, _), part in zip(own, parts, strict=True)]
        return [torch.cat([part for _, part in sorted(pieces, key=lambda piece: piece[0])], self.dim)]
