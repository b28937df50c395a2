"""Inside a trace: padding and the positions of prompts' own tokens, from the model's call."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from nnsplice.atlas import unwrap
from nnsplice.engine.arguments import arguments_of, tokens_before
from nnsplice.engine.models import is_encoder_decoder, tokenizer_of
from nnsplice.engine.tracing import Mediator, Model, call_of
from nnsplice.tokens import Rows


@dataclass(frozen=True, slots=True)
class Batch:
    """The tokens of a run: the columns of each row's own tokens by tower, and the ids if they were given."""

    decoder: Rows
    encoder: Rows
    ids: Tensor | None = None

    def rows(self, tower: str) -> Rows:
        """The rows of one tower; the same for both names in a model with one tower."""
        return self.encoder if tower == "encoder" else self.decoder


#: By the worker of a block: the block of an nnsight edit runs in every pass, each time with other prompts.
_batches: weakref.WeakKeyDictionary[Any, dict[int, Batch]] = weakref.WeakKeyDictionary()


def batch_of(model: Model, mediator: Mediator) -> Batch:
    """The tokens of the forward pass of this trace's block.

    They are read from the model's call before it runs, and kept for the block. Later, positions can only be counted
    from the end without padding, except for a single row, which has no padding.
    """
    key = f"{model.path}.input"
    seen = mediator.occurrence(key)
    step = mediator.iteration if mediator.iteration is not None else max(seen - 1, 0)
    known = _batches.setdefault(mediator.worker, {})
    if step in known:
        return known[step]
    if seen <= step:
        known[step] = _batch(model, *call_of(model))
        return known[step]
    if _single_row(mediator):
        return Batch(Rows(1), Rows(1))
    left = getattr(tokenizer_of(model), "padding_side", "left") == "left"
    unknown = Rows(None, known=False, pads_left=left and not is_encoder_decoder(model))
    return Batch(unknown, unknown)


def _single_row(mediator: Mediator) -> bool:
    batcher = None if mediator.interleaver is None else mediator.interleaver.batcher
    if batcher is None or batcher.total != 1:
        return False
    (inputs, kwargs) = batcher.invokes[0]
    return "attention_mask" not in kwargs and not any(isinstance(value, Mapping) for value in inputs)


def _batch(model: Model, args: tuple, kwargs: dict) -> Batch:
    given = arguments_of(unwrap(model), args, kwargs)
    if not is_encoder_decoder(model):
        rows, ids = _rows(given, "", "decoder"), given.get("input_ids")
        return Batch(rows, rows, ids if isinstance(ids, Tensor) else None)
    ids = given.get("decoder_input_ids")
    return Batch(
        _rows(given, "decoder_", "decoder"), _rows(given, "", "encoder"), ids if isinstance(ids, Tensor) else None
    )


def _rows(given: Mapping[str, Any], prefix: str, tower: str) -> Rows:
    mask = given.get(f"{prefix}attention_mask")
    ids = given.get(f"{prefix}input_ids")
    ids = ids if isinstance(ids, Tensor) else given.get(f"{prefix}inputs_embeds")
    batch, new = ids.shape[:2] if isinstance(ids, Tensor) and ids.dim() > 1 else (None, None)
    # A decode step computes the newest token; the cache has the earlier ones.
    cached = 0 if new is None or tower == "encoder" else tokens_before(given, new, prefix)
    if isinstance(mask, Tensor) and mask.dim() == 2:
        rows = Rows.from_mask(mask)
        return replace(rows, batch=batch or rows.batch, new=new)
    return Rows(batch, None if new is None else cached + new, new=new)
