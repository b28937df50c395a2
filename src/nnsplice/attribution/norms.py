"""Properties of a norm, measured on the module: whether it centres, its bias, and that the rest is a scale.

Names do not tell: some families' `LayerNorm` subtracts the mean and some does not, and some multiply with 1 + weight.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nnsplice import engine
from nnsplice.atlas import unwrap
from nnsplice.errors import RefusedPlace

#: The prompt whose run shows the input shape of each norm.
_TOKENS = 2
#: How far two inputs may be from one scale for each column, in dtypes with many digits and in others.
_ROUNDING, _ROUGH = 1e-2, 0.1
#: Root -> by a norm's name, the shape that it is given.
_shapes: weakref.WeakKeyDictionary[nn.Module, dict[str, torch.Size]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class MeasuredNorm:
    """A norm is `line(x)` times a scale for each token, times a number for each column, and a bias."""

    #: Whether it subtracts the mean.
    centred: bool
    #: Its output for zeros; an axis along which that is constant has length 1.
    bias: Tensor

    def line(self, states: Tensor) -> Tensor:
        """The input that is scaled."""
        return states - states.mean(-1, keepdim=True) if self.centred else states


def norms_of(model: engine.Model, names: list[str]) -> Mapping[str, MeasuredNorm]:
    """The norms by name; those that do not run are left out.

    Raises:
        RefusedPlace: one of them is something else.
    """
    shapes = _shapes_of(model, names)
    with engine.undisturbed(model):
        return {name: norm_of(engine.callable_of(model, name), shapes[name], model, name) for name in shapes}


def _shapes_of(model: engine.Model, names: list[str]) -> dict[str, torch.Size]:
    root = unwrap(model)
    known = _shapes.get(root)
    if known is not None and all(name in known for name in names):
        return known
    found: dict[str, torch.Size] = {}

    def keeping(name: str) -> Callable[..., None]:
        def keep(_: nn.Module, args: Any, kwargs: Any) -> None:
            states = args[0] if args else next(iter(kwargs.values()))
            found[name] = states.shape

        return keep

    hooks = [root.get_submodule(n).register_forward_pre_hook(keeping(n), with_kwargs=True) for n in names]
    try:
        runner, args, kwargs = engine.example_of(model, _TOKENS)
        with engine.undisturbed(runner) as call:
            call(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return _shapes.setdefault(root, found)


def norm_of(call: Callable[[Tensor], Tensor], shape: torch.Size, model: engine.Model, name: str) -> MeasuredNorm:
    """Measure one norm.

    Raises:
        RefusedPlace: its output is no scaled line.
    """
    own = next((p for p in unwrap(model).get_submodule(name).parameters()), None)
    dtype = next(p.dtype for p in unwrap(model).parameters() if p.is_floating_point()) if own is None else own.dtype
    where = torch.device(model.device or "cpu") if own is None else own.device
    draws = torch.Generator().manual_seed(0)
    one, other = (torch.randn(shape, generator=draws, dtype=torch.float64) for _ in range(2))
    # No column of the first is near the mean, so that each column's factor can be told from it.
    one = one.sign() + 0.25 * one.tanh()

    def made(states: Tensor) -> Tensor:
        return call(states.to(where, dtype)).detach().to("cpu", torch.float64)

    bias, of_one, shifted, of_other = (made(x) for x in (torch.zeros_like(one), one, one + 4, other))
    norm = MeasuredNorm(
        bool((shifted - of_one).abs().max() < 0.25 * (of_one - bias).abs().max()), _thin(bias).to(where, dtype)
    )
    factors = (of_one - bias) / norm.line(one)
    predicted = norm.line(other) * factors
    size = (predicted * predicted).sum(-1, keepdim=True).clamp_min(1e-300)
    scale = ((of_other - bias) * predicted).sum(-1, keepdim=True) / size
    off = float((of_other - bias - scale * predicted).abs().max())
    limit = _ROUGH if dtype in (torch.float16, torch.bfloat16) else _ROUNDING
    if not off <= limit * float((of_other - bias).abs().max().clamp_min(1e-300)):
        raise RefusedPlace(
            f"relp takes the scale of a norm for a constant, and what model.{name} makes is no scaled line of what it "
            "is given",
            expected="norms with one scale for each token and one factor for each column",
            write='method="eap-ig"',
        )
    return norm


def _thin(bias: Tensor) -> Tensor:
    """The same with one number for each axis, but for the columns, along which it does not change."""
    for axis in range(bias.dim() - 1):
        first = bias.narrow(axis, 0, 1)
        bias = first if bool((bias == first).all()) else bias
    return bias
