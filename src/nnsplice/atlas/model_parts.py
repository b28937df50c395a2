"""The parts of one model as plain data, read once from its module tree."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType

from torch import nn

from nnsplice.atlas import families as rows
from nnsplice.atlas.block import Tower
from nnsplice.atlas.choose import Doubt
from nnsplice.atlas.modules import module_places
from nnsplice.atlas.selection import Selection
from nnsplice.atlas.tree import ModuleTree
from nnsplice.errors import UnknownPath, UnrecognisedModel
from nnsplice.paths.path import Path, Step


@dataclass(frozen=True, eq=False, repr=False)
class ModelParts:
    """The recognised parts of one model."""

    tree: ModuleTree
    #: `"decoder"`, and `"encoder"` for models with two towers; empty where nothing was recognised.
    towers: Mapping[str, Tower]
    #: The model it was read from, for `verify`; dead when the model is gone.
    root: weakref.ref[nn.Module] = field(repr=False)
    #: Every list of blocks that was recognised -> its modules, whether it is a tower or not.
    stacks: Mapping[str, tuple[str, ...]] = field(default_factory=dict, repr=False)
    #: Why there are no towers, though there are lists of layers.
    doubt: Doubt | None = None

    @cached_property
    def tuple_modules(self) -> frozenset[str]:
        """Attention modules, whose output is a tuple in every family."""
        blocks = [one for tower in self.towers.values() for block in tower.blocks for one in block.attentions]
        return frozenset(name for block in blocks for name in (block.attn, block.pattern and block.pattern[0]) if name)

    def __repr__(self) -> str:
        root = self.root()
        kind = "a model that is gone" if root is None else type(root).__name__
        if not self.towers:
            why = self.doubt.reason if self.doubt is not None else "its parts are not recognised"
            return f"{type(self).__name__}({kind}: {why})"
        found = [
            f"{tower.stack} with {tower.n_layers} layers"
            + (f" of {heads} heads" if (heads := max(block.n_heads for block in tower.blocks)) else "")
            for tower in self.towers.values()
        ]
        return f"{type(self).__name__}({kind}: {', '.join(found)})"

    def tower(self, path: Path | None = None) -> Tower:
        """The tower that a path speaks of; the decoder where it does not say."""
        if self.doubt is not None:
            raise self._doubtful(self.doubt, path)
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
        if wanted not in self.towers and self.tree.facts.get("is_encoder_decoder"):
            raise UnrecognisedModel(
                f"the layers of this model's {wanted} are not recognised",
                path=path,
                column=0,
                expected="the modules by the model's own names",
                write="a native path, starting with `model.`",
            )
        if wanted not in self.towers:
            raise UnknownPath(
                f"this model has one tower, and no {wanted}",
                path=path,
                column=0,
                write=str(path).removeprefix(f"{wanted}."),
            )
        return self.towers[wanted]

    @cached_property
    def layer_modules(self) -> Mapping[str, int]:
        """Modules that are a layer of some list -> how many layers of its tower each is: more than 1 in ALBERT."""
        counts = {module: 1 for modules in self.stacks.values() for module in modules}
        for tower in self.towers.values():
            counts |= Counter(module for block in tower.blocks for module in block.modules)
        return MappingProxyType(counts)

    def layer_around(self, module: str) -> str | None:
        """The layer that a module is, or is a part of."""
        while module and module not in self.layer_modules:
            module = module.rpartition(".")[0]
        return module or None

    def _doubtful(self, doubt: Doubt, path: Path | None) -> UnrecognisedModel:
        asked = path.steps[0].index if path is not None and len(path.steps) == 1 else None
        *home, last = doubt.stacks[0].split(".")
        steps = (*map(Step, home), Step(last, 0 if asked is None else asked))
        value = path.value if path is not None and path.value in ("input", "output") else "output"
        return UnrecognisedModel(
            doubt.reason,
            path=path,
            expected="the list that is meant, by the model's own names",
            write=str(Path(steps, native=True, value=value, position=path.position if path is not None else None)),
        )

    def tower_phrase(self, tower: Tower) -> str:
        """What has the layers, in a sentence."""
        return f"the {tower.name}" if len(self.towers) > 1 else "this model"

    @cached_property
    def places(self) -> Mapping[str, Path]:
        """Module name -> the portable site that is this module."""
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
        """The parameters of the sites that were asked for, as `resolve` found them."""
        return {}
