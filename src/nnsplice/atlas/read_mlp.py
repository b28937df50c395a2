"""Read the MLP of a block: dense, gated, or a mixture of experts."""

from __future__ import annotations

from typing import Any

from nnsplice.atlas import families as rows
from nnsplice.atlas.tree import ModuleTree


def read_mlp(tree: ModuleTree, block: str, attn: str | None) -> dict[str, Any]:
    """The MLP fields of a block; empty if none is recognised."""
    for home in (block, *tree.own(block, 3)):
        if isinstance(attn, str) and (home == attn or home.startswith(f"{attn}.")):
            continue
        if rows.CROSS & set(home[len(block) :].split(".")):
            continue
        experts = next((m for row in rows.EXPERTS if (m := tree.child(home, row))), None)
        if experts is not None:
            count = _n_experts(tree, experts)
            router = tree.first_layer(home, rows.ROUTER)
            if count and home != block:
                split = bool(tree.nodes[experts].indexed and tree.nodes[experts].children)
                return mlp_parts(mlp=home, experts=experts, router=router, n_experts=count, experts_are_modules=split)
        down = tree.first_layer(home, rows.DOWN)
        if down is None:
            continue
        inner = tree.weight(down)
        gate_up, up = tree.first_layer(home, rows.GATE_UP), tree.first_layer(home, rows.UP)
        gate = tree.first_layer(home, [row for row in rows.GATE if up is None or not up.endswith(f".{row}")])
        wide = tree.weight(gate_up or up or down)
        if inner is None or wide is None or wide[0] != inner[1] * (2 if gate_up else 1):
            continue
        if gate_up:
            return mlp_parts(mlp=home, gate_up=gate_up, down=down, n_neurons=inner[1])
        if up:
            return mlp_parts(mlp=home, gate=gate, up=up, down=down, n_neurons=inner[1])
    return {}


def mlp_parts(**parts: Any) -> dict[str, Any]:
    """The MLP fields of a block, with these parts and no others."""
    none = dict.fromkeys(("mlp", "gate", "up", "down", "gate_up", "router", "experts"))
    return {**none, "n_experts": 0, "n_neurons": 0, "experts_are_modules": False, **parts}


def _n_experts(tree: ModuleTree, experts: str) -> int:
    """Experts are numbered modules, or one module whose tensors have them as their first axis."""
    node = tree.owner(experts)
    if node.children and all(key.isdigit() for key in node.children):
        return len(node.children)
    sizes = {shape[0] for _, shape in node.params.values() if len(shape) >= 2}
    return sizes.pop() if len(sizes) == 1 else 0
