"""The model's own answer to which numbers make a head: those that its slice in front of the output projection needs.

Nothing of the library is used here but the name of that projection, and masks where they are the contract.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from nnsplice.weights import create_param_masks

IDS = torch.tensor([[3, 10, 17, 24, 31]])


def slices(model: nn.Module, name: str, ids: torch.Tensor = IDS, **inputs: Any) -> torch.Tensor:
    """What the output projection reads in one run, `[token, columns]`, with its graph.

    A norm beside it that reaches over all heads would mix what the question keeps apart, so it lets its input through.
    """
    seen: list[torch.Tensor] = []
    handles = [model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))]
    for module in model.get_submodule(name.rpartition(".")[0]).children():
        if "Norm" in type(module).__name__:
            handles.append(module.register_forward_hook(lambda _, args, output: args[0]))
    try:
        model(ids, **inputs)
    finally:
        for handle in handles:
            handle.remove()
    return seen[0].reshape(-1, seen[0].shape[-1])


def support(value: torch.Tensor, parameters: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """Where each parameter has a gradient of a random functional of a value."""
    weights = torch.randn(value.shape, generator=torch.Generator().manual_seed(0), dtype=value.dtype)
    grads = torch.autograd.grad(
        (value * weights).sum(), list(parameters.values()), retain_graph=True, allow_unused=True
    )
    return {
        name: torch.zeros(p.shape, dtype=torch.bool) if grad is None else grad.ne(0)
        for (name, p), grad in zip(parameters.items(), grads, strict=True)
    }


def read_by(projection: Any, columns: slice, width: int) -> torch.Tensor:
    """Which numbers of a projection's weight meet some columns of its input."""
    inputs = torch.zeros(3, width).to(projection.weight)
    inputs[:, columns] = torch.randn(3, columns.stop - columns.start).to(inputs)
    (grad,) = torch.autograd.grad(projection(inputs).square().sum(), [projection.weight])
    return grad.ne(0)


def same(one: Mapping[str, torch.Tensor | None], other: Mapping[str, torch.Tensor | None]) -> bool:
    """Whether two answers are equal, in the order of their names too."""
    return list(one) == list(other) and all(
        (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))
        for a, b in zip(one.values(), other.values(), strict=True)
    )


def bits(model: nn.Module) -> dict[str, bytes]:
    """Every number of a model, to the bit."""
    return {
        name: tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        for name, tensor in model.state_dict().items()
    }


def own_masks(model: Any, layer: int, head: int, heads: int = 4) -> dict[str, torch.Tensor]:
    """The masks of a head without what any other head of its layer has too."""
    masks = {i: create_param_masks(model, f"layers[{layer}].heads[{i}]") for i in range(heads)}
    found = {name: mask.clone() for name, mask in masks[head].items() if mask is not None}
    for other in range(heads):
        for name in found:
            if other != head and (mask := masks[other].get(name)) is not None:
                found[name] &= ~mask
    return {name: mask for name, mask in found.items() if mask.any()}


def dense(masks: Mapping[str, torch.Tensor | None], parameters: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """Masks with every parameter present: all of it where there is None, nothing where it is absent."""
    found: dict[str, torch.Tensor] = {}
    for name, parameter in parameters.items():
        mask = masks.get(name, torch.zeros(parameter.shape, dtype=torch.bool))
        found[name] = torch.ones(parameter.shape, dtype=torch.bool) if mask is None else mask
    return found
