"""Attention masks of recorded prompts, for packed rows.

A packed token has the row of its own position in the mask of the recorded pass. So sliding windows, chunks and the like
need no code here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from nnsplice.errors import RefusedPlace
from nnsplice.packed.indices import on_device

#: A row of a batch, a head, a query and a key, by their indices in the attention's own tensors.
Edge = tuple[int, int, int, int]
#: The reason for refusing a model whose tokens attend to later ones.
LATER = "its attention lets tokens see later ones"


def causal(length: int, window: int | None, device: torch.device) -> Tensor:
    """The causal mask `[1, 1, query, key]`, with a sliding window if given."""
    at = torch.arange(length, device=device)
    sees = at <= at[:, None]
    if window is not None:
        sees &= at > at[:, None] - window
    return sees[None, None]


def tables(
    passes: Sequence[Mapping[nn.Module, Tensor]], shapes: Sequence[tuple[int, int]]
) -> dict[nn.Module, Tensor | None]:
    """The mask of each attention module for all recorded prompts; modules with the same mask share a table.

    Args:
        passes: the masks of each pass, `[prompt or 1, head or 1, query, key]`.
        shapes: the numbers of prompts and of tokens in each pass.

    Returns:
        `[prompt or 1, head or 1, query, key]`, as long as the longest prompt: True where a query sees a key, or numbers
        added to the scores. None for a plain causal mask.
    """
    known: dict[tuple[int, ...], Tensor | None] = {}
    found: dict[nn.Module, Tensor | None] = {}
    for module in passes[0]:
        key = tuple(id(masks[module]) for masks in passes)
        if key not in known:
            known[key] = _table([_read(masks[module], *shape) for masks, shape in zip(passes, shapes, strict=True)])
        found[module] = known[key]
    return found


def _read(mask: Tensor, prompts: int, length: int) -> Tensor:
    """A mask as `[prompt, head or 1, query, key]`: bool, or numbers added to the scores if some are not 0 or -inf.

    Raises:
        NotImplementedError: the mask has another shape or dtype, or a token sees later ones.
    """
    if mask.dim() != 4 or mask.shape[-2:] != (length, length) or mask.shape[0] not in (1, prompts):
        raise NotImplementedError(f"its attention is given a mask of shape {list(mask.shape)} for {length} tokens")
    if mask.dtype is not torch.bool and not mask.is_floating_point():
        raise NotImplementedError(f"its attention is given a mask of {mask.dtype}")
    refuse_later(mask)
    mask = mask.expand(prompts, -1, -1, -1)
    sees = seen(mask)
    if mask.is_floating_point() and mask[sees].any():
        return mask.masked_fill(~sees, float("-inf"))
    return sees


def seen(mask: Tensor) -> Tensor:
    """Where a mask lets a query see a key; floating point masks are added to scores."""
    return mask > torch.finfo(mask.dtype).min / 2 if mask.is_floating_point() else mask


def without(
    mask: Tensor | None,
    shape: tuple[int, int, int, int],
    cut_edges: Sequence[Edge],
    device: torch.device,
    positions: np.ndarray | None = None,
) -> Tensor:
    """A mask `[row, head, query, key]` without these edges.

    Args:
        positions: `[row or 1, query]`: the positions of queries, under a plain causal mask. With them the check that
            each query keeps a key needs no data from the device.

    Raises:
        RefusedPlace: a query would be left without a key.
    """
    whole = torch.ones(1, dtype=torch.bool, device=device) if mask is None else mask
    new = whole.expand(shape).clone()
    row, head, query, key = on_device(np.array(cut_edges).T, device)
    if max(edge[1] for edge in cut_edges) >= shape[1]:
        raise RefusedPlace(
            f"its attention has {shape[1]} heads where the model has more",
            expected="attention that is computed head by head",
        )
    new[row, head, query, key] = False if new.dtype is torch.bool else float("-inf")
    rest = (
        _keeps_a_key(cut_edges, positions) if positions is not None else bool(seen(new[row, head, query]).any(-1).all())
    )
    if not rest:
        raise RefusedPlace(
            "a query would be left without any key: the others are hidden from it by the model's own mask",
            expected="a knockout that leaves each query a key",
        )
    return new


def _keeps_a_key(cut_edges: Sequence[Edge], positions: np.ndarray) -> bool:
    """Whether each query keeps a key, under a plain causal mask."""
    keys: dict[tuple[int, int, int], set[int]] = {}
    for row, head, query, key in cut_edges:
        keys.setdefault((row, head, query), set()).add(key)
    at = {(row, query): int(positions[min(row, len(positions) - 1), query]) for row, _, query, _ in cut_edges}
    return not any(own.issuperset(range(at[row, query] + 1)) for (row, _, query), own in keys.items())


def refuse_later(mask: Tensor) -> None:
    """Raise for a mask `[..., query, key]` by which a token sees later ones.

    Raises:
        NotImplementedError: a change of a token would then change earlier tokens.
    """
    if mask.shape[-1] == mask.shape[-2] and seen(mask).triu(1).any():
        raise NotImplementedError(LATER)


def _table(masks: Sequence[Tensor]) -> Tensor | None:
    if any(mask.is_floating_point() for mask in masks):
        masks = [mask if mask.is_floating_point() else _as_addend(mask) for mask in masks]
    longest = max(masks, key=lambda mask: mask.shape[-1])[:1]
    if all((mask == longest[..., : mask.shape[-2], : mask.shape[-1]]).all() for mask in masks):
        plain = longest.dtype is torch.bool and bool((longest == causal(longest.shape[-1], None, longest.device)).all())
        return None if plain else longest.contiguous()
    empty = False if longest.dtype is torch.bool else float("-inf")
    size, heads = longest.shape[-1], max(mask.shape[1] for mask in masks)
    made = longest.new_full((sum(len(mask) for mask in masks), heads, size, size), empty)
    at = 0
    for mask in masks:
        made[at : at + len(mask), :, : mask.shape[-2], : mask.shape[-1]] = mask
        at += len(mask)
    return made


def _as_addend(sees: Tensor) -> Tensor:
    return torch.zeros_like(sees, dtype=torch.get_default_dtype()).masked_fill(~sees, float("-inf"))
