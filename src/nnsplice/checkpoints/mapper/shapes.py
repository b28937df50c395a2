"""Mappers that change the shape of one tensor: Transpose, Permute, Reshape, Squeeze, Unsqueeze, Slice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nnsplice.checkpoints.mapper.leaf import InPlace, set_field
from nnsplice.errors import BadArgument, MapperError


@dataclass(frozen=True)
class Transpose(InPlace):
    """Exchange two dimensions; `Transpose(name, (0, 1))` converts between `Linear` and GPT-2's `Conv1D`.

    >>> from nnsplice.checkpoints import Transpose
    >>> Transpose("c_fc.weight", (0, 1)).apply({"c_fc.weight": torch.tensor([[1, 2], [3, 4], [5, 6]])})
    {'c_fc.weight': tensor([[1, 3, 5],
            [2, 4, 6]])}

    Attributes:
        name: the name.
        dims: the two dimensions.
    """

    name: str
    dims: tuple[int, int]

    def __post_init__(self) -> None:
        if len(self.dims) != 2:
            raise BadArgument(f"dims is {self.dims}", expected="two dimensions", write="Permute(name, dims)")
        set_field(self, "dims", tuple(self.dims))

    def _compute(self, *tensors: Tensor) -> Sequence[Tensor]:
        return [tensors[0].transpose(*self.dims).contiguous()]


@dataclass(frozen=True)
class Permute(InPlace):
    """Permute dimensions; with `view`, those of a reshaped tensor, which then has its own shape again.

    Rotary layouts differ this way: the rows of a head are (half, pair) in one and (pair, half) in the other.

    >>> from nnsplice.checkpoints import Permute
    >>> interleaved = Permute("wq", dims=(0, 2, 1, 3), view=(1, 2, 2, -1))   # one head of width 4
    >>> interleaved.apply({"wq": torch.arange(4.0).reshape(4, 1)})["wq"].flatten()
    tensor([0., 2., 1., 3.])

    Attributes:
        name: the name.
        dims: the new order of the dimensions.
        view: the shape in which dimensions are permuted.
    """

    name: str
    dims: tuple[int, ...]
    view: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        set_field(self, "dims", tuple(self.dims))
        set_field(self, "view", None if self.view is None else tuple(self.view))

    def _compute(self, *tensors: Tensor) -> Sequence[Tensor]:
        (tensor,) = tensors
        if self.view is None:
            return [tensor.permute(self.dims).contiguous()]
        return [tensor.reshape(self.view).permute(self.dims).reshape(tensor.shape)]


@dataclass(frozen=True)
class Reshape(InPlace):
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
class Squeeze(InPlace):
    """Remove the dimensions of length 1, or one of them.

    >>> from nnsplice.checkpoints import Squeeze
    >>> [list(Squeeze("w", dim).apply({"w": torch.zeros(1, 3, 1)})["w"].shape) for dim in (None, 0)]
    [[3], [3, 1]]

    Attributes:
        name: the name.
        dim: the dimension; all of length 1 if left out.
    """

    name: str
    dim: int | None = None

    def _compute(self, *tensors: Tensor) -> Sequence[Tensor]:
        (tensor,) = tensors
        if self.dim is None:
            return [tensor.squeeze().contiguous()]
        if tensor.shape[self.dim] != 1:  # torch would return it unchanged
            raise MapperError(f"dimension {self.dim} of {list(tensor.shape)} is not of length 1", path=repr(self))
        return [tensor.squeeze(self.dim).contiguous()]


@dataclass(frozen=True)
class Unsqueeze(InPlace):
    """Add a dimension of length 1.

    >>> from nnsplice.checkpoints import Unsqueeze
    >>> Unsqueeze("w", 0).apply({"w": torch.tensor([1, 2])})
    {'w': tensor([[1, 2]])}

    Attributes:
        name: the name.
        dim: the position of the new dimension.
    """

    name: str
    dim: int

    def _compute(self, *tensors: Tensor) -> Sequence[Tensor]:
        return [tensors[0].unsqueeze(self.dim).contiguous()]


@dataclass(frozen=True)
class Slice(InPlace):
    """A range of one dimension; only its bytes are read if it is the first dimension.

    >>> from nnsplice.checkpoints import Slice
    >>> Slice("embed", dim=0, stop=2).apply({"embed": torch.tensor([[1, 1], [2, 2], [3, 3]])})
    {'embed': tensor([[1, 1],
            [2, 2]])}

    Attributes:
        name: the name.
        dim: the dimension.
        start: the first index.
        stop: the index after the last.
    """

    name: str
    dim: int
    start: int | None = None
    stop: int | None = None

    def _compute(self, *tensors: Tensor) -> Sequence[Tensor]:
        (tensor,) = tensors
        length = tensor.shape[self.dim]
        start, stop, _ = slice(self.start, self.stop).indices(length)
        asked = (self.start or 0, length if self.stop is None else self.stop)
        if not all(-length <= end <= length for end in asked) or start >= stop:
            raise MapperError(f"{asked[0]}:{asked[1]} is no range of a dimension of length {length}", path=repr(self))
        # A copy: a view would keep the memory of the whole tensor.
        return [tensor.narrow(self.dim, start, stop - start).clone(memory_format=torch.contiguous_format)]
