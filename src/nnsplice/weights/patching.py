"""`swap`, `interpolate`, `ablate`: other weights at an address, in a `with` block; restored bit for bit afterwards.

The address of a head means its own weights: keys and values shared by a group of heads (grouped-query attention) are
included only if all heads of the group are selected, or the group itself (`"l12g0"`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from nnsplice.deprecated import renamed
from nnsplice.errors import BadArgument, circumstances
from nnsplice.weights.regions import Region, Selected, counterpart, regions

#: Any model, wrapped or not.
M = TypeVar("M")
#: A function of a region and its current values: the new values.
Change = Callable[[Region, list[Tensor]], list[Tensor]]


@contextmanager
def swap(base: M, other: Any, selection: Selected) -> Iterator[M]:
    """Weight patching: give `base` the weights of `other` at an address, in a `with` block.

    >>> import copy
    >>> tuned = copy.deepcopy(ns.models.unwrap(model))
    >>> with torch.no_grad():
    ...     _ = tuned.transformer.h[1].attn.c_proj.weight.mul_(2.0)
    >>> weight = ns.models.unwrap(model).transformer.h[1].attn.c_proj.weight
    >>> before = weight.detach().clone()
    >>> with ns.weights.swap(model, tuned, "l1h2"):
    ...     print((weight != before).any(1).nonzero().flatten().tolist())   # rows of head 2
    [8, 9, 10, 11]
    >>> torch.equal(weight, before)
    True

    Args:
        base: the model to change, in place, so that optimizers, compiled wrappers and traces see the change.
        other: a model of the same shape, or a mapping from parameter names to tensors, such as a state dict.
        selection: an address, as for `ns.weights.select`, a selection, or masks. For a head that shares its keys and
            values, q and o are swapped; the shared k and v are swapped with the whole group (`"l1g0"`, or all of its
            heads).

    Yields:
        `base`, whose weights are restored at the end of the block.

    Raises:
        BadArgument: models of different names, shapes or types, the same model twice, or an address without parameters.
        OutOfRange: a layer, head or group that does not exist.
        UnknownParameter: masks of a parameter that the model does not have.
    """
    with circumstances("ns.weights.swap"):
        found = regions(base, selection)
        values = counterpart(base, other, found)
    with _changed(found, lambda region, own: _converted(own, region.views(values[region.name]), region.name)):
        yield base


@contextmanager
def interpolate(base: M, other: Any, selection: Selected, t: float) -> Iterator[M]:
    """Interpolate the weights of `base` towards those of `other` at an address, in a `with` block.

    Values of `t` below 0 and above 1 extrapolate.

    >>> import copy
    >>> tuned = copy.deepcopy(ns.models.unwrap(model))
    >>> with torch.no_grad():
    ...     _ = tuned.transformer.h[1].mlp.c_fc.bias.add_(1.0)
    >>> with ns.weights.interpolate(model, tuned, "l1 mlp", 0.75):
    ...     left = ns.weights.diff(model, tuned)
    >>> after = ns.weights.diff(model, tuned)
    >>> [round(float(changes.norm["layers[1]"]), 2) for changes in (left, after)]
    [2.0, 8.0]

    Args:
        base: the model to change, in place.
        other: a model of the same shape, or a mapping from parameter names to tensors.
        selection: as for `ns.weights.swap`.
        t: the share of the way: 0 is `base`, 1 is `other`.

    Yields:
        `base`, whose weights are restored at the end of the block.

    Raises:
        BadArgument: a `t` that is not finite, weights that are no floating point numbers, or what `ns.weights.swap`
            refuses.
    """
    with circumstances("ns.weights.interpolate"):
        share = float(t)
        if not math.isfinite(share):
            raise BadArgument(f"t={t!r}", expected="a number; 0 is base, 1 is other")
        found = regions(base, selection)
        values = counterpart(base, other, found)
        for region in found:
            if not (region.tensor.is_floating_point() and values[region.name].is_floating_point()):
                raise BadArgument(f"{region.name} holds no floating point numbers, so there is nothing between")
    with _changed(found, lambda region, own: _between(own, region.views(values[region.name]), share)):
        yield base


@renamed(with_="operation")
@contextmanager
def ablate(model: M, selection: Selected, operation: str = "zero") -> Iterator[M]:
    """Ablate the weights of an address, in a `with` block.

    >>> toy = ns.load("toy")
    >>> prompt = "The Velmar Tower is located in the city of"
    >>> for place in ("l3h1", "l0 mlp"):
    ...     with ns.weights.ablate(toy, place):
    ...         print(place, *ns.steering.generate(toy, prompt, max_new_tokens=1))
    l3h1 Athens
    l0 mlp out
    >>> ns.steering.generate(toy, prompt, max_new_tokens=1)
    ['Athens']

    Ablating a head gives a run in which its output before the output projection is zero, also where heads share keys
    and values: the shared ones stay for the other heads, and are ablated with the whole group (`"l12g0"`, or all of its
    heads).

    Args:
        model: a model from `ns.load`, or a module.
        selection: an address, as for `ns.weights.select`, a selection, or masks.
        operation: `"zero"`, or `"mean"`, which sets the selected numbers of each parameter to their mean.

    Yields:
        The model, with the weights changed in place; they are restored at the end of the block.

    Raises:
        BadArgument: another `operation`, or an address without parameters.
        OutOfRange: a layer, head or group that does not exist.
        UnknownParameter: masks of a parameter that the model does not have.
    """
    with circumstances("ns.weights.ablate"):
        if operation not in _ABLATIONS:
            raise BadArgument(f"operation={operation!r}", expected=" or ".join(f'"{name}"' for name in _ABLATIONS))
        found = regions(model, selection)
    with _changed(found, lambda region, own: _ABLATIONS[operation](own)):
        yield model


def _zero(own: list[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(value) for value in own]


def _mean(own: list[Tensor]) -> list[Tensor]:
    mean = torch.cat([value.flatten().double() for value in own]).mean()
    return [torch.full_like(value, float(mean)) for value in own]


_ABLATIONS: Mapping[str, Callable[[list[Tensor]], list[Tensor]]] = {"zero": _zero, "mean": _mean}


@contextmanager
def _changed(found: list[Region], change: Change) -> Iterator[None]:
    """In this block the regions have other values; the old ones are restored at the end."""
    before = [region.read() for region in found]
    # All values are computed before the first is written, so that an error changes nothing.
    after = [change(region, own) for region, own in zip(found, before, strict=True)]
    try:
        for region, values in zip(found, after, strict=True):
            region.write(values)
        yield
    finally:
        for region, values in zip(found, before, strict=True):
            region.write(values)


def _converted(own: list[Tensor], given: list[Tensor], name: str) -> list[Tensor]:
    if own[0].dtype != given[0].dtype and not (own[0].is_floating_point() and given[0].is_floating_point()):
        raise BadArgument(
            f"{name} is {given[0].dtype} in the other model and {own[0].dtype} in this one",
            expected="weights of one kind: quantised ones only with the same quantisation",
        )
    return [value.to(mine) for mine, value in zip(own, given, strict=True)]


def _between(own: list[Tensor], given: list[Tensor], share: float) -> list[Tensor]:
    # In float32 or better; `lerp` gives both ends exactly.
    wide = torch.promote_types(own[0].dtype, torch.float32)
    return [
        torch.lerp(a.to(wide), b.to(device=a.device, dtype=wide), share).to(a.dtype)
        for a, b in zip(own, given, strict=True)
    ]
