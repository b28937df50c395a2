"""The atlas of a model: where it keeps its parts, as plain data read once from its module tree."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any

from torch import nn

from nnsplice.atlas import families as rows
from nnsplice.atlas.block import Tower
from nnsplice.atlas.locate import locate, module_places
from nnsplice.atlas.native import expand_native
from nnsplice.atlas.peel import peel
from nnsplice.atlas.recognise import find_towers
from nnsplice.atlas.resolve import resolve, split
from nnsplice.atlas.selection import Selection
from nnsplice.atlas.sites import expand_portable
from nnsplice.atlas.tree import Tree, read_tree
from nnsplice.atlas.verify import Check, verify
from nnsplice.errors import UnknownPath, UnrecognisedModel
from nnsplice.paths import parse_path
from nnsplice.paths.path import Path

_ATLASES: weakref.WeakKeyDictionary[nn.Module, tuple[int, Atlas]] = weakref.WeakKeyDictionary()


def fingerprint(root: nn.Module) -> int:
    """A number that changes when modules are added, removed or exchanged; cheap enough to ask before every use.

    >>> layer = nn.Sequential(nn.Linear(2, 2))
    >>> before = fingerprint(layer)
    >>> layer.append(nn.ReLU()) and fingerprint(layer) == before
    False
    """
    seen: list[int] = []
    queue = [root]
    while queue:
        modules = queue.pop()._modules.values()
        seen.extend(map(id, modules))
        queue.extend([module for module in modules if module is not None and module._modules])
    return hash(tuple(seen))


@dataclass(frozen=True, eq=False)
class Atlas:
    """Where one model keeps its parts.

    `Atlas.of` reads a model; `expand` says which places a path means, `locate` which place holds a name, `resolve`
    which parameters belong to a place, `verify` whether all that is true.

    A model whose parts are not recognised has an atlas too: native paths work, portable ones say what was missing.

    >>> atlas = ns.Atlas.of(model)
    >>> print(atlas.locate("transformer.h.1.attn.c_proj.bias"))
    layers[1].attn.o
    """

    tree: Tree
    #: `"decoder"`, and `"encoder"` for models with two towers; empty where nothing was recognised.
    towers: Mapping[str, Tower]
    #: The model it was read from, for `verify`; dead when the model is gone.
    root: weakref.ref[nn.Module] = field(repr=False)

    @classmethod
    def of(cls, model: Any) -> Atlas:
        """The atlas of a model, whatever it is wrapped in; read again when its structure has changed."""
        root = peel(model)
        mark = fingerprint(root)
        known = _ATLASES.get(root)
        if known is not None and known[0] == mark:
            return known[1]
        tree = read_tree(root)
        atlas = cls(tree, MappingProxyType(find_towers(tree)), weakref.ref(root))
        _ATLASES[root] = (mark, atlas)
        return atlas

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
        return MappingProxyType(module_places(self))

    @property
    def tied(self) -> bool:
        """Whether the unembedding is the embedding's tensor."""
        tower = self.towers.get("decoder")
        if tower is None or tower.embed is None or tower.unembed is None:
            return False
        ends = [self.tree.table(module) for module in (tower.embed, tower.unembed)]
        return ends[0] == ends[1]

    def expand(self, path: Path | str) -> list[Path]:
        """Every concrete place that a path means, in numeric order, each with its `site`.

        >>> [str(path) for path in ns.Atlas.of(model).expand("layers[-2:].output[-1]")]
        ['layers[1].output[-1]', 'layers[2].output[-1]']
        """
        path = parse_path(path)
        return list(expand_native(self, path) if path.native else expand_portable(self, path))

    def locate(self, name: str) -> Path:
        """The smallest portable place that holds a parameter, buffer or module, else its native path.

        Names of wrapped models, adapter files and checkpoints of the same family are understood too.

        >>> print(ns.Atlas.of(model).locate("module.transformer.h.2.mlp.c_fc.bias"))
        layers[2].mlp.up
        """
        return locate(self, name)

    def resolve(self, path: Path | str) -> Selection:
        """The parameters of a place, as slices.

        >>> ns.Atlas.of(model).resolve("layers[0].heads[1]").parts["transformer.h.0.attn.c_proj.weight"]
        (0, ((4, 8),))
        """
        path = parse_path(path)
        found = self._resolved.get(path)
        if found is None:
            found = self._resolved[path] = resolve(self, path)
        return found

    def split(self, path: Path | str) -> list[Path]:
        """The single places that a path means where weights are asked for, by number.

        >>> [str(place) for place in ns.Atlas.of(model).split("layers[-2:].attn.q")]
        ['layers[1].attn.q', 'layers[2].attn.q']
        """
        return list(split(self, parse_path(path)))

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
    def _resolved(self) -> dict[Path, Selection]:
        return {}

    def verify(self, *, layers: Iterable[int] | None = None) -> list[Check]:
        """Ask the model itself whether heads, roles and stream are where this atlas says; changes nothing in it.

        >>> all(check.ok for check in ns.Atlas.of(model).verify(layers=[0]))
        True
        """
        return verify(self, layers=layers)
