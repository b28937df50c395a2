"""Modules -> the portable sites that they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from nnsplice.atlas.block import Block, Tower
from nnsplice.atlas.tree import ModuleTree
from nnsplice.paths.path import Path, Step


def module_places(tree: ModuleTree, towers: Mapping[str, Tower]) -> dict[str, Path]:
    """Module name -> the site that is this module; the first layer where several share one."""
    places: dict[str, Path] = {}
    for tower in towers.values():
        for role in ("embed", "final_norm", "unembed"):
            module = getattr(tower, role)
            if module is not None and (role != "unembed" or module not in places):
                places.setdefault(module, Path((Step(role),), tower=_named(tower)))
        for block in tower.blocks:
            for module, steps in _block_places(tree, block):
                places.setdefault(module, layer_place(tower, block, *steps))
    return places


def _block_places(tree: ModuleTree, block: Block) -> Iterator[tuple[str, tuple[Step, ...]]]:
    for part in ("q", "k", "v", "o"):
        module = getattr(block, part)
        if module:
            shared = part != "o" and block.shares(part)
            yield module, (Step("attn"),) if shared else (Step("attn"), Step(part))
    for part in ("gate", "up", "down", "router"):
        module = getattr(block, part)
        if module:
            yield module, (Step("mlp"), Step(part))
    for module in (block.fused, block.attn):
        if module:
            yield module, (Step("attn"),)
    if block.mixer:
        yield block.mixer, (Step("mixer"),)
    if block.experts and block.experts_are_modules:
        for index, module in enumerate(tree.nodes[block.experts].children.values()):
            yield module, (Step("experts", index),)
    if block.gate_up:
        yield block.gate_up, (Step("mlp"),)
    if block.mlp and not block.mlp_is_bare:
        yield block.mlp, (Step("mlp"),)
    yield from ((module, (Step("mlp"),)) for module in block.mlp_beside)
    yield from ((module, (Step("attn"),)) for module in (*block.head_gates, *block.latents))
    yield from ((module, ()) for module in block.modules)


def layer_place(tower: Tower, block: Block, *steps: Step) -> Path:
    """What the steps name in a layer."""
    return Path((Step("layers", block.index), *steps), tower=_named(tower))


def _named(tower: Tower) -> str | None:
    return tower.name if tower.name == "encoder" else None
