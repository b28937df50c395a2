"""A head's own weights in models with grouped-query attention, where several heads share one key/value head.

The mask of a head includes the shared keys and values (`create_param_masks`), as its output depends on them. But
changing these affects the other heads of the group too. So `swap`, `ablate` and the like select the head's own weights
(queries, columns of the output projection, gates, sinks), and the shared ones only with the whole group: by its
address, or if all of its heads are selected together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from operator import and_

from torch import Tensor

from nnsplice.atlas import Atlas, ParameterSlice, Selection
from nnsplice.errors import BadArgument
from nnsplice.paths import Path, parse_path

#: A group of heads: the path of its layer, its index, and the value (`q`, `k`, ...; None for all weights).
_Group = tuple[Path, int, str | None]


def own_parts(atlas: Atlas, wanted: Sequence[tuple[Path | None, Selection]]) -> list[Selection]:
    """The weights of some addresses: for heads without shared ones, unless all heads of the group are selected.

    Args:
        wanted: paths with their selections; None instead of a path for a parameter name.
    """
    found: list[Selection] = []
    groups: dict[_Group, dict[int, Path]] = {}
    for path, selection in wanted:
        if path is None or not _of_heads(path):
            found.append(selection)
            continue
        for place in atlas.split(path):
            group, head = _group_of(atlas, place)
            groups.setdefault(group, {})[head] = place
    for group, places in groups.items():
        heads = _heads_of(atlas, group)
        whole = [atlas.resolve(place) for place in places.values()]
        if len(places) == len(heads):
            found += whole
            continue
        common = shared(atlas, group)
        found += [selection - common for selection in whole]
        if not any(map(len, found[-len(whole) :])):
            layer, number, value = group
            raise BadArgument(
                f"{next(iter(places.values()))} is no head's own: heads {_listed(heads)} read it together",
                expected="what is the head's own (q, o), or the whole group",
                write=f"{layer}.groups[{number}]" + (f".{value}" if value else ""),
            )
    return found


def shared(atlas: Atlas, group: _Group) -> Selection:
    """The weights that all heads of a group read; all its weights if the group is one head."""
    layer, _, value = group
    return reduce(and_, (atlas.resolve(_head_path(layer, head, value)) for head in _heads_of(atlas, group)))


def shared_groups(atlas: Atlas, place: Path) -> list[tuple[Path, Selection]]:
    """The groups of several heads that some heads belong to, with the weights that their heads share."""
    found = dict.fromkeys(_group_of(atlas, one)[0] for one in atlas.split(place))
    several = [group for group in found if len(_heads_of(atlas, group)) > 1]
    return [
        (_group_path(layer, number, value), shared(atlas, (layer, number, value))) for layer, number, value in several
    ]


def notes(atlas: Atlas, parts: Mapping[str, ParameterSlice | Tensor]) -> Iterator[str]:
    """A note for each group whose keys or values are selected together with some, but not all, of its heads.

    Args:
        parts: parameter name -> ranges, a mask, or None for all of it.
    """
    for tower in atlas.towers.values():
        front = f"{tower.name}." if len(atlas.towers) > 1 and tower.name == "encoder" else ""
        for block in tower.blocks:
            below = tuple(f"{module}." for module in block.modules)
            if block.n_heads == block.n_kv or all(part is None for n, part in parts.items() if n.startswith(below)):
                continue
            for number in range(block.n_kv):
                layer = parse_path(f"{front}layers[{block.index}]")
                group = (layer, number, None)
                common, heads = shared(atlas, group), _heads_of(atlas, group)
                if not _overlaps(parts, common):
                    continue
                inside = [h for h in heads if _overlaps(parts, atlas.resolve(_head_path(layer, h, None)) - common)]
                if 0 < len(inside) < len(heads):
                    path = _group_path(layer, number, None)
                    yield (
                        f"{path} has keys and values that heads {_listed(heads)} read together, and they are here with "
                        f"head{'s' * (len(inside) > 1)} {_listed(inside)} only; swap, ablate and the like take the "
                        f"address {_head_path(layer, inside[0], None)} without them, and {path} whole"
                    )


def _of_heads(path: Path) -> bool:
    return not path.native and len(path.steps) > 1 and path.steps[1].name == "heads"


def _group_of(atlas: Atlas, place: Path) -> tuple[_Group, int]:
    """The group of a single head, and the head's number."""
    layer, head = (step.index for step in place.steps)
    assert isinstance(layer, int) and isinstance(head, int)
    layout = atlas.tower(place).blocks[layer].layout
    assert layout is not None
    value = None if place.value == "output" else place.value
    tower = None if place.tower == "decoder" else place.tower
    return (replace(place, steps=place.steps[:1], value=None, tower=tower), layout.group_of(head), value), head


def _heads_of(atlas: Atlas, group: _Group) -> range:
    layer, number, _ = group
    index = layer.steps[0].index
    assert isinstance(index, int)
    layout = atlas.tower(layer).blocks[index].layout
    assert layout is not None
    return layout.heads_of(number)


def _head_path(layer: Path, head: int, value: str | None) -> Path:
    return replace(layer, steps=(*layer.steps, replace(layer.steps[0], name="heads", index=head)), value=value)


def _group_path(layer: Path, number: int, value: str | None) -> Path:
    return replace(layer, steps=(*layer.steps, replace(layer.steps[0], name="groups", index=number)), value=value)


def _overlaps(parts: Mapping[str, ParameterSlice | Tensor], selection: Selection) -> bool:
    """Whether a selection overlaps these parts."""
    for name in selection:
        if name not in parts:
            continue
        held, part = parts[name], selection.parts[name]
        if not isinstance(held, Tensor):
            one = Selection.of({name: held}, selection.universe)
            if len(one & Selection.of({name: part}, selection.universe)):
                return True
        elif part is None:
            return bool(held.any())
        elif any(bool(held.narrow(part[0], start, stop - start).any()) for start, stop in part[1]):
            return True
    return False


def _listed(heads: Sequence[int]) -> str:
    shown = [str(head) for head in heads]
    return f"{', '.join(shown[:-1])} and {shown[-1]}" if len(shown) > 1 else shown[0]
