"""Paths -> parameters: which tensors, and which rows or columns of them, belong to a site."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from nnsplice.atlas import families as rows
from nnsplice.atlas.attached import refuse_part
from nnsplice.atlas.block import Block
from nnsplice.atlas.indices import at, column, resolve_index
from nnsplice.atlas.layouts import ROLES, Role
from nnsplice.atlas.model_parts import ModelParts
from nnsplice.atlas.native import follow
from nnsplice.atlas.ownership import per_head, unclaimed, whole_names
from nnsplice.atlas.refusals import missing_part, no_attention, reads_other
from nnsplice.atlas.roles import COUNTED, role_of
from nnsplice.atlas.selection import ParameterSlice, Ranges, Selection, join
from nnsplice.atlas.sites import attended, count
from nnsplice.atlas.tree import is_norm
from nnsplice.errors import PathError, RefusedPlace, UnknownPath
from nnsplice.paths.path import Path

#: One parameter by its first name, and what of it.
Piece = tuple[str, ParameterSlice]


def resolve(atlas: ModelParts, path: Path) -> Selection:
    """The parameters of a site, sought once. See `Atlas.resolve`."""
    found = atlas.selections.get(path)
    if found is None:
        found = atlas.selections[path] = _resolve(atlas, path)
    return found


def _resolve(atlas: ModelParts, path: Path) -> Selection:
    """The same, sought anew."""
    refuse_part(path)
    if path.position is not None:
        raise PathError(
            "parameters have no tokens",
            path=path,
            column=str(path).rfind("["),
            write=str(replace(path, position=None, item=None, value=None if path.value == "output" else path.value)),
        )
    pieces = (
        _native(atlas, path) if path.native else (piece for place in split(atlas, path) for piece in _one(atlas, place))
    )
    shapes = atlas.tree.params
    found: dict[str, ParameterSlice] = {}
    for name, part in pieces:
        if path.value in ("weight", "bias") and (name.rpartition(".")[2].endswith("bias")) != (path.value == "bias"):
            continue
        found[name] = join(name, found[name], part) if name in found else part
    if not found:
        what = f"no {path.value}" if path.value in ("weight", "bias") else "no parameters"
        raise UnknownPath(f"{replace(path, value=None)} has {what} in this model", path=path)
    return Selection.of({name: found[name] for name in sorted(found, key=atlas.rank)}, shapes)


def _native(atlas: ModelParts, path: Path) -> Iterator[Piece]:
    for found in follow(atlas, path):
        if found.parameter is not None:
            yield atlas.tree.nodes[found.module].params[found.parameter][0], None
            continue
        # `q_proj.weight` of a layer that an adapter wrapped is the layer's own.
        owner = atlas.tree.owner(found.module) if path.value in ("weight", "bias") else None
        entry = owner.params.get(str(path.value)) if owner else None
        if entry is not None:
            yield entry[0], None
        elif path.value not in ("weight", "bias"):
            yield from whole(atlas, found.module)


def split(atlas: ModelParts, path: Path) -> Iterator[Path]:
    """The single sites of a model that a path means. See `Atlas.split`."""
    refuse_part(path)
    if path.native:
        yield from (replace(path, steps=found.steps) for found in follow(atlas, path))
        return
    form = role_of(path)
    if form.role == "full":
        yield path
        return
    if path.value in ("input", "mid", "ungated", "pattern"):
        raise PathError(
            f".{path.value} is an activation: no parameters belong to it",
            path=path,
            column=str(path).rfind(path.value),
            write=str(replace(path, value=None)),
        )
    tower = atlas.tower(path)
    if form.role in ("embed", "final_norm", "unembed"):
        if getattr(tower, form.role) is None:
            raise UnknownPath(f"this model has no {form.role}", path=path, column=column(path, 0))
        yield path
        return
    for layer in resolve_index(path, 0, tower.n_layers, "layer", atlas.tower_phrase(tower)):
        steps = [at(path.steps[0], layer), *path.steps[1:]]
        if form.counted is None:
            yield replace(path, steps=tuple(steps))
            continue
        name = path.steps[1].name
        shown = f"layers[{layer}].{name}"
        length = count(path, tower.blocks[layer], name)
        for index in resolve_index(path, 1, length, COUNTED[name], f"layer {layer}", shown):
            yield replace(path, steps=(steps[0], at(path.steps[1], index)))


def _one(atlas: ModelParts, path: Path) -> Iterator[Piece]:
    """What belongs to one site."""
    form = role_of(path)
    if form.role == "full":
        yield from ((name, None) for name in atlas.tree.params)
        return
    tower = atlas.tower(path)
    if form.role in ("embed", "final_norm", "unembed"):
        yield from whole(atlas, getattr(tower, form.role))
        return
    layer, *inner = (step.index for step in path.steps)
    assert isinstance(layer, int)
    block = attended(path, tower.blocks[layer])
    if form.counted is None:
        yield from _part(atlas, path, block, "attn" if form.role == "cross" else form.role)
    else:
        if form.value in ("k", "v") and block.kv_layer is not None:
            raise reads_other(path, block, form.value)
        yield from _COUNTED[path.steps[1].name.removeprefix("cross.")](atlas, block, inner[0], form.value)


def whole(atlas: ModelParts, module: str) -> Iterator[Piece]:
    """Every parameter at and below a module."""
    yield from ((name, None) for name in whole_names(atlas.tree, module))


def _part(atlas: ModelParts, path: Path, block: Block, role: str) -> Iterator[Piece]:
    if role == "layers":
        for module in block.modules:
            yield from whole(atlas, module)
    elif role == "mixer" and not block.has_attention:
        if block.mixer is None:
            raise UnknownPath(f"layer {block.index} has no mixer that is known", path=path, column=column(path, 1))
        yield from whole(atlas, block.mixer)
    elif role in ("attn", *ROLES, "o") and not block.has_attention:
        raise no_attention(path, block)
    elif role in ("attn", "mixer"):
        parts = (block.q, block.k, block.v, block.fused, block.o, *block.head_gates, *block.latents)
        for module in dict.fromkeys(parts):
            if module is not None:
                yield from whole(atlas, module)
        yield from _stacked(block, (*ROLES, "o"), None)
        yield from _own(atlas, block.attn, (*rows.O_BIAS, *rows.STACKED_BIASES))
        yield from ((name, None) for name in per_head(atlas, block))
        for module, _ in block.group_rows:
            yield from whole(atlas, module)
        yield from ((name, None) for name in unclaimed(atlas, block))
    elif role in block.stacked:
        yield from _stacked(block, (role,), None)
    elif role == "mlp":
        yield from _mlp(atlas, block)
    elif role in ("k", "v") and block.kv_layer is not None:
        raise reads_other(path, block, role)
    elif role in ROLES and block.shares(role):
        module = block.projection(role)
        if block.layout is None or module is None:
            raise UnknownPath(f"{role} cannot be told apart in {module}", path=path, column=column(path, 2))
        yield from _out(atlas, module, block.layout.whole(role))
    elif role in ("gate", "up") and block.gate_up is not None:
        half = block.n_neurons
        yield from _out(atlas, block.gate_up, ((0, half),) if role == "gate" else ((half, 2 * half),))
    else:
        module = getattr(block, role)
        if module is None:
            raise missing_part(path, block, role)
        yield from whole(atlas, module)


def _mlp(atlas: ModelParts, block: Block) -> Iterator[Piece]:
    if block.mlp is not None and not block.mlp_is_bare:
        for home in (block.mlp, *block.mlp_beside):
            for name in (home, *atlas.tree.under(home)):
                if not is_norm(atlas.tree, name):
                    yield from ((full, None) for full, _ in atlas.tree.nodes[name].params.values())
        return
    for role in ("gate", "up", "down", "gate_up"):
        module = getattr(block, role)
        if module is not None:
            yield from whole(atlas, module)


def _own(atlas: ModelParts, module: str | None, names: Iterable[str]) -> Iterator[Piece]:
    """Parameters of a module itself, by name."""
    params = atlas.tree.nodes[module].params if module is not None else {}
    yield from ((params[name][0], None) for name in names if name in params)


def _stacked(block: Block, roles: Iterable[str], ranges: Ranges | None) -> Iterator[Piece]:
    """Parameters that a role is, in a block without layers for it; some of their heads or neurons, or all."""
    for role in roles:
        for name, axis in block.stacked.get(role, ()):
            yield name, None if ranges is None else (axis, ranges)


# -- slices of layers --------------------------------------------------------------------------------------------------


def _out(atlas: ModelParts, module: str, ranges: Ranges) -> Iterator[Piece]:
    """The slices of a layer's parameters that make some of its output columns."""
    tree = atlas.tree
    owner = tree.owner(module)
    for attribute, (full, shape) in owner.params.items():
        if attribute == "weight":
            yield full, (1 if tree.transposed(module) else 0, ranges)
        elif attribute == "bias" and len(shape) == 1:
            yield full, (0, ranges)
    yield from _adapter(atlas, module, ("lora_B", "lora_magnitude_vector"), 0, ranges)


def _in(atlas: ModelParts, module: str, ranges: Ranges) -> Iterator[Piece]:
    """The slices of a layer's weight that read some of its input columns; its bias belongs to none of them."""
    entry = atlas.tree.owner(module).params.get("weight")
    if entry is not None:
        yield entry[0], (0 if atlas.tree.transposed(module) else 1, ranges)
    yield from _adapter(atlas, module, ("lora_A",), 1, ranges)


def _adapter(atlas: ModelParts, module: str, kinds: Iterable[str], axis: int, ranges: Ranges) -> Iterator[Piece]:
    """Slices of the adapter factors that share the layer's axis; the other factor serves all heads alike."""
    for kind in kinds:
        home = atlas.tree.child(module, kind)
        for name, _ in whole(atlas, home) if home else ():
            if len(atlas.tree.params[name]) > axis:
                yield name, (axis, ranges)


def _heads(atlas: ModelParts, block: Block, heads: range, group: int, value: str | None) -> Iterator[Piece]:
    layout = block.layout
    assert layout is not None
    if value == "gate":
        found = [gate for gate in map(block.gate_of, heads) if gate is not None]
        for module in dict.fromkeys(module for module, _ in found):
            yield from _out(atlas, module, tuple(columns for of, columns in found if of == module))
        return
    if value not in ROLES:
        _refuse_unclaimed(atlas, block)
    wanted: dict[Role, Iterable[int]] = {"q": heads, "k": (group,), "v": (group,)}
    if block.stacked:
        for role, of in {**wanted, "o": heads}.items():
            if value in (None, "output", "weight", "bias", role):
                yield from _stacked(block, (role,), tuple((i, i + 1) for i in of))
        return
    assert block.o is not None
    for role in ROLES:
        module = block.projection(role)
        if module is not None and value in (None, "output", "weight", "bias", role):
            yield from _out(atlas, module, tuple(layout.range(role, i) for i in wanted[role]))
            gates = [layout.gate(i) for i in heads] if role == "q" and value != "q" else []
            yield from _out(atlas, module, tuple(gate for gate in gates if gate is not None)) if any(gates) else ()
    if value not in ROLES:
        d = layout.head_dim
        yield from _in(atlas, block.o, ((heads.start * d, heads.stop * d),))
        for gate in block.head_gates:
            yield from _out(atlas, gate, (_share(atlas, gate, heads, layout.n_heads),))
        for name in per_head(atlas, block):
            yield name, (0, ((heads.start, heads.stop),))
    for module, role in block.group_rows:
        if value in (None, "output", "weight", "bias", role):
            yield from _out(atlas, module, (_share(atlas, module, range(group, group + 1), layout.n_kv),))


def _refuse_unclaimed(atlas: ModelParts, block: Block) -> None:
    left = unclaimed(atlas, block)
    if left:
        raise RefusedPlace(
            f"which parameters are one head's is not known in layer {block.index}: {', '.join(left[:4])}"
            + (f" and {len(left) - 4} more" if len(left) > 4 else "")
            + " may be a part of it",
            expected="the layer's attention, or a part of the head",
            write=f"layers[{block.index}].attn",
        )


def _share(atlas: ModelParts, module: str, wanted: range, count: int) -> tuple[int, int]:
    """The rows of some heads, where a layer's rows go to all of them in equal shares."""
    each = atlas.tree.owner(module).params["weight"][1][0] // count
    return wanted.start * each, wanted.stop * each


def _head(atlas: ModelParts, block: Block, index: int, value: str | None) -> Iterator[Piece]:
    assert block.layout is not None
    return _heads(atlas, block, range(index, index + 1), block.layout.group_of(index), value)


def _group(atlas: ModelParts, block: Block, index: int, value: str | None) -> Iterator[Piece]:
    assert block.layout is not None
    return _heads(atlas, block, block.layout.heads_of(index), index, value)


def _expert(atlas: ModelParts, block: Block, index: int, value: str | None) -> Iterator[Piece]:
    node = atlas.tree.nodes[str(block.experts)]
    if block.experts_are_modules:
        yield from whole(atlas, list(node.children.values())[index])
        return
    count = block.n_experts
    for name, _ in whole(atlas, node.name):
        shape, words = atlas.tree.params[name], name.split(".")
        # An adapter's factors hold all experts: rows of A go expert by expert, columns of B rank by rank.
        if "lora_A" in words:
            rank = shape[0] // count
            yield name, (0, ((index * rank, (index + 1) * rank),))
        elif "lora_B" in words:
            yield name, (1, tuple((i, i + 1) for i in range(index, shape[1], count)))
        elif shape and shape[0] == count:
            yield name, (0, ((index, index + 1),))


def _neuron(atlas: ModelParts, block: Block, index: int, value: str | None) -> Iterator[Piece]:
    yield from _stacked(block, ("gate", "up", "down"), ((index, index + 1),))
    for role in ("gate", "up"):
        module = getattr(block, role)
        if module is not None:
            yield from _out(atlas, module, ((index, index + 1),))
    if block.gate_up is not None:
        yield from _out(atlas, block.gate_up, tuple((i, i + 1) for i in (index, index + block.n_neurons)))
    if block.down is not None:
        yield from _in(atlas, block.down, ((index, index + 1),))


_COUNTED: dict[str, Callable[..., Iterator[Piece]]] = {
    "heads": _head,
    "groups": _group,
    "experts": _expert,
    "neurons": _neuron,
}
