"""Portable paths -> sites: the module and end that hold a value."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from nnsplice.atlas.block import Block, Tower, TowerName
from nnsplice.atlas.indices import column, resolve_index
from nnsplice.atlas.model_parts import ModelParts
from nnsplice.atlas.refusals import edges_between_towers, missing_part, no_attention, reads_other, stacked_place
from nnsplice.atlas.roles import COUNTED, VALUES, PathRole, role_of
from nnsplice.atlas.site import Site, native_text
from nnsplice.errors import PathError, RefusedPlace, UnknownPath
from nnsplice.paths.path import WEIGHT_VALUES, Path, Step


def expand_portable(atlas: ModelParts, path: Path) -> Iterator[Path]:
    """Every concrete path that a portable path means, in numeric order."""
    tower = atlas.tower(path)
    form = role_of(path)
    if form.value in WEIGHT_VALUES or form.role == "full":
        raise PathError(
            f"{path} names parameters, not an activation", path=path, expected="an activation such as .output"
        )
    value = form.value or "output"
    if form.role in ("groups", "cross.groups") and value == "output":
        raise RefusedPlace(
            "a group has no output of its own: its keys and values are shared by heads",
            path=path,
            write=f"{path.place if path.value is None else replace(path.place, value=None)}.v",
        )
    _check_value(path, form, value)
    if form.role == "cross.heads" and path.key is not None:
        raise edges_between_towers(path)
    if form.role in ("embed", "final_norm", "unembed"):
        yield replace(path, value="output", site=_model_site(tower, path, form.role))
        return
    for layer in resolve_index(path, 0, tower.n_layers, "layer", atlas.tower_phrase(tower)):
        block = attended(path, tower.blocks[layer])
        steps = [Step("layers", layer), *path.steps[1:]]
        if form.counted is None:
            site = _block_site(path, tower, block, "attn" if form.role == "cross" else form.role, value)
            yield replace(path, steps=tuple(steps), value=value, site=site)
            continue
        name = steps[1].name
        length = count(path, block, form.role)
        shown = f"layers[{layer}].{name}"
        for index in resolve_index(path, 1, length, COUNTED[name], f"layer {layer}", shown):
            steps[1] = Step(name, index)
            site = _counted_site(path, tower, block, name.removeprefix("cross."), index, value)
            yield replace(path, steps=tuple(steps), value=value, site=site)


def attended(path: Path, block: Block) -> Block:
    """The block that a path of a layer names: the layer, or its cross-attention."""
    if block.key_tower is not None or len(path.steps) < 2 or path.steps[1].name.partition(".")[0] != "cross":
        return block
    if block.cross is not None:
        return block.cross
    raise (RefusedPlace if block.has_cross else UnknownPath)(
        f"the parts of the cross-attention of layer {block.index} are not known"
        if block.has_cross
        else f"layer {block.index} attends to no other tower",
        path=path,
        column=column(path, 1),
        expected="the attention by the model's own names" if block.has_cross else "a decoder's layer beside an encoder",
    )


def _home(path: Path) -> str:
    """The prefix of heads and groups in a path."""
    return "cross." if len(path.steps) > 1 and path.steps[1].name.startswith("cross") else ""


def _last(path: Path, word: str) -> int | None:
    """The column of a value's name; None if the text does not have it."""
    at = str(path).rfind(word)
    return at if at >= 0 else None


def _check_value(path: Path, form: PathRole, value: str) -> None:
    allowed = VALUES.get(form.role, ("output",))
    if value not in allowed:
        raise UnknownPath(
            f"{form.role} has no value {value}",
            path=path,
            column=_last(path, value),
            expected=", ".join(f".{name}" for name in allowed),
        )


def _model_site(tower: Tower, path: Path, role: str) -> Site:
    if role == "embed":
        # Positions, norms and scales before the first layer are part of the embedding.
        return Site(tower.blocks[0].module, "input", tower=tower.name)
    module = tower.final_norm if role == "final_norm" else tower.unembed
    if module is None:
        raise UnknownPath(f"this model has no {role}", path=path, column=column(path, 0))
    return Site(module, "output", tower=tower.name)


def count(path: Path, block: Block, name: str) -> int:
    """The number of heads, groups, experts or neurons of a layer; an error if it cannot have them."""
    at, block, name = column(path, 1), attended(path, block), name.removeprefix("cross.")
    if name in ("heads", "groups"):
        if not block.has_attention:
            raise no_attention(path, block)
        if block.layout is None:
            raise RefusedPlace(
                f"the heads of layer {block.index} cannot be told apart: "
                + (block.mixed or f"their number is unknown, or does not fit the shape of {block.o}"),
                path=path,
                column=at,
            )
        return block.n_heads if name == "heads" else block.n_kv
    if name == "experts":
        if not block.is_sparse:
            raise UnknownPath(f"layer {block.index} has no experts: its MLP is dense", path=path, column=at)
        return block.n_experts
    if block.is_sparse:
        raise RefusedPlace(
            f"layer {block.index} has a mixture of experts, whose neurons differ from token to token",
            path=path,
            column=at,
            write=f"layers[{block.index}].experts[0]",
        )
    if block.down is None and "down" not in block.stacked:
        raise UnknownPath(f"layer {block.index} has no neurons that can be told apart", path=path, column=at)
    return block.n_neurons


def _block_site(path: Path, tower: Tower, block: Block, role: str, value: str) -> Site:
    """The site of a role that a layer has once."""
    if role == "layers":
        return _stream_site(path, tower, block, value)
    if role in ("attn", "mlp", "mixer"):
        return _branch_site(path, tower, block, role)
    return _projection_site(path, tower, block, role)


def _stream_site(path: Path, tower: Tower, block: Block, value: str) -> Site:
    """The residual stream before, within or after a layer."""
    common = {"occurrence": block.occurrence, "tower": tower.name}
    if value != "mid":
        module = block.end if value == "output" and block.end else block.module
        return Site(module, value, **common)  # pyright: ignore[reportArgumentType]
    if block.mid is None:
        reason = (
            f"layer {block.index} has one branch, so nothing lies between two"
            if block.mlp is None or block.only_mlp
            else f"layer {block.index} runs attention and MLP in parallel: there is no stream between them"
            if block.parallel
            else f"where the stream of layer {block.index} passes from attention to the MLP is not known"
        )
        raise RefusedPlace(reason, path=path, column=_last(path, "mid"), write=f"layers[{block.index}].input")
    return Site(*block.mid, kind=block.mid_kind, **common)


def _branch_site(path: Path, tower: Tower, block: Block, role: str) -> Site:
    """The value that attention, a mixer or an MLP adds to the stream."""
    module = {"attn": block.attn_added, "mlp": block.mlp_added, "mixer": block.mixer_added}[role]
    at = column(path, 1)
    if role == "mixer" and block.mixes is None and module is None:
        having = [str(one.index) for one in tower.blocks if one.mixes is not None]
        raise UnknownPath(
            f"layer {block.index} is an MLP alone, in which no token sees another"
            if block.only_mlp
            else f"what mixes tokens in layer {block.index} is not known",
            path=path,
            column=at,
            write=f"layers[{','.join(having)}{',' * (len(having) == 1)}].mixer.output" if having else None,
        )
    if role == "attn" and not block.has_attention:
        raise no_attention(path, block)
    if role == "mlp" and block.mlp is None:
        raise UnknownPath(f"layer {block.index} has no MLP", path=path, column=at)
    if module is None:
        raise RefusedPlace(
            f"no module's output is what {role} of layer {block.index} adds to the stream", path=path, column=at
        )
    if block.scale != 1.0:
        raise RefusedPlace(
            f"layer {block.index} multiplies what {role} adds by {block.scale:g} in code, so no module's output is "
            "what is added to the stream",
            path=path,
            column=at,
            expected=f"the unscaled value, natively: model.{native_text(module)}.output",
        )
    return Site(module, "output", occurrence=block.occurrence, tower=tower.name)


def _projection_site(path: Path, tower: Tower, block: Block, role: str) -> Site:
    """The output of a projection of attention or of a part of the MLP."""
    if role in block.stacked:
        raise stacked_place(path, block, role)
    columns, tokens_of = None, tower.name
    if role in ("q", "k", "v", "o") and not block.has_attention:
        raise no_attention(path, block)
    if role in ("k", "v") and block.kv_layer is not None:
        raise reads_other(path, block, role)
    if role in ("q", "k", "v"):
        module, columns = _projected(path, block, role)
        tokens_of = _tower_of(tower, block, role)
    elif role in ("gate", "up") and block.gate_up:
        module, half = block.gate_up, block.n_neurons
        columns = (0, half) if role == "gate" else (half, 2 * half)
    else:
        module = {"o": block.o, "gate": block.gate, "up": block.up, "down": block.down, "router": block.router}[role]
    if module is None:
        raise missing_part(path, block, role)
    return Site(module, "output", columns=columns, occurrence=block.occurrence, tower=tokens_of)


def _projected(path: Path, block: Block, role) -> tuple[str | None, tuple[int, int] | None]:
    module = block.projection(role)
    if not block.shares(role):
        return module, None
    ranges = block.layout.whole(role) if block.layout else ()
    if len(ranges) != 1:
        part = "heads" if role == "q" else "groups"
        beside = "q and a gate" if role == "q" else "k and v"
        raise RefusedPlace(
            f"{role} of layer {block.index} is not one stretch of {module}: heads alternate between "
            f"{'q, k and v' if block.fused else beside}",
            path=path,
            column=column(path, 2),
            write=f"layers[{block.index}].{_home(path)}{part}[:].{role}",
        )
    return module, ranges[0]


def _counted_site(path: Path, tower: Tower, block: Block, name: str, index: int, value: str) -> Site:
    """The site of one head, group, expert or neuron."""
    common = {"occurrence": block.occurrence, "tower": tower.name}
    if block.stacked:
        raise stacked_place(path, block, name)
    if name == "neurons":
        assert block.down is not None
        return Site(block.down, "input", columns=(index, index + 1), **common)
    if name == "experts":
        assert block.experts is not None and block.mlp is not None
        return Site(_expert_home(block), "input", kind="expert", index=index, **common)
    layout = block.layout
    assert layout is not None and block.o is not None
    if value == "pattern":
        if block.pattern is None:
            raise RefusedPlace(f"layer {block.index} has no module that returns its probabilities", path=path)
        module, item = block.pattern
        return Site(module, "output", item=item, kind="pattern", index=index, **common)
    if value == "output":
        return Site(block.o, "input", columns=(index * layout.head_dim, (index + 1) * layout.head_dim), **common)
    if value in ("gate", "ungated"):
        gate = block.gate_of(index)
        if gate is None:
            raise UnknownPath(
                f"the heads of layer {block.index} have no gates",
                path=path,
                column=_last(path, value),
                write=str(replace(path, value="output")) if value == "ungated" else None,
            )
        if value == "gate":
            return Site(gate[0], "output", columns=gate[1], **common)
        columns = (index * layout.head_dim, (index + 1) * layout.head_dim)
        return Site(block.o, "input", columns=columns, kind="ungated", index=index, **common)
    if name == "heads" and value != "q" and layout.n_kv != layout.n_heads:
        group = layout.group_of(index)
        raise RefusedPlace(
            f"layer {block.index} has {layout.n_kv} key/value heads for {layout.n_heads} heads: "
            f"head {index} reads group {group}",
            path=path,
            column=column(path, 1),
            write=f"layers[{block.index}].{_home(path)}groups[{group}].{value}",
        )
    if value in ("k", "v") and block.kv_layer is not None:
        raise reads_other(path, block, value)
    module = block.projection(value)
    assert module is not None
    common["tower"] = _tower_of(tower, block, value)
    return Site(module, "output", columns=layout.range(value, index), **common)  # pyright: ignore[reportArgumentType]


def _tower_of(tower: Tower, block: Block, role: str) -> TowerName:
    """The tower whose tokens a projection reads."""
    return tower.name if role == "q" or block.key_tower is None else block.key_tower


def _expert_home(block: Block) -> str:
    """The module at which an expert is read: the module of all experts, or the MLP if each is a module."""
    assert block.experts is not None and block.mlp is not None
    return block.mlp if block.experts_are_modules else block.experts
