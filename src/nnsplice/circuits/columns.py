"""Some columns of a projection's input or output, without computing the others where that is exact."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def project(module: Any, forward: Callable[..., Tensor], states: Tensor, columns: Sequence[tuple[int, int]]) -> Tensor:
    """These columns of the module's output, side by side.

    Args:
        forward: the module's original `forward`, which is replaced meanwhile.
    """
    at = [n for start, stop in columns for n in range(start, stop)]
    own = getattr(forward, "__func__", None) is type(module).forward
    weight = _weight(module) if own else None
    if weight is None:
        return forward(states)[..., at]
    chosen = weight[at]
    bias = getattr(module, "bias", None)
    return nn.functional.linear(states, chosen, None if bias is None else bias[at])


def through(module: Any, part: Tensor, columns: tuple[int, int], width: int) -> Tensor:
    """The module's output for a change of some columns of its input, without its bias."""
    weight = None if "forward" in module.__dict__ else _weight(module)
    if weight is not None:
        return nn.functional.linear(part, weight[:, columns[0] : columns[1]])
    whole = part.new_zeros(*part.shape[:-1], width)
    whole[..., columns[0] : columns[1]] = part
    return module.forward(whole) - module.forward(torch.zeros_like(whole))  # past hooks: one of ours called this


def _weight(module: Any) -> Tensor | None:
    """`[out, in]` of a module that is nothing but a product with its weight, and a bias; else None."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.is_meta or not weight.is_floating_point():
        return None
    if type(module) is nn.Linear:
        return weight
    if type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils":
        return weight.T
    return None
