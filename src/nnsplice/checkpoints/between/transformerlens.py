"""The scheme of TransformerLens, for models without its processing (no folding, no centring).

Every matrix is `[in, out]`, heads have an axis of their own, and a missing bias is stored as zeros.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from nnsplice.atlas import Atlas, Block
from nnsplice.checkpoints.between.scheme import Scheme, Stored, scheme, single, transposed_part
from nnsplice.checkpoints.mapper.abc import ModelStateMapper
from nnsplice.checkpoints.mapper.compose import Sequential
from nnsplice.checkpoints.mapper.names import Rename
from nnsplice.checkpoints.mapper.numbers import Scale, Shift, Zeros
from nnsplice.checkpoints.mapper.shapes import Permute, Reshape
from nnsplice.errors import MapperError

#: A tensor that only these checkpoints have.
MARK = "embed.W_E"


def transformerlens(atlas: Atlas, own: Scheme, dtype: torch.dtype) -> Scheme:
    """The scheme of a model's parts as TransformerLens names them.

    Args:
        own: the scheme of the model's own parameters.
        dtype: the type of the zero biases.
    """
    if len(atlas.towers) > 1:
        raise MapperError(
            "how TransformerLens names the parts of a model with two towers is not known here",
            expected="a model with one tower",
        )
    parts = {part for stored in own.values() for part in stored.parts}
    tower = atlas.tower()
    found: list[Stored] = list(_ends(atlas, parts, dtype))
    for block in tower.blocks:
        if block.layout is not None and (block.layout.query_dim or block.layout.gate_dim):
            raise MapperError(
                f"TransformerLens has no names for what the attention of layer {block.index} is made of: its queries "
                "carry gates, or have another width than its values",
                expected="attention in which queries, keys and values of a head have one width",
            )
        found += _block(block, atlas, parts, dtype)
    return scheme(found)


def _ends(atlas: Atlas, parts: set[str], dtype: torch.dtype) -> Iterator[Stored]:
    tower = atlas.tower()
    shape = atlas.tree.params[f"{tower.embed}.weight"]
    if "embed_unscaled.weight" in parts:
        name, part, factor = MARK, "embed_unscaled.weight", shape[1] ** 0.5
        take = Sequential([Rename(name, part), Scale(part, 1 / factor)])
        yield Stored(name, (part,), take, Sequential([Scale(part, factor), Rename(part, name)]))
    else:
        yield single(MARK, "embed.weight")
    if "positions.weight" in parts:
        yield single("pos_embed.W_pos", "positions.weight")
    yield transposed_part("unembed.W_U", "unembed.weight")
    yield _bias("unembed.b_U", "unembed.bias", parts, (shape[0],), dtype)
    yield from _norm("ln_final", "final_norm", parts)


def _block(block: Block, atlas: Atlas, parts: set[str], dtype: torch.dtype) -> Iterator[Stored]:
    here, there = f"L.{block.index}", f"blocks.{block.index}"
    norms = {"ln1": "norm1", "ln2": "norm2", "ln1_post": "norm1_after", "ln2_post": "norm2_after"}
    norms |= {"attn.q_norm": "attn.q_norm", "attn.k_norm": "attn.k_norm"}
    for word, meaning in norms.items():
        yield from _norm(f"{there}.{word}", f"{here}.{meaning}", parts)
    layout = block.layout
    if layout is not None and block.o is not None:
        width, d = (atlas.tree.weight(block.o) or (0, 0))[0], layout.head_dim
        for role in ("q", "k", "v"):
            heads = layout.count(role)
            # Keys and values that heads share have names of their own.
            mark = "" if role == "q" or heads == layout.n_heads else "_"
            name, part = f"{there}.attn.{mark}W_{role.upper()}", f"{here}.attn.{role}.weight"
            yield _through(
                name, part,
                [Permute(part, (0, 2, 1)), Reshape(part, (heads * d, width))],
                [Reshape(part, (heads, d, width)), Permute(part, (0, 2, 1))],
            )  # fmt: skip
            bias = f"{here}.attn.{role}.bias"
            yield _bias(f"{there}.attn.{mark}b_{role.upper()}", bias, parts, (heads, d), dtype)
        part = f"{here}.attn.o.weight"
        turn = Permute(part, (1, 0))
        yield _through(
            f"{there}.attn.W_O", part,
            [Reshape(part, (layout.n_heads * d, width)), turn], [turn, Reshape(part, (layout.n_heads, d, width))],
        )  # fmt: skip
        yield _bias(f"{there}.attn.b_O", f"{here}.attn.o.bias", parts, (width,), dtype)
        if block.n_neurons:
            for word, role, size in (("in", "up", block.n_neurons), ("out", "down", width)):
                yield transposed_part(f"{there}.mlp.W_{word}", f"{here}.mlp.{role}.weight")
                yield _bias(f"{there}.mlp.b_{word}", f"{here}.mlp.{role}.bias", parts, (size,), dtype)
            if block.gate is not None or block.gate_up is not None:
                yield transposed_part(f"{there}.mlp.W_gate", f"{here}.mlp.gate.weight")


def _through(name: str, part: str, take: list[ModelStateMapper], give: list[ModelStateMapper]) -> Stored:
    return Stored(name, (part,), Sequential([Rename(name, part), *take]), Sequential([*give, Rename(part, name)]))


def _bias(name: str, part: str, parts: set[str], shape: tuple[int, ...], dtype: torch.dtype) -> Stored:
    """A bias, or zeros where there is none."""
    if part not in parts:
        return Stored(name, (), Rename(name, name), Zeros(name, shape, dtype))
    flat = 1
    for length in shape:
        flat *= length
    return _through(name, part, [Reshape(part, (flat,))], [Reshape(part, shape)])


def _norm(name: str, part: str, parts: set[str]) -> Iterator[Stored]:
    kinds: Mapping[str, str] = {"w": "weight", "b": "bias"}
    for word, kind in kinds.items():
        if f"{part}.{kind}" in parts:
            yield single(f"{name}.{word}", f"{part}.{kind}")
        elif f"{part}.{kind}_less_one" in parts:
            less = f"{part}.{kind}_less_one"
            yield _through(f"{name}.{word}", less, [Shift(less, -1.0)], [Shift(less, 1.0)])
