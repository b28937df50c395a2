"""Prompts of different lengths, padded to one batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nnsplice import engine
from nnsplice.atlas import unwrap


def padded(rows: Sequence[Sequence[int]], token: int, *, left: bool) -> tuple[Tensor, Tensor]:
    """The padded ids, and their attention mask."""
    width = max(map(len, rows))
    ids, mask = [], []
    for row in rows:
        fill, none, own = [token] * (width - len(row)), [0] * (width - len(row)), [1] * len(row)
        ids.append([*fill, *row] if left else [*row, *fill])
        mask.append([*none, *own] if left else [*own, *none])
    return torch.tensor(ids), torch.tensor(mask)


def padding_of(model: engine.Model) -> int:
    """The id of padding: any token, as it is masked."""
    known = (engine.tokenizer_of(model), getattr(unwrap(model), "config", None))
    named = (getattr(one, name, None) for name in ("pad_token_id", "eos_token_id") for one in known)
    return next((token for token in named if isinstance(token, int)), 0)
