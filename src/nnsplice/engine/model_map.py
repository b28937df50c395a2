"""Paths -> sites of one model, in the order of its forward pass."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from nnsplice.atlas import Atlas, Order, fingerprint, unwrap
from nnsplice.deprecated import renamed
from nnsplice.engine.order_checks import check_calls, checked_atlas
from nnsplice.engine.recording import order_of
from nnsplice.errors import BadType, PathError, named
from nnsplice.paths import Path, Paths, parse_path, position_rank


@renamed(paths="sites")
def expand(model: object, sites: Paths, *, probe: Any = None) -> list[Path]:
    """Resolve paths against a model: negative numbers, slices and lists become single sites.

    Positions stay as they are written, a site that is named twice is returned once, and the order is that of the
    forward pass.

    >>> [str(path) for path in ns.expand(model, ["layers[-1].output[-1]", "layers[0:2].mlp.output[3]"])]
    ['layers[0].mlp.output[3]', 'layers[1].mlp.output[3]', 'layers[2].output[-1]']

    Args:
        model: a model from `ns.load`, or any nnsight model.
        sites: a path or several.
        probe: an input to run the model with once, where none can be inferred (a plain `NNsight(module)`).

    Returns:
        One path for each site and position.

    Raises:
        PathError: no path, or a layer or head out of range (`OutOfRange`).
        UnknownPath: a site that this model does not have.
        NeedsProbe: the model has to be run once, and no input is known.
        NeverFired: the forward pass does not reach a site.
    """
    found = map_of(model, probe).arrange(listed(sites))
    return list(dict.fromkeys(path for path, _ in found))


def listed(paths: Paths) -> tuple[str | Path, ...]:
    """One path or several, as a tuple."""
    if isinstance(paths, str | Path):
        return (paths,)
    several = tuple(paths) if isinstance(paths, Iterable) else (paths,)
    for path in several:
        if not isinstance(path, str | Path):
            raise BadType(f"a path is a text or a Path, not {named(path)}", expected="'layers[2].output[-1]'")
    return several


#: Expanded paths, each with the number of the requested path.
Arranged = list[tuple[Path, int]]
#: The sort key of an expanded path.
Rank = tuple[int, int, tuple[int, int], int, tuple[int | str, ...]]


@dataclass(frozen=True, slots=True)
class ModelMap:
    """The parts of a model and the order in which they run, as plain data that a capture may keep."""

    atlas: Atlas
    order: Order
    _plans: dict[tuple[str, ...], Arranged] = field(default_factory=dict, repr=False)

    def rank(self, path: Path) -> Rank:
        """The sort key of an expanded path: by the forward pass, then within one value, then by position."""
        site = path.site
        check_calls(self.atlas, self.order, path)
        within = (site.item or 0, site.columns or (-1, -1), -1 if site.index is None else site.index)
        return (self.order.rank(site), *within, position_rank(path.position))

    def arrange(self, paths: tuple[str | Path, ...]) -> Arranged:
        """The sites of these paths in execution order; a site that is named twice is returned twice."""
        # By their texts: paths expanded by another model may be equal and mean different sites here.
        texts = tuple(map(str, paths))
        if texts not in self._plans:
            for path in map(parse_path, paths):
                if path.key is not None:
                    raise PathError(
                        "an edge of attention has no value of its own to be read or written",
                        path=path,
                        expected="the pattern of a query, or a knockout of the edge",
                        write=f'{replace(path, key=None)}, or operation="knockout"',
                    )
            expanded = [self.atlas.expand(parse_path(path)) for path in paths]
            found = [(place, number) for number, places in enumerate(expanded) for place in places]
            if len(self._plans) > 512:  # a sweep expands thousands of lists, and only the last few again
                self._plans.clear()
            self._plans[texts] = sorted(found, key=lambda pair: self.rank(pair[0]))
        return self._plans[texts]


_maps: weakref.WeakKeyDictionary[nn.Module, tuple[int, ModelMap]] = weakref.WeakKeyDictionary()


def map_of(model: object, probe: Any = None) -> ModelMap:
    """The map of a model, read again when its structure has changed."""
    root = unwrap(model)
    now = fingerprint(root)
    found = _maps.get(root)
    if found is None or found[0] != now:
        atlas, order = Atlas.of(root), order_of(model, probe)
        found = _maps[root] = (now, ModelMap(checked_atlas(atlas, order), order))
    return found[1]
