"""Find the towers, blocks and parts of a model in its tree, by the names and shapes of `families`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from nnsplice.atlas import families as rows
from nnsplice.atlas.block import Block, Tower, TowerName
from nnsplice.atlas.choose import Doubt, Towers, choose, is_numbered
from nnsplice.atlas.layouts import Layout, Role, fits
from nnsplice.atlas.stacked import read_stacked
from nnsplice.atlas.stream import read_stream
from nnsplice.atlas.tree import Node, Tree, is_norm


def find_stacks(tree: Tree) -> dict[str, tuple[Block, ...]]:
    """Every list of blocks that is recognised, whatever it is for: its name -> the blocks, in the model's order."""
    # Layers whose MLP is not known, or that have none, are taken where there are no others.
    return _stacks(tree, whole=True) or _stacks(tree, whole=False)


def _stacks(tree: Tree, *, whole: bool) -> dict[str, tuple[Block, ...]]:
    stacks: dict[str, tuple[Block, ...]] = {}
    for node in tree.nodes.values():
        inside = any(node.name.startswith(f"{stack}.") for stack in stacks)
        if node.facts.get("inner_group_num", tree.facts.get("inner_group_num", 1)) != 1:
            continue  # ALBERT with several layers in a group: none of its modules is one layer
        if inside or not is_numbered(node) or rows.NOT_TEXT & set(node.name.split(".")):
            continue
        blocks = _read_split(tree, node) or [
            read_block(tree, m, i, whole=whole) for i, m in enumerate(node.children.values())
        ]
        found = tuple(block for block in blocks if block is not None)
        # Some layers may do without attention (or with one that has no such heads); all of them may not.
        if len(found) == len(node.children) and any(
            block.has_attention or (block.mixer and not whole) for block in found
        ):
            stacks[node.name] = _with_keys(tree, found)
    return stacks


def _with_keys(tree: Tree, blocks: tuple[Block, ...]) -> tuple[Block, ...]:
    """The same blocks, with the layer named whose keys and values one reads that has none of its own."""
    known: dict[object, Block] = {}
    found: list[Block] = []
    for block in blocks:
        facts = tree.nodes[block.attn].facts if block.attn else {}
        kind = facts.get(rows.KIND_OF_KV)
        if facts.get(rows.READS_KV):
            source = known.get(kind)
            layout = source.layout if source is not None else None
            width = None if layout is None or block.o is None else tree.weight(block.o)
            if source is None or layout is None or width != ((width or (0,))[0], layout.n_heads * layout.head_dim):
                block = replace(block, mixed="whose keys and values it reads is not known")
            else:
                modules = (str(source.projection("k")), str(source.projection("v")))
                block = replace(block, layout=layout, kv_layer=source.index, kv_from=modules)
        elif facts.get(rows.STORES_KV):
            known[kind] = block
        found.append(block)
    return tuple(found)


def find_towers(tree: Tree) -> Towers:
    """The towers of a model by name; none where no list of blocks is recognised, or where several could be the one."""
    stacks = find_stacks(tree)
    # Some of them are no stacks: XLNet's attention has no layers for its queries.
    for node in filter(is_numbered, tree.nodes.values()):
        kinds = {tree.nodes[child].kind for child in node.children.values()}
        reason = next((why for start, why in rows.REFUSED.items() for kind in kinds if kind.startswith(start)), None)
        if reason is not None:
            return Towers(MappingProxyType({}), MappingProxyType({}), Doubt(reason, (node.name,)))
    chosen = choose(
        tree, {name: len(blocks) for name, blocks in stacks.items()}, lambda name: _width(tree, stacks[name])
    )
    towers = {name: _tower(tree, name, stack, _unroll(tree, stacks[stack])) for name, stack in chosen.towers.items()}
    layers = {name: tuple(module for block in blocks for module in block.modules) for name, blocks in stacks.items()}
    return Towers(MappingProxyType(towers), MappingProxyType(layers), chosen.doubt)


def _width(tree: Tree, blocks: tuple[Block, ...]) -> int | None:
    """How wide the stream is that a stack reads and writes."""
    shapes = (tree.weight(block.o) for block in blocks if block.o is not None)
    return next((shape[0] for shape in shapes if shape is not None), None)


def _unroll(tree: Tree, blocks: tuple[Block, ...]) -> tuple[Block, ...]:
    """One entry per layer that runs: where a module serves several layers, layer by layer its next call."""
    layers, groups = (tree.facts.get(key) for key in ("num_hidden_layers", "num_hidden_groups"))
    if (
        isinstance(layers, int) and isinstance(groups, int) and groups == len(blocks)
    ):  # ALBERT: neighbouring layers share one of the groups
        blocks = tuple(blocks[i * groups // layers] for i in range(layers))
    calls: dict[str, int] = {}
    unrolled: list[Block] = []
    for i, block in enumerate(blocks):
        calls[block.module] = calls.get(block.module, -1) + 1
        unrolled.append(replace(block, index=i, occurrence=calls[block.module]))
    return tuple(unrolled)


def _tower(tree: Tree, name: TowerName, stack: str, blocks: tuple[Block, ...]) -> Tower:
    prefix = stack.rpartition(".")[0]
    homes = [prefix]
    while homes[-1]:
        homes.append(homes[-1].rpartition(".")[0])
    embed = next((m for home in homes for row in rows.EMBED if _matrix(tree, m := tree.child(home, row))), None)
    unembed = None
    if name == "decoder":
        said = None if tree.facts.get("is_encoder_decoder") else tree.ends.get("embed")
        embed = said if embed is None and _matrix(tree, said) else embed
        unembed = _unembed(tree, embed)
    return Tower(
        name=name,
        prefix=prefix,
        stack=stack,
        blocks=blocks,
        embed=embed,
        final_norm=next(
            (m for home in homes for row in rows.FINAL_NORM if (m := tree.child(home, row)) and is_norm(tree, m)), None
        ),
        unembed=unembed,
    )


def _unembed(tree: Tree, embed: str | None) -> str | None:
    """The head that makes logits: the one that the model itself names, else one of a known name."""
    said = tree.ends.get("unembed")
    if said is not None and said not in (embed, tree.ends.get("embed")) and _matrix(tree, said):
        return said
    return next((home for row in rows.UNEMBED for home in [tree.child("", row)] if _matrix(tree, home)), None)


def _matrix(tree: Tree, name: str | None) -> bool:
    return name is not None and (tree.weight(name) is not None or tree.table(name) is not None)


def _first(tree: Tree, home: str, names: Iterable[str]) -> str | None:
    """The first of the names under `home` that is a layer with a matrix."""
    for name in names:
        module = tree.child(home, name)
        if module is not None and tree.weight(module) is not None:
            return module
    return None


def read_block(tree: Tree, name: str, index: int, *, whole: bool = True) -> Block | None:
    """The parts of one block, or None where it is none that we know; attention may be missing.

    Args:
        whole: it has to have an MLP whose layers are known.
    """
    attention = _read_attention(tree, name)
    mlp = _read_mlp(tree, name, attention.get("attn"))
    stacked = {}
    if not mlp and attention["attn"] is None:
        attention, mlp, stacked = read_stacked(tree, name)
    mixer = None if attention["attn"] or stacked else _mixer(tree, name, mlp.get("mlp"))
    if not mlp and not whole:
        found = next((m for row in rows.MLP_WHOLE if (m := tree.child(name, row)) and m not in tree.shared), None)
        mlp = _mlp(mlp=found) if found or mixer or attention["attn"] else {}
    if not mlp:
        return None
    block = Block(
        index=index,
        module=name,
        occurrence=0,
        parallel=False,
        mixer=mixer,
        only_mlp=_only_mlp(tree, name, mlp["mlp"]),
        mid=None,
        mid_kind="plain",
        mlp_is_bare=_is_bare(name, mlp["mlp"], attention["attn"]),
        post_norm=False,
        has_cross=any(child.rpartition(".")[2] in rows.CROSS for child in tree.under(name, 3)),
        attn_added=None,
        mlp_added=None,
        scale=_scale(tree, name),
        stacked=stacked,
        mlp_beside=tuple(m for row in rows.MLP_BESIDE if mlp["experts"] and (m := tree.child(name, row))),
        **attention,
        **mlp,
    )
    return replace(block, **read_stream(tree, block), cross=_cross(tree, block))


def _cross(tree: Tree, block: Block) -> Block | None:
    """The attention of a layer to the other tower; None where it has none, or one whose parts are not known."""
    home = next((child for child in tree.under(block.module, 3) if child.rpartition(".")[2] in rows.CROSS), None)
    found = {} if home is None else _read_attention(tree, home)
    if home is None or found["o"] is None or found["fused"]:
        return None
    own = {**found, "attn": home, "pattern": (home, _pattern_item(home))}
    none = dict.fromkeys(("mlp", "gate", "up", "down", "gate_up", "router", "experts", "mid", "mlp_added", "mixer"))
    return replace(block, **own, **none, attn_added=home, n_neurons=0, mlp_beside=(), stacked={}, key_tower="encoder")


def _pattern_item(home: str) -> int:
    """Which element of an attention's output holds the probabilities."""
    return rows.PATTERN_ITEM.get(home.rpartition(".")[2], rows.PATTERN_ITEM_DEFAULT)


def _read_split(tree: Tree, node: Node) -> list[Block | None] | None:
    """The blocks of a model that keeps attentions, MLPs and norms in lists of their own, else None."""
    home, _, last = node.name.rpartition(".")
    lists = [tree.child(home, name) for name in rows.SPLIT_STACKS.get(last, ())] if home in tree.nodes else []
    columns = [tuple(tree.nodes[name].children.values()) for name in lists if name is not None]
    if len(columns) != 3 or any(len(column) != len(node.children) for column in columns):
        return None
    attentions = list(node.children.values())
    return [_split_block(tree, i, attentions[i], *parts) for i, parts in enumerate(zip(*columns, strict=True))]


def _split_block(tree: Tree, index: int, attn: str, mlp: str, mid: str, end: str) -> Block | None:
    attention, inner = _read_attention(tree, attn), _read_mlp(tree, mlp, None)
    if attention["o"] is None or not inner:
        return None
    return Block(
        index=index,
        module=attn,
        occurrence=0,
        parallel=False,
        mixer=None,
        only_mlp=False,
        mid=(mid, "output"),
        mid_kind="plain",
        mlp_is_bare=False,
        post_norm=True,
        has_cross=False,
        attn_added=attn,
        mlp_added=mlp,
        beside=(mid, mlp, end),
        end=end,
        **{**attention, "attn": attn, "pattern": (attn, rows.PATTERN_ITEM_DEFAULT)},
        **inner,
    )


def _mixer(tree: Tree, block: str, mlp: str | None) -> str | None:
    """What mixes tokens in a block without attention: of the modules of a known name, the one nearest to it."""
    homes = (block, *(child for child in tree.own(block, 1) if child != mlp))
    found = (m for home in homes for row in rows.MIXERS if (m := tree.child(home, row)))
    return next((m for m in found if m != mlp and m not in tree.shared), None)


def _only_mlp(tree: Tree, block: str, mlp: str | None) -> bool:
    node = tree.nodes[block]
    return not node.params and all(child == mlp or is_norm(tree, child) for child in node.children.values())


def _is_bare(block: str, mlp: object, attn: object) -> bool:
    return mlp == block or (isinstance(attn, str) and attn.startswith(f"{mlp}."))


def _scale(tree: Tree, name: str) -> float:
    for key in rows.SCALES:
        value = tree.nodes[name].facts.get(key, tree.facts.get(key))
        if value is not None:
            return float(value)
    return 1.0


# -- attention ---------------------------------------------------------------------------------------------------------


def _read_attention(tree: Tree, block: str) -> dict[str, Any]:
    for home in (block, *tree.own(block, 3)):
        if rows.CROSS & set(home[len(block) :].split(".")):
            continue
        q, k, v = (_first(tree, home, names) for names in (rows.Q, rows.K, rows.V))
        if q and not (k or v):
            k = v = _first(tree, home, rows.LATENT)
        fused = None if q and k and v else _first(tree, home, rows.FUSED)
        if not ((q and k and v) or fused or (q and tree.nodes[home].facts.get(rows.READS_KV))):
            continue
        attn, o = home, _first(tree, home, rows.O)
        if o is None and home != block:
            parent = home.rpartition(".")[0]
            attn, o = (home, None) if parent == block else (parent, _first(tree, parent, rows.O_BESIDE))
        if o is None:
            continue
        # GPT-Neo wraps the module once more, with nothing else inside: users name the outer one.
        while attn != block and len(tree.nodes[attn.rpartition(".")[0]].children) == 1:
            attn = attn.rpartition(".")[0]
        layout, mixed = _read_layout(tree, home, (q, k, v), fused, o), _mixed(tree, home)
        return {
            "attn": None if attn == block else attn,
            "pattern": None if home == block else (home, _pattern_item(home)),
            "q": None if fused else q,
            "k": None if fused else k,
            "v": None if fused else v,
            "fused": fused,
            "o": o,
            "head_gates": (gates := _head_gates(tree, home, o, layout)),
            "gate_layer": _gate_layer(tree, gates, layout),
            "group_rows": tuple((m, role) for row, role in rows.GROUP_ROWS.items() if (m := tree.child(home, row))),
            "joint_norms": () if layout is None else tuple(_joint_norms(tree, home, layout)),
            "latents": tuple(m for row in rows.LATENTS if (m := tree.child(home, row))),
            "layout": None if mixed else layout,
            "mixed": mixed,
        }
    return {**dict.fromkeys(("attn", "pattern", "q", "k", "v", "fused", "o", "layout")), "head_gates": ()}


def _mixed(tree: Tree, home: str) -> str | None:
    """Why the heads of an attention module are not plain; None where nothing says so."""
    own = {*tree.nodes[home].params, *tree.nodes[home].children}
    return next((reason for name, reason in rows.MIXED_HEADS.items() if name in own), None)


def _joint_norms(tree: Tree, home: str, layout: Layout) -> Iterator[tuple[str, Role]]:
    """The norms of an attention that are as wide as all heads of a role together."""
    for row, role in rows.ROLE_NORMS.items():
        module, count = tree.child(home, row), layout.count(role)
        shapes = [shape for _, shape in tree.nodes[module].params.values()] if module else []
        if module is not None and count > 1 and (count * layout.size(role),) in shapes:
            yield module, role


def _head_gates(tree: Tree, home: str, o: str, layout: Layout | None) -> tuple[str, ...]:
    """Layers whose output goes to the heads in equal shares."""
    inner, n_heads = tree.weight(o), layout.n_heads if layout else 0
    found: list[str] = []
    for row in (*rows.HEAD_GATES, *rows.HEAD_ROWS):
        module = tree.child(home, row)
        shape = tree.weight(module) if module else None
        if module is None or inner is None or shape is None:
            continue
        if shape[0] in (inner[1], n_heads) or (row in rows.HEAD_ROWS and n_heads and not shape[0] % n_heads):
            found.append(module)
    return tuple(found)


def _gate_layer(tree: Tree, gates: tuple[str, ...], layout: Layout | None) -> tuple[str, int] | None:
    """The one layer of gates, and its columns of one head: as many as the slice has, or one."""
    found = [module for module in gates if module.rpartition(".")[2] in rows.HEAD_GATES]
    shape = tree.weight(found[0]) if len(found) == 1 else None
    return (found[0], shape[0] // layout.n_heads) if shape is not None and layout is not None else None


def _read_layout(tree: Tree, home: str, separate: tuple[str | None, ...], fused: str | None, o: str) -> Layout | None:
    """Heads come from the config, every other number from shapes: hidden // heads is wrong in 22 families."""
    n_heads = _n_heads(tree, home)
    inner = tree.weight(o)
    if not n_heads or inner is None or inner[1] % n_heads:
        return None
    head_dim = inner[1] // n_heads
    if fused is None:
        return _apart(tree, home, separate, n_heads, head_dim)
    shape = tree.weight(fused)
    if shape is None or shape[0] % head_dim:
        return None
    n_kv, odd = divmod(shape[0] // head_dim - n_heads, 2)
    if odd:
        return None
    kind = rows.FUSED[fused.rpartition(".")[2]]
    node = tree.nodes[home]
    for start, special in rows.FUSED_BY_CLASS.items():
        kind = special if node.kind.startswith(start) else kind
    if n_kv == n_heads and "multi_query" in node.facts and kind == "concat":
        kind = "interleaved"  # GPT-BigCode with as many key/value heads as heads
    return Layout(kind, n_heads, n_kv, head_dim) if fits(kind, n_heads, n_kv, head_dim) else None


def _apart(tree: Tree, home: str, names: tuple[str | None, ...], n_heads: int, head_dim: int) -> Layout | None:
    """The layout of queries, keys and values that do not lie on one axis, by their widths."""
    shapes = [tree.weight(name) for name in names if name]
    if len(shapes) != 3 or None in shapes:
        return None
    query, key, value = (shape[0] for shape in shapes if shape)
    # A query that is wider than its key carries more than can be cut by heads, unless the family says what.
    gate = head_dim if tree.nodes[home].kind.startswith(rows.GATED) else 0
    query_dim, left = query // n_heads - gate, query % n_heads
    if names[1] == names[2]:  # keys and values of a head side by side
        key_dim = key // n_heads - head_dim
        right = not left and not key % n_heads and 0 < key_dim <= query_dim
        return Layout("latent", n_heads, n_heads, head_dim, query_dim, key_dim, gate) if right else None
    n_kv = value // head_dim
    # Values of another width than keys are believed where the module says so: else heads may share queries and keys.
    plain = query_dim == head_dim or tree.nodes[home].facts.get("v_head_dim") == head_dim
    right = (
        plain
        and not left
        and not value % head_dim
        and key == n_kv * query_dim
        and fits("separate", n_heads, n_kv, head_dim)
    )
    other = 0 if query_dim == head_dim else query_dim
    return Layout("separate", n_heads, n_kv, head_dim, other, other, gate) if right else None


def _n_heads(tree: Tree, home: str) -> int:
    tower = "encoder" if "encoder" in home.split(".") else "decoder"
    sources: list[Mapping[str, Any]] = [tree.nodes[home].facts, tree.facts]
    for source in sources:
        for key in (*rows.N_HEADS_TOWER[tower], *rows.N_HEADS):
            if isinstance(source.get(key), int):
                return source[key]
    return 0


# -- MLP ---------------------------------------------------------------------------------------------------------------


def _read_mlp(tree: Tree, block: str, attn: str | None) -> dict[str, Any]:
    for home in (block, *tree.own(block, 3)):
        if isinstance(attn, str) and (home == attn or home.startswith(f"{attn}.")):
            continue
        if rows.CROSS & set(home[len(block) :].split(".")):
            continue
        experts = next((m for row in rows.EXPERTS if (m := tree.child(home, row))), None)
        if experts is not None:
            count = _n_experts(tree, experts)
            router = _first(tree, home, rows.ROUTER)
            if count and home != block:
                split = bool(tree.nodes[experts].indexed and tree.nodes[experts].children)
                return _mlp(mlp=home, experts=experts, router=router, n_experts=count, experts_are_modules=split)
        down = _first(tree, home, rows.DOWN)
        if down is None:
            continue
        inner = tree.weight(down)
        gate_up, up = _first(tree, home, rows.GATE_UP), _first(tree, home, rows.UP)
        gate = _first(tree, home, [row for row in rows.GATE if up is None or not up.endswith(f".{row}")])
        wide = tree.weight(gate_up or up or down)
        if inner is None or wide is None or wide[0] != inner[1] * (2 if gate_up else 1):
            continue
        if gate_up:
            return _mlp(mlp=home, gate_up=gate_up, down=down, n_neurons=inner[1])
        if up:
            return _mlp(mlp=home, gate=gate, up=up, down=down, n_neurons=inner[1])
    return {}


def _mlp(**parts: Any) -> dict[str, Any]:
    none = dict.fromkeys(("mlp", "gate", "up", "down", "gate_up", "router", "experts"))
    return {**none, "n_experts": 0, "n_neurons": 0, "experts_are_modules": False, **parts}


def _n_experts(tree: Tree, experts: str) -> int:
    """Experts are numbered modules, or one module whose tensors have them as their first axis."""
    node = tree.owner(experts)
    if node.children and all(key.isdigit() for key in node.children):
        return len(node.children)
    sizes = {shape[0] for _, shape in node.params.values() if len(shape) >= 2}
    return sizes.pop() if len(sizes) == 1 else 0
