"""Edits and reads of packed tokens, between blocks and inside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nnsplice import wire
from nnsplice.activations.access import site_of
from nnsplice.atlas import Site
from nnsplice.packed.indices import on_device
from nnsplice.packed.layout import Find
from nnsplice.packed.rows import Change, Edit, PlacedItem, Read
from nnsplice.packed.sae_edits import PartChange

#: The index of a row, and one of its edits or reads.
Numbered = tuple[int, PlacedItem]


def edited(values: Tensor, edits: Sequence[Numbered], find: Find) -> Tensor:
    """The values `[token, width]` of one site, with these edits; a copy if anything changes."""
    alike: dict[Change, list[tuple[int, Edit]]] = {}
    parts: dict[tuple[PartChange, str], list[tuple[int, Edit]]] = {}
    for number, placed in edits:
        edit = placed.what
        assert isinstance(edit, Edit)
        if isinstance(edit.change, PartChange):
            parts.setdefault((edit.change, site_of(edit.place).kind), []).append((number, edit))
        else:
            alike.setdefault(edit.change, []).append((number, edit))
    out = None
    for change, members in alike.items():
        at, given, _ = _gathered(members, find, values, values.shape[-1])
        if len(at):
            out = values.clone() if out is None else out
            # From `out`: several edits of a token apply one after the other.
            out[at] = change(out[at], given).to(out)
    before = values if out is None else out
    for (change, kind), members in parts.items():
        at, given, sites = _gathered(members, find, values, 1 if kind == "feature" else values.shape[-1])
        if len(at):
            out = before.clone() if out is None or out is before else out
            # From `before`: the SAE encodes the value without these edits, and the changes of its features add up.
            out.index_add_(0, at, change.steps(before[at], given, sites).to(out))
    return values if out is None else out


def _gathered(
    members: Sequence[tuple[int, Edit]], find: Find, values: Tensor, width: int
) -> tuple[Tensor, Tensor | None, list[Site]]:
    """The indices of the edited tokens `[n]`, the given values `[n, width]` or None, and the site of each."""
    where: list[int] = []
    news: list[Tensor] = []
    sites: list[Site] = []
    for number, edit in members:
        there = [
            (order, at) for order, position in enumerate(edit.positions) if (at := find(number, position)) is not None
        ]
        if not there:
            continue
        where += [at for _, at in there]
        sites += [site_of(edit.place)] * len(there)
        given = edit.values(width)
        if given is not None:
            news += [given[order] for order, _ in there]
    # Stacked on their own device and copied once, as many small copies are slow.
    if len({new.device for new in news}) > 1:
        news = [new.to(values.device) for new in news]
    return on_device(where, values.device), torch.stack(news).to(values, non_blocking=True) if news else None, sites


#: The values of reads: `[position, width]` by the index of the row and the read.
Readings = dict[tuple[int, Read], Tensor]


def read(values: Tensor, reads: Sequence[Numbered], find: Find, into: Readings) -> None:
    """Store the values `[token, width]` of one site at the tokens of these reads."""
    found: dict[tuple[int, Read], list[int]] = {}
    for number, placed in reads:
        assert isinstance(placed.what, Read)
        at = [find(number, position) for position in placed.what.positions]
        where = [token for token in at if token is not None]
        if where:
            assert len(where) == len(at), "a read of tokens that do not run"
            found[number, placed.what] = where
    if found:
        kept = values[on_device([token for where in found.values() for token in where], values.device)]
        into.update(zip(found, kept.split([len(where) for where in found.values()]), strict=True))


@contextmanager
def hooked(root: nn.Module, inside: Sequence[Numbered], find: Callable[[], Find], into: Readings) -> Iterator[None]:
    """In this block, hooks do these edits and reads inside a block of the model."""
    sites: dict[Site, list[Numbered]] = {}
    for number, placed in inside:
        sites.setdefault(placed.site, []).append((number, placed))
    # At one site edits come before reads, so that a read sees the edited value.
    order = sorted(sites, key=lambda site: all(isinstance(placed.what, Read) for _, placed in sites[site]))
    hooks = []
    for site in (site for site in order if site.end == "input"):
        before = _before(site, sites[site], find, into)
        hooks.append(root.get_submodule(site.module).register_forward_pre_hook(before, with_kwargs=True))
    # Outputs are edited before hooks of the user's see them. Prepended hooks run last to first, hence `reversed`.
    for site in (site for site in reversed(order) if site.end == "output"):
        after = _after(site, sites[site], find, into)
        hooks.append(root.get_submodule(site.module).register_forward_hook(after, prepend=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _changed(tensor: Tensor, site: Site, members: Sequence[Numbered], find: Find, into: Readings) -> Tensor:
    flat = tensor.reshape(-1, tensor.shape[-1])
    start, stop = site.columns or (0, flat.shape[-1])
    part = flat[:, start:stop]
    edits = [(number, placed) for number, placed in members if isinstance(placed.what, Edit)]
    new = edited(part, edits, find)
    read(new, [(number, placed) for number, placed in members if isinstance(placed.what, Read)], find, into)
    if new is part:
        return tensor
    whole = flat.clone()
    whole[:, start:stop] = new
    return whole.reshape(tensor.shape)


def _before(site: Site, members: Sequence[Numbered], find: Callable[[], Find], into: Readings) -> Any:
    def hook(_module: nn.Module, args: tuple, kwargs: dict) -> Any:
        held = args[0] if args else next(iter(kwargs.values()))
        new = _changed(held, site, members, find(), into)
        if new is held:
            return None
        if site.kind == "stream":
            held.copy_(new)  # in place: the skip connection uses the same tensor
            return None
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): new})

    return hook


def _after(site: Site, members: Sequence[Numbered], find: Callable[[], Find], into: Readings) -> Any:
    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        held = wire.unpack(output, site.item)
        new = _changed(held, site, members, find(), into)
        return None if new is held else wire.repack(output, site.item, new)

    return hook
