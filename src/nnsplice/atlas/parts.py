"""Where one model keeps its parts, as plain data read once from its module tree: what all answers are made from."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType

from torch import nn

from nnsplice.atlas import families as rows
from nnsplice.atlas.block import Tower
from nnsplice.atlas.modules import module_places
from nnsplice.atlas.selection import Selection
from nnsplice.atlas.tree import Tree
from nnsplice.errors import UnknownPath, UnrecognisedModel
from nnsplice.paths.path import Path


@dataclass(frozen=True, eq=False)
class Parts:
    """What is known of one model."""

    tree: Tree
    #: `"decoder"`, and `"encoder"` for models with two towers; empty where nothing was recognised.
    towers: Mapping[str, Tower]
    #: The model it was read from, for `verify`; dead when the model is gone.
    root: weakref.ref[nn.Module] = field(repr=False)

    @cached_property
    def tuple_modules(self) -> frozenset[str]:
        """Attention modules, whose output is a tuple in every family."""
        blocks = [block for tower in self.towers.values() for block in tower.blocks]
        return frozenset(name for block in blocks for name in (block.attn, block.pattern and block.pattern[0]) if name)

    def tower(self, path: Path | None = None) -> Tower:
        """The tower that a path speaks of; the decoder where it does not say."""
        if not self.towers:
            raise UnrecognisedModel(
                "the parts of this model cannot be told apart",
                path=path,
                expected="a list of layers, each with attention (q, k, v or one fused layer: "
                f"{', '.join(rows.Q[:3])}, {', '.join(list(rows.FUSED)[:3])}, ...; an output projection: "
                f"{', '.join(rows.O[:4])}, ...) and an MLP ({', '.join(rows.DOWN[:4])}, ... or experts)",
                write="a native path, starting with `model.`",
            )
        wanted = path.tower if path is not None and path.tower else "decoder"
        if wanted not in self.towers:
            raise UnknownPath(
                f"this model has one tower, and no {wanted}",
                path=path,
                column=0,
                write=str(path).removeprefix(f"{wanted}."),
            )
        return self.towers[wanted]

    def tower_phrase(self, tower: Tower) -> str:
        """What has the layers, in a sentence."""
        return f"the {tower.name}" if len(self.towers) > 1 else "this model"

    @cached_property
    def places(self) -> Mapping[str, Path]:
        """Module name -> the portable place that is this module."""
        return MappingProxyType(module_places(self.tree, self.towers))

    @property
    def tied(self) -> bool:
        """Whether the unembedding is the embedding's tensor."""
        tower = self.towers.get("decoder")
        if tower is None or tower.embed is None or tower.unembed is None:
            return False
        ends = [self.tree.table(module) for module in (tower.embed, tower.unembed)]
        return ends[0] == ends[1]

    def rank(self, name: str) -> tuple[int, int, int]:
        """Where a parameter stands: in the model's order, and inside a tower layer by layer."""
        return self._ranks[name]

    @cached_property
    def _ranks(self) -> dict[str, tuple[int, int, int]]:
        numbers = {name: n for n, name in enumerate(self.tree.params)}
        ranks = {name: (n, -1, n) for name, n in numbers.items()}
        for tower in self.towers.values():
            inside = {
                full: block.index
                for block in reversed(tower.blocks)
                for module in block.modules
                for name in (module, *self.tree.under(module))
                for full, _ in self.tree.nodes[name].params.values()
            }
            start = min(map(numbers.__getitem__, inside), default=0)
            ranks |= {name: (start, layer, numbers[name]) for name, layer in inside.items()}
        return ranks

    @cached_property
    def selections(self) -> dict[Path, Selection]:
        """The parameters of the places that were asked for, as `resolve` found them."""
        return {}
