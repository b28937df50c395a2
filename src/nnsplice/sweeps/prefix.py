"""Runs with changed weights that skip the blocks before the first changed one.

The outputs of all blocks are recorded in one run, and a skipped block returns its recorded output. Whether this gives
bit-identical logits is checked on the model at hand; if not, no block is skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nnsplice.atlas import Atlas, Block, Selection, unwrap


@dataclass(frozen=True)
class Prefix:
    """The outputs of a model's blocks in one run; empty if they cannot be reused."""

    blocks: Sequence[nn.Module] = ()
    outputs: Sequence[Any] = ()
    #: Parameter -> the number of the first block that depends on it; other parameters are used from the start.
    reach: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, model: Any, run: Callable[[], Tensor]) -> Prefix:
        """Record a run, and check that its logits follow from the recorded outputs."""
        atlas, root = Atlas.of(model), unwrap(model)
        order = sorted(atlas.towers.values(), key=lambda tower: tower.name != "encoder")
        blocks = [block for tower in order for block in tower.blocks]
        if not blocks or any(block.occurrence or block.beside for block in blocks):
            return cls()
        modules = [root.get_submodule(block.module) for block in blocks]
        logits, outputs = _recorded(modules, run)
        if logits is None:
            return cls()
        prefix = cls(modules, outputs, _reach(atlas, blocks))
        with prefix._skipping(len(blocks) - 1):
            same = torch.equal(run(), logits)
        return prefix if same else cls()

    @contextmanager
    def before(self, selection: Selection) -> Iterator[int]:
        """Skip the blocks before the first one that depends on these weights; yields their number."""
        count = min((self.reach.get(name, 0) for name in selection), default=0)
        with self._skipping(count):
            yield count

    @contextmanager
    def _skipping(self, count: int) -> Iterator[None]:
        before = [module.__dict__.get("forward") for module in self.blocks[:count]]
        try:
            for module, output in zip(self.blocks[:count], self.outputs, strict=False):
                module.__dict__["forward"] = _returning(output)
            yield
        finally:
            for module, forward in zip(self.blocks[:count], before, strict=True):
                if forward is None:
                    module.__dict__.pop("forward", None)
                else:
                    module.__dict__["forward"] = forward


def _returning(output: Any) -> Callable[..., Any]:
    # A copy each time: some models add into the stream in place.
    return lambda *args, **kwargs: _copy(output)


def _recorded(modules: Sequence[nn.Module], run: Callable[[], Tensor]) -> tuple[Tensor | None, list[Any]]:
    found: dict[int, list[Any]] = {}
    handles = [
        module.register_forward_hook(lambda _, args, output, n=n: found.setdefault(n, []).append(_copy(output)))
        for n, module in enumerate(modules)
    ]
    try:
        logits = run()
    finally:
        for handle in handles:
            handle.remove()
    once = len(found) == len(modules) and all(len(calls) == 1 for calls in found.values())
    return (logits, [found[n][0] for n in range(len(modules))]) if once else (None, [])


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, tuple | list):
        return type(value)(map(_copy, value))
    return value


def _reach(atlas: Atlas, blocks: Sequence[Block]) -> dict[str, int]:
    """The parameters that belong to a single block, with its number."""
    tree = atlas.tree
    shared = set(tree.aliases.values())
    reach: dict[str, int] = {}
    for number, block in enumerate(blocks):
        for name in (block.module, *tree.under(block.module)):
            reach |= {full: number for full, _ in tree.nodes[name].params.values() if full not in shared}
    return reach
