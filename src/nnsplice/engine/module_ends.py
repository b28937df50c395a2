"""The first input of a module, or a part of its output, read or changed by torch's hooks, outside of traces."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from nnsplice import wire
from nnsplice.atlas import Site
from nnsplice.engine.tracing import first_input, with_first_input


@contextmanager
def reading(root: nn.Module, site: Site, look: Callable[[Tensor], None]) -> Iterator[None]:
    """Call a function with the tensor at a site, in every call of its module in this block."""
    module = root.get_submodule(site.module)

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        look(first_input((args, kwargs)))

    def after(_module: nn.Module, _args: Any, output: Any) -> None:
        look(wire.unpack(output, site.item))

    if site.end == "input":
        hook = module.register_forward_pre_hook(before, with_kwargs=True)
    else:
        hook = module.register_forward_hook(after)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def changing(root: nn.Module, site: Site, change: Callable[[Tensor], Tensor], *, first: bool = False) -> Iterator[None]:
    """Replace the tensor at a site, in every call of its module in this block.

    Args:
        first: before all other hooks, so that these see the change.
    """
    module = root.get_submodule(site.module)

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = args, kwargs
        return with_first_input(call, change(first_input(call)))

    def after(_module: nn.Module, _args: Any, output: Any) -> Any:
        return wire.repack(output, site.item, change(wire.unpack(output, site.item)))

    if site.end == "input":
        hook = module.register_forward_pre_hook(before, with_kwargs=True, prepend=first)
    else:
        hook = module.register_forward_hook(after, prepend=first)
    try:
        yield
    finally:
        hook.remove()
