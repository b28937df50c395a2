"""What each branch of a block adds to the residual stream, and the stream between them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nnsplice.atlas import families as rows
from nnsplice.atlas.block import Block, End
from nnsplice.atlas.tree import ModuleTree, is_norm


def read_stream(tree: ModuleTree, block: Block) -> dict[str, Any]:
    """What is added to the stream, and where the stream is met between attention and MLP."""
    home, attn, mlp = block.module, block.attn, block.mlp
    children = dict(tree.nodes[home].children)
    around = next((c for c in children.values() if attn is not None and attn.startswith(f"{c}.")), None)
    if around is not None and "norm" in around.rpartition(".")[2]:
        children |= tree.nodes[around].children  # DBRX keeps the attention between its norms
    norms = {a: c for a, c in children.items() if c not in (attn, mlp) and is_norm(tree, c)}
    inner_norm = next((c for c in tree.under(attn) if c.rpartition(".")[2] == "LayerNorm"), None) if attn else None
    sandwich = next((pair for pair in rows.SANDWICH if pair[0] in norms and pair[1] in norms), None)
    # A module that is handed the stream adds to it itself: then its last projection is what is added.
    adds = {m for m in (attn, mlp) if m is not None and "residual" in tree.nodes[m].arguments}
    if attn is not None and block.o is not None and block.o.startswith(f"{attn}."):
        # BERT's spelling: the module around the output projection is handed the stream.
        around = tree.nodes[block.o.rpartition(".")[0]].arguments
        adds |= {attn} if around & {"input_tensor", "residual"} else set()
    attn_added = block.o if attn is None or attn in adds or inner_norm else attn
    bare = block.mlp_is_bare
    mlp_added = block.down if bare or mlp in adds else mlp
    if sandwich:
        attn_added, mlp_added = norms[sandwich[0]], norms[sandwich[1]]
    parallel = _is_parallel(tree, block, norms, bare)
    mid: End | None
    mid, whole = None, True
    both = mlp is not None and (block.has_attention or block.mixer is not None)
    parallel = parallel and both
    wrapper = mlp.rpartition(".")[0] if mlp and not bare else home
    if not parallel and both:
        if inner_norm:  # BERT: the stream leaves the attention module normalised
            mid = (inner_norm.rpartition(".")[0], "output")
        elif attn in adds and attn is not None:  # BLOOM
            mid = (attn, "output")
        elif wrapper != home:  # T5: the sub-layer is handed the stream
            mid = (wrapper, "input")
        elif _post_norm(tree, block):
            after = next((norms[row] for row in rows.POST_ATTENTION if row in norms), None)
            mid = (after, "output") if after else None
        else:
            used = sandwich or ()
            before = next((norms[row] for row in rows.PRE_MLP if row in norms and row not in used), None)
            first = block.up or block.gate_up if bare else mlp
            mid = (before, "input") if before else (first, "input") if first else None
            whole = False
    if attn is not None and set(rows.O_BIAS) & set(tree.nodes[attn].params):
        attn_added = None  # the bias is added by the block
    if block.mlp_beside:
        mlp_added = None
    if tree.nodes[home].kind.startswith(rows.NOT_ADDITIVE):
        attn_added = mlp_added = mid = None
    return {
        "parallel": parallel,
        "mid": mid,
        "mid_kind": "plain" if whole else "stream",
        "post_norm": inner_norm is not None or _post_norm(tree, block),
        "attn_added": attn_added,
        "mlp_added": mlp_added,
    }


def _post_norm(tree: ModuleTree, block: Block) -> bool:
    before = tree.nodes[block.module].facts.get("do_layer_norm_before", tree.facts.get("do_layer_norm_before"))
    return before is False or tree.facts.get("model_type") in rows.POST_NORM_TYPES


def _is_parallel(tree: ModuleTree, block: Block, norms: Mapping[str, str], bare: bool) -> bool:
    flag = tree.nodes[block.module].facts.get("use_parallel_residual", tree.facts.get("use_parallel_residual"))
    if flag is not None:
        return bool(flag)
    if any(all(name in norms for name in row) for row in rows.PARALLEL_NORMS):
        return True
    # One norm in front of both branches: they read the same thing. (Norms inside a branch are not counted.)
    return len(norms) == 1 and not bare
