"""Read one block of a model: its attention, MLP, mixer and cross-attention."""

from __future__ import annotations

from dataclasses import replace

from nnsplice.atlas import families as rows
from nnsplice.atlas.block import Block
from nnsplice.atlas.read_attention import pattern_item, read_attention
from nnsplice.atlas.read_mlp import mlp_parts, read_mlp
from nnsplice.atlas.stacked import read_stacked
from nnsplice.atlas.stream import read_stream
from nnsplice.atlas.tree import ModuleTree, Node, is_norm


def read_block(tree: ModuleTree, name: str, index: int, *, whole: bool = True) -> Block | None:
    """The parts of one block, or None where it is none that we know; attention may be missing.

    Args:
        whole: it has to have an MLP whose layers are known.
    """
    attention = read_attention(tree, name)
    mlp = read_mlp(tree, name, attention.get("attn"))
    stacked = {}
    if not mlp and attention["attn"] is None:
        attention, mlp, stacked = read_stacked(tree, name)
    mixer = None if attention["attn"] or stacked else _mixer(tree, name, mlp.get("mlp"))
    if not mlp and not whole:
        found = next((m for row in rows.MLP_WHOLE if (m := tree.child(name, row)) and m not in tree.shared), None)
        mlp = mlp_parts(mlp=found) if found or mixer or attention["attn"] else {}
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


def _cross(tree: ModuleTree, block: Block) -> Block | None:
    """The attention of a layer to the other tower; None where it has none, or one whose parts are not known."""
    home = next((child for child in tree.under(block.module, 3) if child.rpartition(".")[2] in rows.CROSS), None)
    found = {} if home is None else read_attention(tree, home)
    if home is None or found["o"] is None or found["fused"]:
        return None
    own = {**found, "attn": home, "pattern": (home, pattern_item(home))}
    none = dict.fromkeys(("mlp", "gate", "up", "down", "gate_up", "router", "experts", "mid", "mlp_added", "mixer"))
    return replace(block, **own, **none, attn_added=home, n_neurons=0, mlp_beside=(), stacked={}, key_tower="encoder")


def read_split_blocks(tree: ModuleTree, node: Node) -> list[Block | None] | None:
    """The blocks of a model that keeps attentions, MLPs and norms in lists of their own, else None."""
    home, _, last = node.name.rpartition(".")
    lists = [tree.child(home, name) for name in rows.SPLIT_STACKS.get(last, ())] if home in tree.nodes else []
    columns = [tuple(tree.nodes[name].children.values()) for name in lists if name is not None]
    if len(columns) != 3 or any(len(column) != len(node.children) for column in columns):
        return None
    attentions = list(node.children.values())
    return [_split_block(tree, i, attentions[i], *parts) for i, parts in enumerate(zip(*columns, strict=True))]


def _split_block(tree: ModuleTree, index: int, attn: str, mlp: str, mid: str, end: str) -> Block | None:
    attention, inner = read_attention(tree, attn), read_mlp(tree, mlp, None)
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


def _mixer(tree: ModuleTree, block: str, mlp: str | None) -> str | None:
    """What mixes tokens in a block without attention: of the modules of a known name, the one nearest to it."""
    homes = (block, *(child for child in tree.own(block, 1) if child != mlp))
    found = (m for home in homes for row in rows.MIXERS if (m := tree.child(home, row)))
    return next((m for m in found if m != mlp and m not in tree.shared), None)


def _only_mlp(tree: ModuleTree, block: str, mlp: str | None) -> bool:
    node = tree.nodes[block]
    return not node.params and all(child == mlp or is_norm(tree, child) for child in node.children.values())


def _is_bare(block: str, mlp: object, attn: object) -> bool:
    return mlp == block or (isinstance(attn, str) and attn.startswith(f"{mlp}."))


def _scale(tree: ModuleTree, name: str) -> float:
    for key in rows.SCALES:
        value = tree.nodes[name].facts.get(key, tree.facts.get(key))
        if value is not None:
            return float(value)
    return 1.0
