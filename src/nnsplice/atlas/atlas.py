"""`Atlas`: the structure of a model, and queries on it. The work is in the modules beside it."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from nnsplice.atlas.attached import attached, expand_part
from nnsplice.atlas.locate import locate
from nnsplice.atlas.model_parts import ModelParts
from nnsplice.atlas.native import expand_native
from nnsplice.atlas.ownership import unclaimed
from nnsplice.atlas.recognise import find_towers
from nnsplice.atlas.resolve import resolve, split
from nnsplice.atlas.selection import Selection
from nnsplice.atlas.sites import expand_portable
from nnsplice.atlas.tree import read_tree
from nnsplice.atlas.unwrap import unwrap
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
class Atlas(ModelParts):
    """The structure of a model: where its layers, heads and parameters are.

    `Atlas.of` reads a model; `expand` resolves paths to sites, `locate` finds the address of a name, `resolve` the
    parameters of an address, and `verify` checks all this on the model.

    A model whose parts are not recognised has an atlas for native paths; portable ones raise `UnrecognisedModel`.

    >>> atlas = ns.Atlas.of(model)
    >>> atlas
    Atlas(GPT2LMHeadModel: transformer.h with 3 layers of 4 heads)
    >>> print(atlas.locate("transformer.h.1.attn.c_proj.bias"))
    layers[1].attn.o
    """

    @classmethod
    def of(cls, model: Any) -> Atlas:
        """The atlas of a model; it is read again when the model's structure has changed.

        Args:
            model: a model from `ns.load`, or a module in any wrapper.

        Returns:
            The atlas.
        """
        root = unwrap(model)
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
        """Resolve a path to single sites, in numeric order.

        >>> [str(path) for path in ns.Atlas.of(model).expand("layers[-2:].output[-1]")]
        ['layers[1].output[-1]', 'layers[2].output[-1]']

        Args:
            path: the path.

        Returns:
            One path for each site.
        """
        path = parse_path(path)
        if path.sae is not None:
            return list(expand_part(self.root(), path, self.expand(replace(path, sae=None))))
        return list(expand_native(self, path) if path.native else expand_portable(self, path))

    def locate(self, name: str) -> Path:
        """The smallest portable address of a parameter, buffer or module, or its native path.

        Names of wrapped models, adapter files and checkpoints of the same family are accepted.

        >>> print(ns.Atlas.of(model).locate("module.transformer.h.2.mlp.c_fc.bias"))
        layers[2].mlp.up

        Args:
            name: the name.

        Returns:
            The address.

        Raises:
            UnknownPath: the model has nothing of this name.
        """
        return locate(self, name)

    def resolve(self, path: Path | str) -> Selection:
        """The parameters of an address, as slices.

        >>> ns.Atlas.of(model).resolve("layers[0].heads[1]").parts["transformer.h.0.attn.c_proj.weight"]
        (0, ((4, 8),))

        Args:
            path: the address.

        Returns:
            The selection.
        """
        return resolve(self, parse_path(path))

    def split(self, path: Path | str) -> list[Path]:
        """The single addresses of weights that a path stands for.

        >>> [str(place) for place in ns.Atlas.of(model).split("layers[-2:].attn.q")]
        ['layers[1].attn.q', 'layers[2].attn.q']

        Args:
            path: the path.

        Returns:
            One path for each.
        """
        return list(split(self, parse_path(path)))

    def unclaimed(self, layer: int, tower: str = "decoder") -> tuple[str, ...]:
        """Attention parameters of a layer that belong to no known head, and are not shared by all.

        If there are any, masks of single heads are refused.

        >>> ns.Atlas.of(model).unclaimed(0)
        ()

        Args:
            layer: the layer.
            tower: `"encoder"` or `"decoder"`.

        Returns:
            The names of the parameters.
        """
        return unclaimed(self, self.towers[tower].blocks[layer])

    def verify(self, *, layers: Iterable[int] | None = None) -> list[Check]:
        """Check on the model that heads and roles are where this atlas has them; the model is not changed.

        Properties of activations (branches add up, patterns mix values) are measured when first used.

        >>> all(check.ok for check in ns.Atlas.of(model).verify(layers=[0]))
        True

        Args:
            layers: the layers to check; all if left out.

        Returns:
            A check for each kind, with `ok`.
        """
        return verify(self, layers=layers)
