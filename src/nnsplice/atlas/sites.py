"""Portable paths -> sites: the module and end that hold a value."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from nnsplice.atlas.block import Block, Tower, TowerName
from nnsplice.atlas.indices import column, resolve_index
from nnsplice.atlas.parts import Parts
from nnsplice.atlas.site import Site
from nnsplice.errors import PathError, RefusedPlace, UnknownPath, closest
from nnsplice.paths.path import WEIGHT_VALUES, Path, Step

#: What may follow `layers[i]`, and what may follow that.
INSIDE_LAYER = ("attn", "mixer", "mlp", "heads", "groups", "experts", "neurons", "cross", "cross.heads", "cross.groups")
INSIDE_ATTN = ("q", "k", "v", "o")
INSIDE_MLP = ("gate", "up", "down", "router")
#: Counted parts -> what one of them is called in a sentence.
COUNTED = {"heads": "head", "groups": "group", "experts": "expert", "neurons": "neuron"}
COUNTED |= {"cross.heads": "head", "cross.groups": "group"}
ROOTS = ("embed", "layers", "final_norm", "unembed")
#: Values of each site; a site that is not listed has only `output`.
VALUES: dict[str, tuple[str, ...]] = {
    "layers": ("input", "mid", "output"),
    "heads": ("output", "q", "k", "v", "gate", "ungated", "pattern"),
    "groups": ("k", "v"),
    "cross.heads": ("output", "q", "k", "v", "pattern"),
    "cross.groups": ("k", "v"),
}


@dataclass(frozen=True, slots=True)
class Place:
    """A portable path taken apart: what kind of site it is and where its indices stand."""

    #: The role that the site ends in: `layers`, `attn`, `q`, `heads`, ...
    role: str
    #: Number of the step that counts heads, groups, experts or neurons; None where there is none.
    counted: int | None
    value: str | None


def take_apart(path: Path) -> Place:
    """Check the words of a portable path against the language (not yet against a model)."""
    names = [step.name for step in path.steps]
    if names[0] == "full":
        return Place("full", None, path.value)
    if names[0] not in ROOTS:
        raise UnknownPath(
            f"{names[0]} is no site", path=path, column=column(path, 0), expected=closest(names[0], ROOTS)
        )
    value = path.value
    if names[0] != "layers":
        if len(names) > 1:
            raise UnknownPath(f"{names[0]} has no part {names[1]}", path=path, column=column(path, 1))
        return Place(names[0], None, value)
    if len(names) == 1:
        return Place("layers", None, value)
    _refuse_projected_heads(path, names)
    allowed = {"attn": INSIDE_ATTN, "cross": INSIDE_ATTN, "mlp": INSIDE_MLP}
    for number, name in enumerate(names[1:], start=1):
        options = INSIDE_LAYER if number == 1 else allowed.get(names[1], ()) if number == 2 else ()
        if name not in options:
            raise UnknownPath(
                f"{names[number - 1]} has no part {name}",
                path=path,
                column=column(path, number),
                expected=closest(name, options) if options else "nothing more here",
            )
    return Place(names[-1], 1 if names[1] in COUNTED else None, value)


def _refuse_projected_heads(path: Path, names: list[str]) -> None:
    if names[1] != "attn" or not set(names[2:]) & {"heads", "groups"}:
        return
    number = next(i for i, name in enumerate(names) if i > 1 and name in ("heads", "groups"))
    write = ".".join(str(step) for step in (path.steps[0], *path.steps[number:]))
    raise RefusedPlace(
        "after the output projection heads are mixed; a head's own slice lies before it",
        path=path,
        column=column(path, number),
        write=f"{write}.{path.value}" if path.value else write,
    )


def expand_portable(atlas: Parts, path: Path) -> Iterator[Path]:
    """Every concrete path that a portable path means, in numeric order."""
    tower = atlas.tower(path)
    place = take_apart(path)
    if place.value in WEIGHT_VALUES or place.role == "full":
        raise PathError(
            f"{path} names parameters, not an activation", path=path, expected="an activation such as .output"
        )
    value = place.value or "output"
    if place.role in ("groups", "cross.groups") and value == "output":
        raise RefusedPlace(
            "a group has no output of its own: its keys and values are shared by heads",
            path=path,
            write=f"{path.place if path.value is None else replace(path.place, value=None)}.v",
        )
    _check_value(path, place, value)
    if place.role == "cross.heads" and path.key is not None:
        raise edges_between_towers(path)
    if place.role in ("embed", "final_norm", "unembed"):
        yield replace(path, value="output", site=_model_site(tower, path, place.role))
        return
    for layer in resolve_index(path, 0, tower.n_layers, "layer", atlas.tower_phrase(tower)):
        block = attended(path, tower.blocks[layer])
        steps = [Step("layers", layer), *path.steps[1:]]
        if place.counted is None:
            site = block_site(path, tower, block, "attn" if place.role == "cross" else place.role, value)
            yield replace(path, steps=tuple(steps), value=value, site=site)
            continue
        name = steps[1].name
        length = count(path, block, place.role)
        shown = f"layers[{layer}].{name}"
        for index in resolve_index(path, 1, length, COUNTED[name], f"layer {layer}", shown):
            steps[1] = Step(name, index)
            site = counted_site(path, tower, block, name.removeprefix("cross."), index, value)
            yield replace(path, steps=tuple(steps), value=value, site=site)


def edges_between_towers(path: Path | str) -> RefusedPlace:
    """The error for a query and a key of two towers."""
    return RefusedPlace(
        "edges of cross-attention are not cut or read one by one",
        path=path,
        expected="the pattern of a query, whose width are the encoder's tokens",
        write=str(replace(path, key=None) if isinstance(path, Path) else path),
    )


def attended(path: Path, block: Block) -> Block:
    """The block that a path of a layer speaks of: the layer, or its attention to the encoder."""
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
    """What stands between a layer and its heads in a path."""
    return "cross." if len(path.steps) > 1 and path.steps[1].name.startswith("cross") else ""


def _last(path: Path, word: str) -> int | None:
    """The column of a value's name, where the text has it."""
    at = str(path).rfind(word)
    return at if at >= 0 else None


def _check_value(path: Path, place: Place, value: str) -> None:
    allowed = VALUES.get(place.role, ("output",))
    if value not in allowed:
        raise UnknownPath(
            f"{place.role} has no value {value}",
            path=path,
            column=_last(path, value),
            expected=", ".join(f".{name}" for name in allowed),
        )


def _model_site(tower: Tower, path: Path, role: str) -> Site:
    if role == "embed":
        # Whatever is done to the embedding before the first layer (positions, norms, scales) is part of it.
        return Site(tower.blocks[0].module, "input", tower=tower.name)
    module = tower.final_norm if role == "final_norm" else tower.unembed
    if module is None:
        raise UnknownPath(f"this model has no {role}", path=path, column=column(path, 0))
    return Site(module, "output", tower=tower.name)


def count(path: Path, block: Block, name: str) -> int:
    """How many heads, groups, experts or neurons a layer has; an error where it cannot have them."""
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


def block_site(path: Path, tower: Tower, block: Block, role: str, value: str) -> Site:
    """The index of a site in the one layer that is not counted."""
    common = {"occurrence": block.occurrence, "tower": tower.name}
    if role == "layers":
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
    if role in ("attn", "mlp", "mixer"):
        module = {"attn": block.attn_added, "mlp": block.mlp_added, "mixer": block.mixer_added}[role]
        if role == "mixer" and block.mixes is None and module is None:
            having = [str(one.index) for one in tower.blocks if one.mixes is not None]
            raise UnknownPath(
                f"layer {block.index} is an MLP alone, in which no token sees another"
                if block.only_mlp
                else f"what mixes tokens in layer {block.index} is not known",
                path=path,
                column=column(path, 1),
                write=f"layers[{','.join(having)}{',' * (len(having) == 1)}].mixer.output" if having else None,
            )
        if role == "attn" and not block.has_attention:
            raise no_attention(path, block)
        if role == "mlp" and block.mlp is None:
            raise UnknownPath(f"layer {block.index} has no MLP", path=path, column=column(path, 1))
        if module is None:
            raise RefusedPlace(
                f"no module's output is what {role} of layer {block.index} adds to the stream",
                path=path,
                column=column(path, 1),
            )
        if block.scale != 1.0:
            raise RefusedPlace(
                f"layer {block.index} multiplies what {role} adds by {block.scale:g} in code, so no module's output is "
                "what is added to the stream",
                path=path,
                column=column(path, 1),
                expected=f"the unscaled value, natively: model.{native_text(module)}.output",
            )
        return Site(module, "output", **common)
    if role in block.stacked:
        raise stacked_place(path, block, role)
    columns = None
    if role in ("q", "k", "v", "o") and not block.has_attention:
        raise no_attention(path, block)
    if role in ("k", "v") and block.kv_layer is not None:
        raise reads_other(path, block, role)
    if role in ("q", "k", "v"):
        module, columns = _projected(path, block, role)
        common["tower"] = _tower_of(tower, block, role)
    elif role == "o":
        module = block.o
    elif role in ("gate", "up") and block.gate_up:
        module, half = block.gate_up, block.n_neurons
        columns = (0, half) if role == "gate" else (half, 2 * half)
    else:
        module = {"gate": block.gate, "up": block.up, "down": block.down, "router": block.router}[role]
    if module is None:
        raise missing_part(path, block, role)
    return Site(module, "output", columns=columns, **common)


def stacked_place(path: Path, block: Block, role: str) -> RefusedPlace:
    """The error for an activation that no layer's output or input holds."""
    home = block.mlp if role in ("gate", "up", "down", "neurons") else block.attn
    return RefusedPlace(
        f"{role} of layer {block.index} are parameters of {home} itself, so no module's output is their value",
        path=path,
        column=column(path, 1),
        expected=f"one of its own modules, natively: model.{native_text(home)}....output",
    )


def reads_other(path: Path, block: Block, role: str) -> RefusedPlace:
    """The error for keys and values of a layer that reads those of an earlier one."""
    steps = (replace(path.steps[0], index=block.kv_layer), *path.steps[1:])
    return RefusedPlace(
        f"layer {block.index} has no {role} of its own: it reads the keys and values of layer {block.kv_layer}",
        path=path,
        column=column(path, 0),
        write=str(replace(path, steps=steps)),
    )


def no_attention(path: Path, block: Block) -> UnknownPath:
    """The error for a layer of another kind, in a model that mixes kinds."""
    return UnknownPath(
        f"layer {block.index} has no attention with queries, keys and values", path=path, column=column(path, 1)
    )


def missing_part(path: Path, block: Block, role: str) -> UnknownPath:
    """The error for a part of the MLP that a layer has not."""
    return UnknownPath(
        f"the MLP of layer {block.index} has no {role}" + (": it is a mixture of experts" if block.is_sparse else ""),
        path=path,
        column=column(path, 2),
        expected=", ".join(name for name in INSIDE_MLP if has_part(block, name)) or None,
    )


def has_part(block: Block, name: str) -> bool:
    """Whether a layer's MLP has gate, up, down or router."""
    return bool(getattr(block, name) or name in block.stacked or (name in ("gate", "up") and block.gate_up))


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


def counted_site(path: Path, tower: Tower, block: Block, name: str, index: int, value: str) -> Site:
    """The site of one head, group, expert or neuron."""
    common = {"occurrence": block.occurrence, "tower": tower.name}
    if block.stacked:
        raise stacked_place(path, block, name)
    if name == "neurons":
        assert block.down is not None
        return Site(block.down, "input", columns=(index, index + 1), **common)
    if name == "experts":
        assert block.experts is not None and block.mlp is not None
        return Site(expert_home(block), "input", kind="expert", index=index, **common)
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
    """Whose tokens a projection runs over."""
    return tower.name if role == "q" or block.key_tower is None else block.key_tower


def expert_home(block: Block) -> str:
    """Where one expert is met: the module that runs them all, or the MLP where each is a module of its own."""
    assert block.experts is not None and block.mlp is not None
    return block.mlp if block.experts_are_modules else block.experts


def native_text(name: str | None) -> str:
    """A dotted module name as a native path writes it: `transformer.h.3.attn` -> `transformer.h[3].attn`."""
    text = ""
    for part in (name or "").split("."):
        text += f"[{part}]" if part.isdigit() else f".{part}" if text else part
    return text
