"""Checks of an atlas against the recorded order of modules.

checked_atlas    the atlas without its towers if the order contradicts it
check_calls      an error for a site of a layer that runs more often than the atlas knows
"""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from nnsplice.atlas import Atlas, Doubt, Order, native_text, reads_text
from nnsplice.errors import RefusedPlace
from nnsplice.paths import Path


def checked_atlas(atlas: Atlas, order: Order) -> Atlas:
    """The atlas, without towers if the order shows that its decoder may be the wrong list of blocks.

    In the right order, the embedding runs before the first layer and the unembedding after the last, and no other list
    of blocks runs between the first layer and the unembedding.
    """
    doubt = _doubt(atlas, order)
    return atlas if doubt is None else replace(atlas, towers=MappingProxyType({}), doubt=doubt)


def _doubt(atlas: Atlas, order: Order) -> Doubt | None:
    tower = atlas.towers.get("decoder")
    if tower is None:
        return None
    last = tower.blocks[-1]
    start = order.first(tower.blocks[0].module, "input")
    stop = order.ranks.get((last.end or last.module, "output", last.occurrence))
    if start is None or stop is None:
        return None  # requests for these layers raise `NeverFired`
    embed, unembed = order.first(tower.embed, "output"), order.first(tower.unembed, "input")
    if (embed is not None and embed > start) or (unembed is not None and unembed < stop):
        where = "before its embedding" if embed is not None and embed > start else "after its unembedding"
        return Doubt(f"what was taken for the layers of this model, {tower.stack}, runs {where}", (tower.stack,))
    if reads_text(tower.stack):
        return None
    known = {found.stack for found in atlas.towers.values()}
    beside = [
        stack
        for stack, modules in atlas.stacks.items()
        if stack not in known and (rank := order.first(modules[0], "input")) is not None and rank > start
        if unembed is None or rank < unembed
    ]
    if not beside:
        return None
    several = (tower.stack, *beside)
    return Doubt(f"several lists run one after the other, and each could be the layers: {', '.join(several)}", several)


def check_calls(atlas: Atlas, order: Order, path: Path) -> None:
    """Raise for a site of a layer that runs more often than the atlas knows, as a path cannot name a call.

    Raises:
        RefusedPlace: it runs several times.
    """
    module = path.site.module
    layer = atlas.layer_around(module)
    # A native path may name a module that runs several times in one call of its layer; a role has one call.
    counted = layer if path.native else module
    calls = 0 if counted is None else order.calls(counted)
    if calls in (0, 1 if layer is None else atlas.layer_modules[layer]):
        return
    raise RefusedPlace(
        f"model.{native_text(counted)} runs {calls} times in one forward pass (calls 0 to {calls - 1}), and a path "
        "does not say which is meant",
        path=path,
        expected="the call by its number, in a trace of nnsight's own",
        write=f"for call in tracer.iter[{calls - 1}]: value = model.{native_text(module)}.{path.site.end}",
    )
