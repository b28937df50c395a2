"""What torch hooks alone say a capture or a patched run should be: no nnsight, no nnsplice code that runs a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nnsplice.atlas import Site

Inputs = Mapping[str, Tensor]
Edit = Callable[[Tensor], Tensor]


def _first(value: Any, item: int | None) -> Tensor:
    return value[item or 0] if isinstance(value, tuple | list) else value


def _again(value: Any, item: int | None, tensor: Tensor) -> Any:
    if not isinstance(value, tuple | list):
        return tensor
    parts = list(value)
    parts[item or 0] = tensor
    return type(value)(parts)


def _edited(tensor: Tensor, site: Site, rows: int, edit: Edit) -> Tensor:
    """The tensor with `edit` done to `[row, token, columns]` of it, in a copy."""
    whole = tensor.reshape(rows, -1, tensor.shape[-1]).clone()
    start, stop = site.columns or (0, whole.shape[-1])
    whole[..., start:stop] = edit(whole[..., start:stop].clone())
    return whole.reshape(tensor.shape)


def hooked(module: nn.Module, site: Site, rows: int, edit: Edit) -> Any:
    """Let `edit` see and change the site's value on every pass."""
    target = module.get_submodule(site.module)
    calls = iter(range(10**6))

    if site.end == "input":

        def before(_: nn.Module, args: tuple, kwargs: dict) -> Any:
            if next(calls) != site.occurrence:
                return None
            if site.kind == "stream":
                # The skip path holds the same tensor, and the stream is what both carry.
                live = args[0] if args else next(iter(kwargs.values()))
                live.copy_(_edited(live, site, rows, edit))
                return None
            if args:
                return (_edited(args[0], site, rows, edit), *args[1:]), kwargs
            name = next(iter(kwargs))
            return args, {**kwargs, name: _edited(kwargs[name], site, rows, edit)}

        return target.register_forward_pre_hook(before, with_kwargs=True)

    def after(_: nn.Module, args: tuple, output: Any) -> Any:
        if next(calls) != site.occurrence:
            return None
        return _again(output, site.item, _edited(_first(output, site.item), site, rows, edit))

    return target.register_forward_hook(after)


def run(module: nn.Module, inputs: Inputs, edits: Mapping[Site, Edit]) -> Tensor:
    """The logits of one pass with these edits."""
    rows = next(iter(inputs.values())).shape[0]
    hooks = [hooked(module, site, rows, edit) for site, edit in edits.items()]
    try:
        with torch.no_grad():
            return module(**inputs).logits
    finally:
        for hook in hooks:
            hook.remove()


def values(module: nn.Module, inputs: Inputs, sites: list[Site]) -> dict[Site, Tensor]:
    """What stands at each site in one pass: `[row, token, width]`."""
    seen: dict[Site, Tensor] = {}

    def keeper(site: Site) -> Edit:
        def keep(value: Tensor) -> Tensor:
            seen[site] = value.clone()
            return value

        return keep

    run(module, inputs, {site: keeper(site) for site in sites})
    return seen
