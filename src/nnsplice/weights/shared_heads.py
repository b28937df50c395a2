"""The weights of a head that no other head reads, in models where several heads share one key/value head.

The mask of such a head includes the shared keys and values (`create_param_masks`), as its output depends on them. But
to ablate or swap them changes the other heads of the group too. So `swap`, `ablate` and the like take the head's own
weights (queries, the columns of the output projection, gates, sinks), and the shared ones with the whole group: by its
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

#: A group of heads: the path of its layer, its number, and the value (`None` for all).
_Group = tuple[Path, int, str | None]


def own_parts(atlas: Atlas, asked: Sequence[tuple[Path | None, Selection]]) -> list[Selection]:
    """The weights of some addresses; of heads without the shared ones, unless all heads of the group are selected.

    Args:
        asked: paths with their selections; None instead of a path for the name of a parameter.
    """
    found: list[Selection] = []
    groups: dict[_Group, dict[int, Path]] = {}
    for path, selection in asked:
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
    """The weights that every head of a group reads; all of them if a group is one head."""
    layer, _, value = group
    return reduce(and_, (atlas.resolve(_head(layer, head, value)) for head in _heads_of(atlas, group)))


def shared_groups(atlas: Atlas, place: Path) -> list[tuple[Path, Selection]]:
    """The groups of several heads that some heads belong to, with the weights that their heads share."""
    found = dict.fromkeys(_group_of(atlas, one)[0] for one in atlas.split(place))
    several = [group for group in found if len(_heads_of(atlas, group)) > 1]
    return [(_group(layer, number, value), shared(atlas, (layer, number, value))) for layer, number, value in several]


def notes(atlas: Atlas, parts: Mapping[str, ParameterSlice | Tensor]) -> Iterator[str]:
    """A sentence for each group whose keys or values are among these numbers, with some of its heads and not all.

    Args:
        parts: the model's own name of a parameter -> ranges, a mask, or None for all of it.
    """
    for tower in atlas.towers.values():
        front = f"{tower.name}." if len(atlas.towers) > 1 and tower.name == "encoder" else ""
        for block in tower.blocks:
            below = tuple(f"{module}." for module in block.modules)
            if block.n_heads == block.n_kv or all(part is None for n, part in parts.items() if n.startswith(below)):
                continue
            for number in range(block.n_kv):
                layer = _layer(front, block.index)
                group = (layer, number, None)
                common, heads = shared(atlas, group), _heads_of(atlas, group)
                if not _meets(parts, common):
                    continue
                inside = [h for h in heads if _meets(parts, atlas.resolve(_head(layer, h, None)) - common)]
                if 0 < len(inside) < len(heads):
                    yield (
                        f"{_group(layer, number, None)} has keys and values that heads {_listed(heads)} read together, "
                        f"and they are here with {_which(inside)} only; swap, ablate and the like take the address "
                        f"{_head(layer, inside[0], None)} without them, and {_group(layer, number, None)} whole"
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


def _layer(front: str, index: int) -> Path:
    return parse_path(f"{front}layers[{index}]")


def _head(layer: Path, head: int, value: str | None) -> Path:
    return replace(layer, steps=(*layer.steps, replace(layer.steps[0], name="heads", index=head)), value=value)


def _group(layer: Path, number: int, value: str | None) -> Path:
    return replace(layer, steps=(*layer.steps, replace(layer.steps[0], name="groups", index=number)), value=value)


def _meets(parts: Mapping[str, ParameterSlice | Tensor], selection: Selection) -> bool:
    """Whether a selection has any of these numbers."""
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


def _which(heads: Sequence[int]) -> str:
    return f"head{'s' if len(heads) > 1 else ''} {_listed(heads)}"
