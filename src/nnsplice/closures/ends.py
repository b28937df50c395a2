"""Is the last layer's output all that the head reads of the layers?

Models may give later parts a second look at what earlier layers made: their states are sites of runs like any other,
but no stream, since what is written behind the last layer does not decide the logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from nnsplice import engine
from nnsplice.atlas import Tower, peel
from nnsplice.closures.promises import Closure, gap, tolerance
from nnsplice.closures.seen import Seen, replaced

_FOUND = "what is read behind the last layer is more than that layer's output"


def read_at_once(tower: Tower, seen: Seen) -> bool:
    """Whether the final norm is given the very output of the last layer: then the head reads nothing else."""
    last = tower.blocks[-1]
    left = seen.at(last.end or last.module, "passed", last.occurrence)
    given = seen.at(tower.final_norm, "given", 0)
    return left is not None and given is not None and left.shape == given.shape and bool((left == given).all())


def head(model: Any, tower: Tower, example: tuple[tuple[Any, ...], dict[str, Any]]) -> Iterator[Closure]:
    """Two prompts whose last layers put out the same have to have the same logits; asked of all layers as one."""
    args, kwargs = example
    ids = kwargs.get("input_ids")
    if args or not isinstance(ids, Tensor) or tower.unembed is None:
        return  # a module without tokens has no head that anyone claims
    one, other = (_logits(model, tower, {**kwargs, "input_ids": given}) for given in (ids, ids.flip(-1)))
    if one is None or other is None or one.shape != other.shape:
        return
    missed, allowed = gap([one], other), tolerance(one, computed=True)
    for block in tower.blocks:
        yield Closure("stream", tower.name, block.index, missed, allowed, _FOUND)


def _logits(model: Any, tower: Tower, kwargs: dict[str, Any]) -> Tensor | None:
    """The logits of a run in which the last layer puts out the same numbers whatever it is given."""
    last, root = tower.blocks[-1], peel(model)
    generator = torch.Generator().manual_seed(0)
    visits: list[None] = []

    def fixed(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator, dtype=torch.float32).to(tensor)

    def meet(_: nn.Module, __: Any, output: Any) -> Any:
        visits.append(None)
        return replaced(output, fixed) if len(visits) == last.occurrence + 1 else None

    hook = root.get_submodule(last.end or last.module).register_forward_hook(meet)
    try:
        with engine.undisturbed(model) as call:
            logits = getattr(call(**kwargs), "logits", None)
    finally:
        hook.remove()
    return logits if isinstance(logits, Tensor) else None
