"""The branches of a model's layers: the stream that each reads, and its output to the stream.

A branch is an attention or an MLP. Between two branches there is nothing but the stream, so whatever one of them adds
reaches another directly or through further branches; edges and paths are made of that.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from nnsplice import closures, engine
from nnsplice.activations.access import site_of
from nnsplice.atlas import Block, Site, Tower
from nnsplice.errors import RefusedPlace
from nnsplice.paths import Path, parse_path


@dataclass(frozen=True)
class Branch:
    """One attention or MLP of one layer."""

    name: Literal["attn", "mlp"]
    block: Block
    #: Its output, which is added to the stream.
    added: Path
    #: The stream that it reads.
    reads: Path
    #: When it reads, and when its output can be read; counted over all branches in order: 0, 1, 2, ...
    reads_at: int
    adds_at: int


@dataclass(frozen=True)
class Branches:
    """All branches of a decoder, in the order in which they run."""

    tower: Tower
    all: tuple[Branch, ...]

    @property
    def ends_at(self) -> int:
        """When the stream is complete."""
        return 2 * self.tower.n_layers

    @property
    def end(self) -> Path:
        """The complete stream, before the final norm."""
        last = self.tower.blocks[-1]
        site = Site(last.module, "output", occurrence=last.occurrence)
        return replace(parse_path(f"layers[{last.index}].output"), site=site)

    def of(self, path: Path) -> Branch | None:
        """The branch that a site is inside of; None for the stream itself.

        Raises:
            RefusedPlace: the site is in none, and is not the stream.
        """
        site = site_of(path)
        if self.stream_at(path) is not None:
            return None
        for branch in self.all:
            if _inside(branch, site):
                return branch
        raise RefusedPlace(
            "it is not known which branch of a layer this site belongs to",
            path=path,
            expected="a site of attention or MLP, or of the stream",
        )

    def stream_at(self, path: Path) -> int | None:
        """When a site of the stream is met, in the order of the branches; None for a site that is no stream."""
        site = site_of(path)
        for block in self.tower.blocks:
            if site.occurrence == block.occurrence and site.item in (None, 0):
                if site.module == block.module:
                    return 2 * block.index + (2 if site.end == "output" else 0)
                if block.mid == (site.module, site.end) and site.kind == block.mid_kind:
                    return 2 * block.index + 1
        ends = (self.tower.final_norm, self.tower.unembed)
        return self.ends_at if site.module in ends else None


def rounding_of(dtype: torch.dtype) -> float:
    """The rounding tolerance between two computations of a branch's output, relative to its largest number."""
    return 1e-9 if dtype == torch.float64 else 1e-3 if dtype == torch.float32 else 5e-2


def branches_of(model: engine.Model) -> Branches:
    """The branches of a model.

    Raises:
        RefusedPlace: it is no decoder whose layers are an attention and an MLP that add to a stream, or what they add
            was measured and is something else.
    """
    atlas = engine.map_of(model).atlas
    tower = atlas.tower()
    if len(atlas.towers) > 1:
        raise RefusedPlace(
            "the decoder of a model with two towers has a third branch, which attends to the other",
            expected="a decoder by itself; ns.sweep, ns.ablate, and ns.attribute with atp or ig take two towers",
        )
    found: list[Branch] = []
    for block in tower.blocks:
        if block.attn_added is None or block.mlp_added is None or block.o is None:
            raise RefusedPlace(
                f"layer {block.index} is not known as an attention and an MLP that add to one stream",
                expected="such layers only",
            )
        start = 2 * block.index
        entering = _path(f"layers[{block.index}].input", Site(block.module, "input", occurrence=block.occurrence))
        middle = entering
        if not block.parallel:
            if block.mid is None:
                raise RefusedPlace(f"where the stream of layer {block.index} passes between its branches is not known")
            middle = _path(
                f"layers[{block.index}].mid", Site(*block.mid, kind=block.mid_kind, occurrence=block.occurrence)
            )
        sides: tuple[tuple[Literal["attn", "mlp"], str, Path, int, int], ...] = (
            ("attn", block.attn_added, entering, start, start + (2 if block.parallel else 1)),
            ("mlp", block.mlp_added, middle, start + (0 if block.parallel else 1), start + 2),
        )
        for name, module, reads, at, until in sides:
            added = _path(f"layers[{block.index}].{name}.output", Site(module, "output", occurrence=block.occurrence))
            found.append(Branch(name, block, added, reads, at, until))
    closures.require(model, [branch.added for branch in found])
    return Branches(tower, tuple(found))


def _path(text: str, site: Site) -> Path:
    """A site by its role, also if its module has no such output (a branch that is scaled in code)."""
    return replace(parse_path(text), site=site)


def _inside(branch: Branch, site: Site) -> bool:
    block = branch.block
    if site.occurrence != block.occurrence:
        return False
    if site.location == site_of(branch.added).location:
        return True
    if branch.name == "attn":
        home, parts = block.attn, (block.q, block.k, block.v, block.fused, block.o)
    else:
        home = None if block.mlp_is_bare else block.mlp
        parts = (block.gate, block.up, block.down, block.gate_up, block.router, block.experts)
    if site.module in parts:
        return True
    return home is not None and (site.module == home or site.module.startswith(f"{home}."))
