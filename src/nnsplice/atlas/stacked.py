"""Blocks with projections as parameters of attention and MLP themselves, as in TransformerLens.

There is no layer to name then: a role is a list of parameters, each with the axis along which heads or neurons lie.
"""

from __future__ import annotations

from typing import Any

from nnsplice.atlas import families as rows
from nnsplice.atlas.layouts import Layout, fits
from nnsplice.atlas.read_attention import NO_ATTENTION
from nnsplice.atlas.read_mlp import mlp_parts
from nnsplice.atlas.tree import ModuleTree

Roles = dict[str, tuple[tuple[str, int], ...]]


def read_stacked(tree: ModuleTree, block: str) -> tuple[dict[str, Any], dict[str, Any], Roles]:
    """The attention, the MLP and the roles of a block; its MLP is empty where the block is of another kind."""
    attn, roles = _home(tree, block, rows.STACKED_ATTENTION, ("q", "k", "v", "o"))
    layout = _layout(tree, roles) if attn else None
    attention = {**NO_ATTENTION, "attn": attn, "layout": layout}
    if attn is None:
        return attention, {}, {}
    mlp, inner = _home(tree, block, rows.STACKED_MLP, ("up", "down"))
    width = tree.params[inner["down"][0][0]][0] if mlp else 0
    return attention, mlp_parts(mlp=mlp, n_neurons=width), {**roles, **inner}


def _home(
    tree: ModuleTree, block: str, table: dict[str, tuple[tuple[str, int], ...]], needed: tuple[str, ...]
) -> tuple[str | None, Roles]:
    for home in tree.under(block, 2):
        own = tree.nodes[home].params
        roles = {role: tuple((own[name][0], axis) for name, axis in row if name in own) for role, row in table.items()}
        if all(roles[role] for role in needed):
            return home, {role: found for role, found in roles.items() if found}
    return None, {}


def _layout(tree: ModuleTree, roles: Roles) -> Layout | None:
    """Heads are an axis of their own here, so every number is one of the shape."""
    shapes = {role: tree.params[roles[role][0][0]] for role in ("q", "k", "v", "o")}
    n_heads, head_dim, n_kv = shapes["q"][0], shapes["q"][-1], shapes["k"][0]
    if len(shapes["q"]) != 3 or shapes["o"][:2] != (n_heads, head_dim) or shapes["v"][0] != n_kv:
        return None
    return Layout("separate", n_heads, n_kv, head_dim) if fits("separate", n_heads, n_kv, head_dim) else None
