"""`outline`: the sites of a model from its atlas, without a forward pass.

The names come from the tables of the address language, so new sites are listed automatically. Sites that a model does
not have (the gate of an MLP without one) are left out; sites without an exact value are listed with the reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from nnsplice.atlas import Atlas, Block, Site, Tower
from nnsplice.atlas.roles import COUNTED, INSIDE_ATTN, INSIDE_LAYER, INSIDE_MLP, VALUES
from nnsplice.atlas.sites import count
from nnsplice.errors import RefusedPlace, UnknownPath
from nnsplice.paths import Index, Path, Step

#: The parts of each part of a layer.
_INSIDE = {"attn": INSIDE_ATTN, "cross": INSIDE_ATTN, "mlp": INSIDE_MLP}
#: The names that may follow `layers[i]`: none, a part, a part of a part.
IN_LAYER: tuple[tuple[str, ...], ...] = (
    (),
    *(names for part in INSIDE_LAYER for names in ((part,), *((part, inner) for inner in _INSIDE.get(part, ())))),
)
#: The sites before and after the layers.
BEFORE, AFTER = (("embed",),), (("final_norm",), ("unembed",))
#: Sites that are the output of one matrix; all others have the width of the residual stream.
_PROJECTIONS = frozenset((*INSIDE_ATTN, *INSIDE_MLP, "unembed"))


@dataclass(frozen=True, slots=True)
class OutlineValue:
    """One value of a site."""

    name: str
    #: The width; None if unknown, and for an attention pattern, whose width is the length of the prompt.
    width: int | None = None
    #: Why it is refused; empty if it can be read.
    refused: str = ""


@dataclass(frozen=True, slots=True)
class OutlinePart:
    """One site, by the names that follow `layers[i]`, or its own name outside of the layers."""

    names: tuple[str, ...]
    values: tuple[OutlineValue, ...]
    #: The number of heads, groups, neurons or experts.
    count: int | None = None


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Layers with equal parts."""

    numbers: tuple[int, ...]
    parts: tuple[OutlinePart, ...]


@dataclass(frozen=True, slots=True)
class Outline:
    """The sites of one tower."""

    name: str
    before: tuple[OutlinePart, ...]
    layers: tuple[LayerGroup, ...]
    after: tuple[OutlinePart, ...]


def outline(atlas: Atlas, *, collapse: bool = True) -> tuple[Outline, ...]:
    """The sites of a model, tower by tower.

    >>> from nnsplice.checks import outline
    >>> (tower,) = outline(ns.Atlas.of(model))
    >>> [(layers.numbers, layers.parts[0].values[0].width) for layers in tower.layers]
    [((0, 1, 2), 16)]

    Args:
        atlas: `ns.Atlas.of(model)`.
        collapse: group layers with equal parts.

    Returns:
        One outline for each tower.

    Raises:
        UnrecognisedModel: the layers of the model are not recognised.
    """
    atlas.tower()
    return tuple(_outline(atlas, tower, collapse) for tower in atlas.towers.values())


def _outline(atlas: Atlas, tower: Tower, collapse: bool) -> Outline:
    groups: dict[object, LayerGroup] = {}
    for block in tower.blocks:
        # A mixer that is attention is listed as `attn` only.
        listed = [names for names in IN_LAYER if names != ("mixer",) or not block.has_attention]
        parts = tuple(_parts(atlas, tower, block, listed))
        key = parts if collapse else block.index
        before = groups[key].numbers if key in groups else ()
        groups[key] = LayerGroup((*before, block.index), parts)
    ends = (tuple(_parts(atlas, tower, None, names)) for names in (BEFORE, AFTER))
    return Outline(tower.name, next(ends), tuple(groups.values()), next(ends))


def place_of(tower: str, names: tuple[str, ...], value: str, layers: Index | None, inner: Index = 0) -> Path:
    """The path of one value of a part.

    Args:
        layers: the layers; None for a part outside of them.
        inner: the index of the head, group, neuron or expert.
    """
    steps = [Step(name, inner if name in COUNTED else None) for name in names]
    front = () if layers is None else (Step("layers", layers),)
    return Path((*front, *steps), tower="encoder" if tower == "encoder" else None, value=value)


def _parts(atlas: Atlas, tower: Tower, block: Block | None, every: Iterable[tuple[str, ...]]) -> Iterator[OutlinePart]:
    for names in every:
        role = names[-1] if names else "layers"
        found = [_value(atlas, tower, block, names, value) for value in VALUES.get(role, ("output",))]
        values = tuple(value for value in found if value is not None)
        if values:
            yield OutlinePart(names, values, _count(tower, block, names))


def _count(tower: Tower, block: Block | None, names: tuple[str, ...]) -> int | None:
    if block is None or not names or names[0] not in COUNTED:
        return None
    try:
        return count(place_of(tower.name, names, "output", block.index), block, names[0])
    except RefusedPlace:
        return None


def _value(atlas: Atlas, tower: Tower, block: Block | None, names: tuple[str, ...], name: str) -> OutlineValue | None:
    """A value of a site with its width; None if the model has no such site."""
    try:
        (path,) = atlas.expand(place_of(tower.name, names, name, None if block is None else block.index))
    except UnknownPath:
        return None
    except RefusedPlace as error:
        return OutlineValue(name, refused=_brief(str(error).splitlines()[0], block))
    assert isinstance(path.site, Site)
    return OutlineValue(name, _width(atlas, tower, path.site, names[-1] if names else "layers"))


def _brief(reason: str, block: Block | None) -> str:
    """A reason without the index of the layer, so that it is the same in equal layers."""
    if block is None:
        return reason
    return (
        reason.replace(f" of layer {block.index} ", " ")
        .replace(f"layer {block.index} ", "")
        .replace(f"{block.module}.", "")
    )


def _width(atlas: Atlas, tower: Tower, site: Site, role: str) -> int | None:
    if site.kind == "pattern":
        return None
    if site.columns is not None:
        return site.columns[1] - site.columns[0]
    if role in _PROJECTIONS:
        shape = atlas.tree.weight(site.module)
        return shape[0] if shape else None
    return stream_width(atlas, tower)


def stream_width(atlas: Atlas, tower: Tower) -> int | None:
    """The width of a tower's residual stream, from its output projections."""
    shapes = (atlas.tree.weight(block.o) for block in tower.blocks if block.o is not None)
    return next((shape[0] for shape in shapes if shape), None)


def narrow(atlas: Atlas, outlines: Iterable[Outline], path: Path) -> tuple[Outline, ...]:
    """The parts of outlines under a portable path.

    Raises:
        UnknownPath: there is no such part.
        PathError: the path is out of range or refused.
    """
    wanted = atlas.tower(path).name
    names = tuple(step.name for step in path.steps)
    found = tuple(_narrowed(atlas, tower, path, names) for tower in outlines if tower.name == wanted)
    if not any(tower.before or tower.layers or tower.after for tower in found):
        atlas.expand(path)  # raises the error of this path
        raise UnknownPath("nothing is here", path=path)
    return found


def _narrowed(atlas: Atlas, tower: Outline, path: Path, names: tuple[str, ...]) -> Outline:
    if names[0] != "layers":
        ends = (tuple(_values_of(parts, path, names)) for parts in (tower.before, tower.after))
        return Outline(tower.name, next(ends), (), next(ends))
    chosen = {place.steps[0].index for place in atlas.expand(place_of(tower.name, (), "output", path.steps[0].index))}
    layers: list[LayerGroup] = []
    for group in tower.layers:
        numbers = tuple(number for number in group.numbers if number in chosen)
        parts = tuple(_values_of(group.parts, path, names[1:]))
        if numbers and parts:
            _check_inner(atlas, tower, numbers[0], parts[0], path)
            layers.append(LayerGroup(numbers, parts))
    return Outline(tower.name, (), tuple(layers), ())


def _values_of(parts: Iterable[OutlinePart], path: Path, names: tuple[str, ...]) -> Iterator[OutlinePart]:
    for part in parts:
        if part.names[: len(names)] != names:
            continue
        values = tuple(value for value in part.values if path.value in (None, value.name))
        if path.value is None or (values and part.names == names):
            yield OutlinePart(part.names, values, part.count)


def _check_inner(atlas: Atlas, tower: Outline, layer: int, part: OutlinePart, path: Path) -> None:
    """Raise for a head, group, neuron or expert that does not exist."""
    if part.count is not None and path.steps[-1].index is not None:
        value = next((value.name for value in part.values if not value.refused), part.values[0].name)
        atlas.expand(place_of(tower.name, part.names, value, layer, path.steps[-1].index))
