"""Verify the atlas by gradients: which parameters change which head.

The slice that head h has in front of the output projection depends on the head's own query, key and value columns and
on no others, whatever the layout. So back-propagate a random functional of that slice:

* parameters: rows of q, k and v that receive a gradient are the head, and must be what `resolve` answers;
* roles: with a functional of the last token alone, query columns receive a gradient at the last token only; key and
  value columns also at earlier ones. With a functional of a single column of the slice, one value column is left,
  while all key columns stay. That tells the three apart without knowing the layout.

A gradient that does not exist is exactly zero here, so no tolerance is involved. The bias of keys is an exception on
the other side: the softmax ignores it where no rotation follows, so its true gradient is zero, and only strangers are
looked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nnsplice.atlas.block import Block, Tower
from nnsplice.atlas.layouts import ROLES, Layout, Role, merge
from nnsplice.atlas.model_parts import ModelParts
from nnsplice.atlas.ownership import per_head, unclaimed
from nnsplice.atlas.resolve import resolve
from nnsplice.atlas.tree import is_norm
from nnsplice.errors import NnspliceError
from nnsplice.paths.path import Path, Step

#: More than two, so that a softmax has a choice and earlier tokens exist; few, so that a large model is quick.
_TOKENS = 4


@dataclass(frozen=True, slots=True)
class Check:
    """What one look at the model found."""

    tower: str
    layer: int
    #: `q`, `k`, `v` (columns of the projections), `parameters` (all of a head), or `claims` where parameters of the
    #: attention are in no head.
    role: str
    ok: bool
    #: What was found instead; empty where all is well.
    detail: str = ""


def verify(atlas: ModelParts, *, layers: Iterable[int] | None = None) -> list[Check]:
    """Compare the atlas with the model. See `Atlas.verify`."""
    root = atlas.root()
    if root is None:
        raise NnspliceError("the model that this atlas was read from is gone")
    wanted = None if layers is None else set(layers)
    jobs = [
        (tower, block)
        for tower in atlas.towers.values()
        for block in tower.blocks
        if block.occurrence == 0 and (wanted is None or block.index in wanted)
    ]
    checks: list[Check] = []
    with _undisturbed(root), ExitStack() as stack:
        seen = _watch(atlas, root, [block for _, block in jobs], stack)
        _run(root, atlas)
        generator = torch.Generator().manual_seed(0)
        for tower, block in jobs:
            checks += _check_claims(atlas, tower, block)
            checks += _check_heads(atlas, root, tower, block, seen, generator)
    return checks


# -- one run, without a trace ------------------------------------------------------------------------------------------


@contextmanager
def _undisturbed(root: nn.Module) -> Iterator[None]:
    """Evaluation mode with gradients for the block; every flag and random state is put back."""
    training = [(module, module.training) for module in root.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in root.parameters()]
    devices = {parameter.device for parameter in root.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)), torch.enable_grad(), torch.inference_mode(False):
        try:
            for module, _ in training:
                module.training = False
            for parameter, _ in flags:
                parameter.requires_grad_(parameter.is_floating_point())
            yield
        finally:
            for module, flag in training:
                module.training = flag
            for parameter, flag in flags:
                parameter.requires_grad_(flag)


def _watch(
    atlas: ModelParts, root: nn.Module, blocks: list[Block], stack: ExitStack
) -> dict[tuple[str, str], torch.Tensor]:
    """Keep what passes the ends that the checks need (first call only), and take norms of q, k and v out of the way."""
    seen: dict[tuple[str, str], torch.Tensor] = {}

    def keep(name: str, end: str, value: Any) -> None:
        value = value[0] if isinstance(value, tuple) and value else value
        if isinstance(value, torch.Tensor):
            seen.setdefault((name, end), value)

    for block in blocks:
        for name in (block.q, block.k, block.v, block.fused):
            if name is not None:
                module = root.get_submodule(name)
                stack.callback(module.register_forward_hook(lambda _, a, out, n=name: keep(n, "projected", out)).remove)
        if block.o is not None:
            module = root.get_submodule(block.o)

            def slots(_: nn.Module, args: tuple, name: str = block.o) -> None:
                keep(name, "slots", args)

            stack.callback(module.register_forward_pre_hook(slots).remove)
        if block.pattern is not None:
            # A norm over all heads mixes their gradients, and is no part of the question.
            for name in atlas.tree.under(block.pattern[0]):
                if is_norm(atlas.tree, name) and name != block.attn_added:
                    handle = root.get_submodule(name).register_forward_hook(lambda _, args, out: args[0])
                    stack.callback(handle.remove)
    return seen


def _run(root: nn.Module, atlas: ModelParts) -> None:
    tower = next(iter(atlas.towers.values()))
    table = root.get_submodule(tower.embed).weight if tower.embed else None
    size, device = (table.shape[0], table.device) if isinstance(table, torch.Tensor) else (50, "cpu")
    # Different tokens: among equal keys the softmax has no gradient.
    ids = (torch.arange(_TOKENS) * 7 + 3) % size
    ids = ids[None].to(device)
    arguments = atlas.tree.nodes[""].arguments
    inputs = {"input_ids": ids} if "input_ids" in arguments else {}
    if "decoder_input_ids" in arguments and len(atlas.towers) > 1:
        inputs["decoder_input_ids"] = ids
    root(**inputs) if inputs else root(ids)


# -- claims ------------------------------------------------------------------------------------------------------------


def _check_claims(atlas: ModelParts, tower: Tower, block: Block) -> Iterator[Check]:
    """The parameters of the attention that no role claims, where there are any."""
    left = unclaimed(atlas, block)
    if left:
        yield Check(tower.name, block.index, "claims", False, f"in no head: {', '.join(left)}")


# -- heads -------------------------------------------------------------------------------------------------------------


def _check_heads(
    atlas: ModelParts,
    root: nn.Module,
    tower: Tower,
    block: Block,
    seen: dict[tuple[str, str], torch.Tensor],
    generator: torch.Generator,
) -> Iterator[Check]:
    layout = block.layout
    if block.o is None:
        return  # a layer without attention, or one whose heads are an axis of their own
    if block.mixed is not None:
        return  # it has no head that could be named
    if layout is None:
        yield Check(tower.name, block.index, "parameters", False, "the number of heads is unknown")
        return
    slots = seen.get((block.o, "slots"))
    modules: dict[Role, str | None] = {role: block.projection(role) for role in ROLES}
    projected = {name: seen.get((name, "projected")) for name in set(modules.values()) if name is not None}
    if slots is None or any(value is None for value in projected.values()):
        yield Check(tower.name, block.index, "parameters", False, "its projections did not run")
        return
    parameters = {
        name: root.get_parameter(name)
        for module in (*projected, *block.head_gates, *(module for module, _ in block.group_rows))
        for name, _ in atlas.tree.owner(module).params.values()
        if root.get_parameter(name).is_floating_point()
    } | {name: root.get_parameter(name) for name in per_head(atlas, block)}
    # Where nobody knows whose a parameter is, no mask of a head is given, and none can be wrong.
    masked = not unclaimed(atlas, block)
    wrong: dict[str, list[str]] = {role: [] for role in (*ROLES, *(("parameters",) if masked else ()))}
    for head in range(layout.n_heads):
        grads = _Gradients(slots, projected, parameters, head * layout.head_dim, layout.head_dim, generator)  # pyright: ignore[reportArgumentType]
        for role, columns in grads.roles(modules, layout).items():
            start, stop = layout.range(role, head if role == "q" else layout.group_of(head))
            if columns != set(range(start, stop)):
                wrong[role].append(f"head {head}: {_spans(columns)} instead of {start}:{stop}")
        place = Path((Step("layers", block.index), Step("heads", head)), tower=tower.name)
        if masked:
            wrong["parameters"] += [f"head {head}: {text}" for text in grads.strangers(atlas, place, modules["k"])]
    for role, texts in wrong.items():
        yield Check(tower.name, block.index, role, not texts, "; ".join(texts[:3]))


class _Gradients:
    """Where the gradients of one head's slice arrive."""

    def __init__(
        self,
        slots: torch.Tensor,
        projected: dict[str, torch.Tensor],
        parameters: dict[str, torch.Tensor],
        start: int,
        width: int,
        generator: torch.Generator,
    ) -> None:
        self.projected, self.parameters = projected, parameters
        weights = torch.randn(width, generator=generator).to(slots)
        # A layer may flatten prompts and tokens; the last row is the last token either way.
        last = slots.reshape(-1, slots.shape[-1])[-1, start : start + width]
        every = slots.reshape(-1, slots.shape[-1])[:, start : start + width]
        self.params = self._of((every * weights).sum(), list(parameters.values()))
        self.last = self._of((last * weights).sum(), list(projected.values()))
        self.columns = [self._of(last[i], list(projected.values())) for i in range(min(2, width))]

    @staticmethod
    def _of(value: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor | None]:
        return list(torch.autograd.grad(value, inputs, retain_graph=True, allow_unused=True))

    def _support(self, grads: list[torch.Tensor | None], module: str, *, earlier: bool) -> set[int]:
        """Columns of a projection with a gradient, at any token or at the earlier ones."""
        grad = grads[list(self.projected).index(module)]
        if grad is None:
            return set()
        grad = grad.reshape(-1, grad.shape[-1])
        return set((grad[:-1] if earlier else grad).ne(0).any(0).nonzero().flatten().tolist())

    def roles(self, modules: dict[Role, str | None], layout: Layout) -> dict[Role, set[int]]:
        """The columns of the head's q, k and v, found without the layout."""
        if not layout.fused:
            found: dict[Role, set[int]] = {
                r: self._support(self.last, m, earlier=False) for r, m in modules.items() if m is not None
            }
            query, pair = str(modules["q"]), str(modules["k"])
            if layout.gate_dim and len(self.columns) > 1:
                # A gate is read by one column of the slice, and a query by all.
                found["q"] = set.intersection(*(self._support(of, query, earlier=False) for of in self.columns))
            if layout.kind == "latent" and len(self.columns) > 1:
                key = set.intersection(*(self._support(of, pair, earlier=False) for of in self.columns))
                found["k"], found["v"] = key, found["v"] - key
            return found
        fused = str(modules["q"])
        both = self._support(self.last, fused, earlier=True)
        query = self._support(self.last, fused, earlier=False) - both
        if len(self.columns) < 2:
            return {"q": query}  # heads of width one: keys and values look alike
        key = set.intersection(*(self._support(grads, fused, earlier=True) for grads in self.columns))
        return {"q": query, "k": key, "v": both - key}

    def strangers(self, atlas: ModelParts, place: Path, key: str | None) -> Iterator[str]:
        """Parameters whose rows with a gradient are not those that belong to the head."""
        masks = resolve(atlas, place).masks()
        for (name, parameter), grad in zip(self.parameters.items(), self.params, strict=True):
            mask = masks.get(name, torch.zeros(parameter.shape, dtype=torch.bool))
            axis = _axis(atlas, name)
            expected = _lines(torch.ones(parameter.shape) if mask is None else mask, axis)
            found = _lines(torch.zeros(parameter.shape) if grad is None else grad.ne(0), axis)
            if name.endswith(".bias") and key is not None and name.startswith(f"{key}."):
                found |= expected  # the softmax may ignore it
            if found != expected:
                yield f"{name} has a gradient at {_spans(found)} instead of {_spans(expected)}"


def _axis(atlas: ModelParts, name: str) -> int:
    """The axis of a projection's parameter that runs along its output."""
    module, _, attribute = name.rpartition(".")
    return 1 if attribute == "weight" and atlas.tree.transposed(module) else 0


def _lines(mask: torch.Tensor, axis: int) -> set[int]:
    other = [i for i in range(mask.ndim) if i != axis]
    return set((mask.ne(0).any(other) if other else mask.ne(0)).nonzero().flatten().tolist())


def _spans(numbers: set[int]) -> str:
    """Numbers as the ranges they make: {0, 1, 2, 7} -> '0:3, 7:8'."""
    return ", ".join(f"{start}:{stop}" for start, stop in merge((n, n + 1) for n in numbers)) or "nothing"
