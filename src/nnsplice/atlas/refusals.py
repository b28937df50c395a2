"""Errors for portable paths without a site in a model."""

from __future__ import annotations

from dataclasses import replace

from nnsplice.atlas.block import Block
from nnsplice.atlas.indices import column
from nnsplice.atlas.roles import INSIDE_MLP
from nnsplice.atlas.site import native_text
from nnsplice.errors import RefusedPlace, UnknownPath
from nnsplice.paths.path import Path


def edges_between_towers(path: Path | str) -> RefusedPlace:
    """The error for a query and a key of two towers."""
    return RefusedPlace(
        "edges of cross-attention are not cut or read one by one",
        path=path,
        expected="the pattern of a query, whose width are the encoder's tokens",
        write=str(replace(path, key=None) if isinstance(path, Path) else path),
    )


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
        expected=", ".join(name for name in INSIDE_MLP if _has_part(block, name)) or None,
    )


def _has_part(block: Block, name: str) -> bool:
    """Whether a layer's MLP has gate, up, down or router."""
    return bool(getattr(block, name) or name in block.stacked or (name in ("gate", "up") and block.gate_up))
