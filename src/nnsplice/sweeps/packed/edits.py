"""Writing into packed tokens: at the ends of a block, and inside it while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nnsplice import wire
from nnsplice.activations.access import site_of
from nnsplice.atlas import Site
from nnsplice.sweeps.executors import Work
from nnsplice.sweeps.packed.rows import Edit, Row

#: The number of a row, and the edit.
Numbered = tuple[int, Edit]
#: A row and a position -> where that token stands; None where it does not run.
Find = Callable[[int, int], int | None]
Change = Callable[[Tensor, Sequence[Numbered]], Tensor]


def edited(work: Work, rows: Sequence[Row], values: Tensor, edits: Sequence[Numbered], find: Find) -> Tensor:
    """A copy of `[token, width]` with these edits done; all of them at one place, or of the whole width."""
    where: list[int] = []
    news: list[Tensor | None] = []
    for number, edit in edits:
        for order, position in enumerate(edit.positions):
            token = find(number, position)
            if token is not None:
                where.append(token)
                news.append(work.source.value(rows[number].job, edit.place, order, position, values.shape[-1]))
    if not where:
        return values
    at = torch.tensor(where, device=values.device)
    current = values[at]
    given = [new.to(current) for new in news if new is not None]
    out = values.clone()
    out[at] = work.plan.operation.apply(current, torch.stack(given) if given else None)
    return out


@contextmanager
def hooked(root: nn.Module, edits: Sequence[Numbered], change: Change) -> Iterator[None]:
    """Do the edits of a block's inside while it runs."""
    sites: dict[Site, list[Numbered]] = {}
    for number, edit in edits:
        sites.setdefault(site_of(edit.place), []).append((number, edit))
    hooks = []
    for site, members in sites.items():
        module = root.get_submodule(site.module)
        if site.end == "input":
            hooks.append(module.register_forward_pre_hook(_before(site, members, change), with_kwargs=True))
        else:  # what the module returned, before hooks of the user's see it
            hooks.append(module.register_forward_hook(_after(site, members, change), prepend=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _changed(tensor: Tensor, site: Site, members: Sequence[Numbered], change: Change) -> Tensor:
    flat = tensor.reshape(-1, tensor.shape[-1])
    start, stop = site.columns or (0, flat.shape[-1])
    new = flat.clone()
    new[:, start:stop] = change(flat[:, start:stop], members)
    return new.reshape(tensor.shape)


def _before(site: Site, members: Sequence[Numbered], change: Change) -> Any:
    def hook(_module: nn.Module, args: tuple, kwargs: dict) -> Any:
        held = args[0] if args else next(iter(kwargs.values()))
        new = _changed(held, site, members, change)
        if site.kind == "stream":
            held.copy_(new)  # the skip path holds the same tensor, and the stream is both
            return None
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): new})

    return hook


def _after(site: Site, members: Sequence[Numbered], change: Change) -> Any:
    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        held = wire.unpack(output, site.item)
        return wire.repack(output, site.item, _changed(held, site, members, change))

    return hook
