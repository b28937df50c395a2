"""The atlas of a model: what can be asked of where it keeps its parts. The answers stand in files of their own."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from nnsplice.atlas.attached import attached, expand_part
from nnsplice.atlas.locate import locate
from nnsplice.atlas.native import expand_native
from nnsplice.atlas.ownership import unclaimed
from nnsplice.atlas.parts import Parts
from nnsplice.atlas.peel import peel
from nnsplice.atlas.recognise import find_towers
from nnsplice.atlas.resolve import resolve, split
from nnsplice.atlas.selection import Selection
from nnsplice.atlas.sites import expand_portable
from nnsplice.atlas.tree import read_tree
from nnsplice.atlas.verify import Check, verify
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
    return hash((*seen, *map(id, attached(root).values())))


@dataclass(frozen=True, eq=False, repr=False)
class Atlas(Parts):
    """Where one model keeps its parts.

    `Atlas.of` reads a model; `expand` says which places a path means, `locate` which place holds a name, `resolve`
    which parameters belong to a place, `verify` whether all that is true.

    A model whose parts are not recognised has an atlas too: native paths work, portable ones say what was missing.

    >>> atlas = ns.Atlas.of(model)
    >>> atlas
    Atlas(GPT2LMHeadModel: transformer.h with 3 layers of 4 heads)
    >>> print(atlas.locate("transformer.h.1.attn.c_proj.bias"))
    layers[1].attn.o
    """

    @classmethod
    def of(cls, model: Any) -> Atlas:
        """The atlas of a model, whatever it is wrapped in; read again when its structure has changed."""
        root = peel(model)
        mark = fingerprint(root)
        known = _ATLASES.get(root)
        if known is not None and known[0] == mark:
            return known[1]
        tree = read_tree(root)
        found = find_towers(tree)
        atlas = cls(tree, found.towers, weakref.ref(root), found.stacks, found.doubt)
        _ATLASES[root] = (mark, atlas)
        return atlas

    def expand(self, path: Path | str) -> list[Path]:
        """Every concrete place that a path means, in numeric order, each with its `site`.

        >>> [str(path) for path in ns.Atlas.of(model).expand("layers[-2:].output[-1]")]
        ['layers[1].output[-1]', 'layers[2].output[-1]']
        """
        path = parse_path(path)
        if path.sae is not None:
            return list(expand_part(self.root(), path, self.expand(replace(path, sae=None))))
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
        return resolve(self, parse_path(path))

    def split(self, path: Path | str) -> list[Path]:
        """The single places that a path means where weights are asked for, by number.

        >>> [str(place) for place in ns.Atlas.of(model).split("layers[-2:].attn.q")]
        ['layers[1].attn.q', 'layers[2].attn.q']
        """
        return list(split(self, parse_path(path)))

    def unclaimed(self, layer: int, tower: str = "decoder") -> tuple[str, ...]:
        """Parameters of a layer's attention that no head is known to own, and that are not all heads' alike.

        Where there are any, a mask of one head would leave out a part of it, and is refused.

        >>> ns.Atlas.of(model).unclaimed(0)
        ()
        """
        return unclaimed(self, self.towers[tower].blocks[layer])

    def verify(self, *, layers: Iterable[int] | None = None) -> list[Check]:
        """Ask the model itself whether heads and roles are where this atlas says; changes nothing in it.

        What places promise beyond that (branches add up, patterns mix values) is measured when they are first used.

        >>> all(check.ok for check in ns.Atlas.of(model).verify(layers=[0]))
        True
        """
        return verify(self, layers=layers)
