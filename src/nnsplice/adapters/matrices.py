"""The change of one matrix as a pair of low-rank factors, with the orientation and the name of its weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nnsplice.adapters.alignment import singular_values
from nnsplice.errors import BadArgument, FileError, ShapeError


@dataclass(eq=False)
class LoRAMatrices:
    """A low-rank change of one matrix, `lora_B @ lora_A` of shape `[out, in]`; scales are multiplied into `lora_B`.

    >>> pair = ns.adapters.LoRAMatrices(lora_A=torch.tensor([[0.0, 2.0]]), lora_B=torch.tensor([[3.0], [0.0]]))
    >>> pair.delta()
    tensor([[0., 6.],
            [0., 0.]])
    >>> float(pair.energy)
    36.0

    Attributes:
        lora_A: `[rank, in]`.
        lora_B: `[out, rank]`.
        singular_values: the singular values, largest first; computed from the factors if left out.
        transposed: whether the model stores the weight as `[in, out]`, as GPT-2's Conv1D and embeddings do.
        magnitude: DoRA's norm of each row of the changed weight; the change is then no product of the factors alone.
    """

    lora_A: Tensor  # noqa: N815 (the papers' name)
    lora_B: Tensor  # noqa: N815 (the papers' name)
    singular_values: Tensor = None  # pyright: ignore[reportAssignmentType]
    transposed: bool = False
    magnitude: Tensor | None = None

    def __post_init__(self) -> None:
        a, b = self.lora_A, self.lora_B
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            raise ShapeError(
                f"lora_A is {list(a.shape)} and lora_B is {list(b.shape)}",
                expected="lora_A [r, in] and lora_B [out, r]; an expert's factors are a pair of their own",
            )
        if self.singular_values is None:
            self.singular_values = singular_values(b, a)

    @property
    def rank(self) -> int:
        """The rank of the factors."""
        return self.lora_A.shape[0]

    @property
    def energy(self) -> Tensor:
        """The squared Frobenius norm of the change."""
        return torch.as_tensor(self.singular_values).double().square().sum()

    def delta(self, weight: Tensor | None = None) -> Tensor:
        """The change as a matrix, `[out, in]`.

        Args:
            weight: the base model's weight as it is stored, which DoRA needs.

        Returns:
            The matrix.

        Raises:
            BadArgument: DoRA without the weight.
        """
        product = self.lora_B @ self.lora_A
        if self.magnitude is None:
            return product
        if weight is None:
            raise BadArgument(
                "the change that DoRA makes depends on the weight that it changes", write="pair.delta(weight)"
            )
        base = (weight.mT if self.transposed else weight).to(product)
        changed = base + product
        return self.magnitude.to(product)[:, None] * changed / changed.norm(dim=1, keepdim=True) - base

    def __repr__(self) -> str:
        dora = ", DoRA" if self.magnitude is not None else ""
        return (
            f"LoRAMatrices({self.lora_B.shape[0]} x {self.lora_A.shape[1]}, rank {self.rank}, "
            f"energy {float(self.energy):.3g}{dora})"
        )


def is_transposed(root: nn.Module, name: str) -> bool:
    """Whether a parameter is stored as `[in, out]`: Conv1D, and embeddings, whose input is the token."""
    module, _, attribute = name.rpartition(".")
    owner = unwrapped_module(root, module)
    return attribute == "weight" and (type(owner).__name__ == "Conv1D" or isinstance(owner, nn.Embedding))


def unwrapped_module(root: nn.Module, name: str) -> nn.Module:
    """A module of a model, without the adapter's layers around it.

    Raises:
        FileError: the model has no such module.
    """
    try:
        owner = root.get_submodule(name)
    except AttributeError:
        raise FileError(
            f"the model has no {name}, which the adapter changes", expected="the model that the adapter belongs to"
        ) from None
    while isinstance(inner := getattr(owner, "base_layer", None), nn.Module):
        owner = inner
    return owner


def experts_transposed(owner: nn.Module) -> bool:
    """Whether fused experts are stored as `[expert, in, out]`."""
    return bool(getattr(owner, "is_transposed", False))


def expert_name(module: str, index: int, attribute: str) -> str:
    """The name of one expert of a fused tensor: `model.layers.0.mlp.experts.3.gate_up_proj`."""
    return f"{module}.{index}.{attribute}"
