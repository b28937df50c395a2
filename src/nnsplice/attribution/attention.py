"""Attention with explicit probabilities, to compute exactly how patched queries and keys change them.

Transformers looks its attention function up by name, in a public registry. Under the name registered here stands the
plain one, scores, softmax, mixture, which keeps what it made.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nnsplice import engine

NAME = "nnsplice_probabilities"

#: Arguments of attention modules that do not change the plain form.
_HARMLESS = {
    "is_causal", "position_ids", "cache_position", "use_cache", "output_attentions", *engine.BLOCK_CACHE_NAMES,
    "position_embeddings", "output_router_logits", "return_dict", "logits_to_keep", "sliding_window", "dropout",
}  # fmt: skip


@dataclass(frozen=True)
class AttentionRecord:
    """The inputs and the probabilities of one attention module."""

    #: `[prompt, head, token, width]` and `[prompt, group, token, width]`, as they met: rotated and normalised.
    query: Tensor
    key: Tensor
    #: `[prompt, head, query, key]`, tied to the run.
    probabilities: Tensor
    scaling: float
    #: Added to the scores: no number where a query must not look.
    mask: Tensor | None
    softcap: float | None
    #: A logit for each head that takes its share and gives nothing.
    sinks: Tensor | None

    def scores(self, query: Tensor, key: Tensor) -> Tensor:
        """The attention scores before the softmax: `[prompt, head, query, key]`."""
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        scores = query @ key.transpose(-1, -2) * self.scaling
        if self.softcap is not None:
            scores = (scores / self.softcap).tanh() * self.softcap
        return scores if self.mask is None else scores + self.mask[..., : key.shape[-2]].to(scores)

    def softmax(self, scores: Tensor) -> Tensor:
        """The probabilities that scores make."""
        if self.sinks is None:
            return scores.softmax(-1)
        sinks = self.sinks.to(scores)[None, :, None, None].expand(*scores.shape[:3], 1)
        return torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]


AttentionRecords = dict[nn.Module, AttentionRecord]


class _ActiveRecording(threading.local):
    """This thread's records, and the attention implementation of each config (by id) before."""

    now: tuple[AttentionRecords, dict[int, str]] | None = None


_active = _ActiveRecording()


@contextmanager
def probabilities(root: nn.Module) -> Iterator[AttentionRecords]:
    """Record the inputs of every attention of the model inside the block."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, eager_mask)
    with engine.other_attention(root, NAME) as before:
        outer, _active.now = _active.now, ({}, before)
        try:
            yield _active.now[0]
        finally:
            _active.now = outer


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **more: Any
) -> tuple[Tensor, None]:
    if _active.now is None:
        raise engine.other_thread_error()
    records, before = _active.now
    scaling, softcap, sinks = more.pop("scaling", None), more.pop("softcap", None), more.pop("s_aux", None)
    unknown = [
        name for name, given in more.items() if name not in _HARMLESS and given is not None and given is not False
    ]
    if unknown or module in records:
        raise NotImplementedError(
            f"its attention is given {', '.join(unknown)}" if unknown else "an attention module runs several times"
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    if before.get(id(getattr(module, "config", None))) == "sdpa":
        softcap = None  # sdpa has none: older transformers leave it out without a word, newer ones refuse to run
    plain = AttentionRecord(query, key, query, scaling, attention_mask, softcap, sinks)
    scores = plain.scores(query, key)
    # In half precision the softmax is taken in single, as everywhere in transformers.
    weights = plain.softmax(scores if scores.dtype == torch.float64 else scores.float()).to(value)
    records[module] = AttentionRecord(query.detach(), key.detach(), weights, scaling, attention_mask, softcap, sinks)
    values = value.repeat_interleave(query.shape[1] // value.shape[1], 1)
    return (weights @ values).transpose(1, 2).contiguous(), None  # some modules take a view of it


# --- what a patched query or key does to them -------------------------------------------------------------------------


def worth_of_queries(here: AttentionRecord, there: AttentionRecord, gradient: Tensor) -> Tensor:
    """`[prompt, head, token]`: what the metric gains by each query of the other run, along the probabilities' gradient.

    The probabilities with the other query are computed, not estimated.
    """
    keys = here.key.double()
    moved = here.softmax(here.scores(there.query.double(), keys)) - here.softmax(here.scores(here.query.double(), keys))
    return (moved * gradient.double()).sum(-1)


def worth_of_keys(here: AttentionRecord, there: AttentionRecord, gradient: Tensor) -> Tensor:
    """`[prompt, head, token]`: the same for each key, as each head reads it; a group's is the sum over its heads."""
    query = here.query.double()
    scores, other = here.scores(query, here.key.double()), here.scores(query, there.key.double())
    before, along = here.softmax(scores), gradient.double()
    worth = torch.zeros_like(query[..., 0])
    for token in range(scores.shape[-1]):
        one = scores.clone()
        one[..., token] = other[..., token]
        worth[..., token] = ((here.softmax(one) - before) * along).sum((-1, -2))
    return worth
