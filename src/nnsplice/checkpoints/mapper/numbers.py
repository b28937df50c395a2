"""Mappers that change the numbers of one tensor: Cast, Scale, Shift; and Zeros, which needs none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nnsplice.checkpoints.mapper.leaf import InPlace, Leaf, set_field
from nnsplice.errors import BadType


@dataclass(frozen=True)
class Cast(InPlace):
    """Convert a tensor to another type.

    >>> from nnsplice.checkpoints import Cast
    >>> Cast("w", torch.bfloat16).apply({"w": torch.tensor([1.0, 1.001])})
    {'w': tensor([1., 1.], dtype=torch.bfloat16)}

    Attributes:
        name: the name.
        dtype: the new type.
    """

    name: str
    dtype: torch.dtype

    def __post_init__(self) -> None:
        set_field(self, "dtype", _type(self.dtype))

    def _compute(self, *tensors: Tensor) -> Sequence[Tensor]:
        return [tensors[0].to(self.dtype)]


def _type(dtype: object) -> torch.dtype:
    if not isinstance(dtype, torch.dtype):
        raise BadType(f"dtype={dtype!r}", expected="a type of torch", write="Cast(name, torch.bfloat16)")
    return dtype


@dataclass(frozen=True)
class Scale(InPlace):
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
class Shift(InPlace):
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
class Zeros(Leaf):
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
