"""Measure that the head reads the output of the last layer only.

Some models also feed outputs of earlier layers to the final norm or the head. The outputs of their layers are refused
as the stream, since the last one alone does not decide the logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from nnsplice import engine
from nnsplice.atlas import Tower, unwrap
from nnsplice.closures.pass_values import PassValues, replaced
from nnsplice.closures.promises import Closure, gap, tolerance

_FOUND = "what is read behind the last layer is more than that layer's output"


@dataclass(frozen=True)
class PassEnd:
    """The output of the last layer in a pass, and the logits."""

    left: Tensor
    logits: Tensor


def pass_end(tower: Tower, recorded: PassValues) -> PassEnd | None:
    """The end of a pass; None for a tower without a head."""
    last = tower.blocks[-1]
    left = recorded.at(last.end or last.module, "passed", last.occurrence)
    if left is None or recorded.logits is None or tower.unembed is None:
        return None
    return PassEnd(left, recorded.logits)


def head(model: Any, tower: Tower, example: tuple[tuple[Any, ...], dict[str, Any]], end: PassEnd) -> Iterator[Closure]:
    """Another prompt has the same logits where its last layer puts out the same; asked of all layers as one."""
    args, kwargs = example
    ids = kwargs.get("input_ids")
    if args or not isinstance(ids, Tensor):
        return  # a module without tokens has no head that anyone claims
    other = _logits(model, tower, {**kwargs, "input_ids": ids.flip(-1)}, end.left)
    if other is None or other.shape != end.logits.shape:
        return
    missed, allowed = gap([end.logits], other), tolerance(other, computed=True)
    for block in tower.blocks:
        yield Closure("stream", tower.name, block.index, missed, allowed, _FOUND)


def _logits(model: Any, tower: Tower, kwargs: dict[str, Any], left: Tensor) -> Tensor | None:
    """The logits of a run with the output of the last layer replaced."""
    last, root = tower.blocks[-1], unwrap(model)
    visits: list[None] = []

    def meet(_: nn.Module, __: Any, output: Any) -> Any:
        visits.append(None)
        return replaced(output, left.to) if len(visits) == last.occurrence + 1 else None

    hook = root.get_submodule(last.end or last.module).register_forward_hook(meet)
    try:
        with engine.undisturbed(model) as call:
            logits = getattr(call(**kwargs), "logits", None)
    finally:
        hook.remove()
    return logits if isinstance(logits, Tensor) else None
