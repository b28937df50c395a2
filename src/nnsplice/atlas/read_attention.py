"""Read the attention of a block: its projections, gates, and the layout of its heads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from nnsplice.atlas import families as rows
from nnsplice.atlas.layouts import Layout, Role, fits
from nnsplice.atlas.tree import ModuleTree

#: The fields of a block without attention.
NO_ATTENTION: Mapping[str, Any] = {
    **dict.fromkeys(("attn", "pattern", "q", "k", "v", "fused", "o", "layout")),
    "head_gates": (),
}


def read_attention(tree: ModuleTree, block: str) -> dict[str, Any]:
    """The attention fields of a block; those of `NO_ATTENTION` if none is recognised."""
    for home in (block, *tree.own(block, 3)):
        if rows.CROSS & set(home[len(block) :].split(".")):
            continue
        q, k, v = (tree.first_layer(home, names) for names in (rows.Q, rows.K, rows.V))
        if q and not (k or v):
            k = v = tree.first_layer(home, rows.LATENT)
        fused = None if q and k and v else tree.first_layer(home, rows.FUSED)
        if not ((q and k and v) or fused or (q and tree.nodes[home].facts.get(rows.READS_KV))):
            continue
        attn, o = home, tree.first_layer(home, rows.O)
        if o is None and home != block:
            parent = home.rpartition(".")[0]
            attn, o = (home, None) if parent == block else (parent, tree.first_layer(parent, rows.O_BESIDE))
        if o is None:
            continue
        # GPT-Neo wraps the module once more, with nothing else inside: users name the outer one.
        while attn != block and len(tree.nodes[attn.rpartition(".")[0]].children) == 1:
            attn = attn.rpartition(".")[0]
        layout, mixed = _read_layout(tree, home, (q, k, v), fused, o), _mixed(tree, home)
        return {
            "attn": None if attn == block else attn,
            "pattern": None if home == block else (home, pattern_item(home)),
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
    return dict(NO_ATTENTION)


def pattern_item(home: str) -> int:
    """Which element of an attention's output holds the probabilities."""
    return rows.PATTERN_ITEM.get(home.rpartition(".")[2], rows.PATTERN_ITEM_DEFAULT)


def _mixed(tree: ModuleTree, home: str) -> str | None:
    """Why the heads of an attention module are not plain; None where nothing says so."""
    own = {*tree.nodes[home].params, *tree.nodes[home].children}
    return next((reason for name, reason in rows.MIXED_HEADS.items() if name in own), None)


def _joint_norms(tree: ModuleTree, home: str, layout: Layout) -> Iterator[tuple[str, Role]]:
    """The norms of an attention that are as wide as all heads of a role together."""
    for row, role in rows.ROLE_NORMS.items():
        module, count = tree.child(home, row), layout.count(role)
        shapes = [shape for _, shape in tree.nodes[module].params.values()] if module else []
        if module is not None and count > 1 and (count * layout.size(role),) in shapes:
            yield module, role


def _head_gates(tree: ModuleTree, home: str, o: str, layout: Layout | None) -> tuple[str, ...]:
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


def _gate_layer(tree: ModuleTree, gates: tuple[str, ...], layout: Layout | None) -> tuple[str, int] | None:
    """The one layer of gates, and its columns of one head: as many as the slice has, or one."""
    found = [module for module in gates if module.rpartition(".")[2] in rows.HEAD_GATES]
    shape = tree.weight(found[0]) if len(found) == 1 else None
    return (found[0], shape[0] // layout.n_heads) if shape is not None and layout is not None else None


def _read_layout(
    tree: ModuleTree, home: str, separate: tuple[str | None, ...], fused: str | None, o: str
) -> Layout | None:
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


def _apart(tree: ModuleTree, home: str, names: tuple[str | None, ...], n_heads: int, head_dim: int) -> Layout | None:
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


def _n_heads(tree: ModuleTree, home: str) -> int:
    tower = "encoder" if "encoder" in home.split(".") else "decoder"
    sources: list[Mapping[str, Any]] = [tree.nodes[home].facts, tree.facts]
    for source in sources:
        for key in (*rows.N_HEADS_TOWER[tower], *rows.N_HEADS):
            if isinstance(source.get(key), int):
                return source[key]
    return 0
