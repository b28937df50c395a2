"""Find the towers and lists of blocks of a model in its tree, by the names and shapes of `families`."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from nnsplice.atlas import families as rows
from nnsplice.atlas.block import Block, Tower, TowerName
from nnsplice.atlas.choose import Doubt, Towers, choose, is_numbered
from nnsplice.atlas.read_block import read_block, read_split_blocks
from nnsplice.atlas.tree import ModuleTree, is_norm


def find_stacks(tree: ModuleTree) -> dict[str, tuple[Block, ...]]:
    """Every list of blocks that is recognised, whatever it is for: its name -> the blocks, in the model's order."""
    # Layers whose MLP is not known, or that have none, are taken where there are no others.
    return _stacks(tree, whole=True) or _stacks(tree, whole=False)


def _stacks(tree: ModuleTree, *, whole: bool) -> dict[str, tuple[Block, ...]]:
    stacks: dict[str, tuple[Block, ...]] = {}
    for node in tree.nodes.values():
        inside = any(node.name.startswith(f"{stack}.") for stack in stacks)
        if node.facts.get("inner_group_num", tree.facts.get("inner_group_num", 1)) != 1:
            continue  # ALBERT with several layers in a group: none of its modules is one layer
        if inside or not is_numbered(node) or rows.NOT_TEXT & set(node.name.split(".")):
            continue
        blocks = read_split_blocks(tree, node) or [
            read_block(tree, m, i, whole=whole) for i, m in enumerate(node.children.values())
        ]
        found = tuple(block for block in blocks if block is not None)
        # Some layers may do without attention (or with one that has no such heads); all of them may not.
        if len(found) == len(node.children) and any(
            block.has_attention or (block.mixer and not whole) for block in found
        ):
            stacks[node.name] = _with_keys(tree, found)
    return stacks


def _with_keys(tree: ModuleTree, blocks: tuple[Block, ...]) -> tuple[Block, ...]:
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


def find_towers(tree: ModuleTree) -> Towers:
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


def _width(tree: ModuleTree, blocks: tuple[Block, ...]) -> int | None:
    """How wide the stream is that a stack reads and writes."""
    shapes = (tree.weight(block.o) for block in blocks if block.o is not None)
    return next((shape[0] for shape in shapes if shape is not None), None)


def _unroll(tree: ModuleTree, blocks: tuple[Block, ...]) -> tuple[Block, ...]:
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


def _tower(tree: ModuleTree, name: TowerName, stack: str, blocks: tuple[Block, ...]) -> Tower:
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


def _unembed(tree: ModuleTree, embed: str | None) -> str | None:
    """The head that makes logits: the one that the model itself names, else one of a known name."""
    said = tree.ends.get("unembed")
    if said is not None and said not in (embed, tree.ends.get("embed")) and _matrix(tree, said):
        return said
    return next((home for row in rows.UNEMBED for home in [tree.child("", row)] if _matrix(tree, home)), None)


def _matrix(tree: ModuleTree, name: str | None) -> bool:
    return name is not None and (tree.weight(name) is not None or tree.table(name) is not None)
