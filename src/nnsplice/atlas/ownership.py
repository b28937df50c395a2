"""Which parameters of an attention module belong to one head, to all heads, or are not known to belong to any."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from nnsplice.atlas import families as rows
from nnsplice.atlas.block import Block
from nnsplice.atlas.model_parts import ModelParts
from nnsplice.atlas.tree import ModuleTree, is_norm


def whole_names(tree: ModuleTree, module: str) -> Iterator[str]:
    """Every parameter at and below a module, by its first name."""
    for name in (module, *tree.under(module)):
        yield from (full for full, _ in tree.nodes[name].params.values())


def per_head(atlas: ModelParts, block: Block) -> tuple[str, ...]:
    """Parameters of the attention with one number per head, such as GPT-OSS's sinks."""
    node = atlas.tree.nodes.get(block.pattern[0] if block.pattern else "")
    return tuple(node.params[name][0] for name in rows.PER_HEAD if name in node.params) if node else ()


def unclaimed(atlas: ModelParts, block: Block) -> tuple[str, ...]:
    """Parameters of a layer's attention that no role claims and that are not known to be all heads' alike.

    Norms, tables of relative positions and single numbers serve all heads; whatever else is left may be a part of one.
    """
    tree = atlas.tree
    if block.attn is None or not block.has_attention:
        return ()
    modules = (block.q, block.k, block.v, block.fused, block.o, *block.head_gates, *block.latents)
    modules = (*modules, *(module for module, _ in block.group_rows))
    known = {name for module in modules if module is not None for name in whole_names(tree, module)}
    known |= {name for parameters in block.stacked.values() for name, _ in parameters} | set(per_head(atlas, block))
    shared = (*rows.O_BIAS, *rows.STACKED_BIASES)
    known |= {full for name, (full, _) in tree.nodes[block.attn].params.items() if name in shared}
    # Where the attention module is all of the layer, the MLP stands in it too.
    for module in (block.mlp, block.down, block.up, block.gate, block.gate_up):
        known |= set(whole_names(tree, module)) if module is not None and module != block.attn else set()
    left: list[str] = []
    for home in (block.attn, *tree.under(block.attn)):
        words = home[len(block.attn) :].split(".")
        if is_norm(tree, home) or set(rows.SHARED_BY_HEADS) & set(words) or rows.CROSS & set(words):
            continue
        left += [full for full, shape in tree.nodes[home].params.values() if full not in known and prod(shape) > 1]
    return tuple(left)
