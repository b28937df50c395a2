"""Measure that the head reads the output of the last layer only.

Some models also feed outputs of earlier layers to the final norm or the head. There the outputs of layers are refused
as sites of the stream, since the last one does not determine the logits.
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
    """The output of the last layer in a pass, `[prompt, token, width]`, and the logits."""

    output: Tensor
    logits: Tensor


def pass_end(tower: Tower, recorded: PassValues) -> PassEnd | None:
    """The end of a pass; None for a tower without a head."""
    last = tower.blocks[-1]
    output = recorded.at(last.end or last.module, "passed", last.occurrence)
    if output is None or recorded.logits is None or tower.unembed is None:
        return None
    return PassEnd(output, recorded.logits)


def head(model: Any, tower: Tower, example: tuple[tuple[Any, ...], dict[str, Any]], end: PassEnd) -> Iterator[Closure]:
    """Another prompt has the same logits if its last layer's output is replaced; one measurement for all layers."""
    args, kwargs = example
    ids = kwargs.get("input_ids")
    if args or not isinstance(ids, Tensor):
        return  # a module without token ids has no unembedding
    other = _logits(model, tower, {**kwargs, "input_ids": ids.flip(-1)}, end.output)
    if other is None or other.shape != end.logits.shape:
        return
    missed, allowed = gap([end.logits], other), tolerance(other, computed=True)
    for block in tower.blocks:
        yield Closure("stream", tower.name, block.index, missed, allowed, _FOUND)


def _logits(model: Any, tower: Tower, kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
    """The logits of a run with the output of the last layer replaced."""
    last, root = tower.blocks[-1], unwrap(model)
    visits: list[None] = []

    def replace(_module: nn.Module, _args: Any, own: Any) -> Any:
        visits.append(None)
        return replaced(own, output.to) if len(visits) == last.occurrence + 1 else None

    hook = root.get_submodule(last.end or last.module).register_forward_hook(replace)
    try:
        with engine.undisturbed(model) as call:
            logits = getattr(call(**kwargs), "logits", None)
    finally:
        hook.remove()
    return logits if isinstance(logits, Tensor) else None
