"""Attention for packed tokens: Hugging Face's blocks as they are, with one function of theirs exchanged.

Transformers looks its attention function up by name, in a public registry. Under the name registered here a function
runs that the caller has chosen for the time being: one that records the keys and values of a whole run, or one that
lets each packed row attend to the recorded prefix and its own tokens.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnsplice import engine
from nnsplice.sweeps.packed.layout import Group, visible

NAME = "nnsplice_packed"
#: `(attention module, query, key, value, variant)` -> `[batch, token, head, width]`; heads first in what comes in.
Attend = Callable[[nn.Module, Tensor, Tensor, Tensor, "Variant"], Tensor]
#: `[group, token, width]` each.
KeyValue = tuple[Tensor, Tensor]


class _Active(threading.local):
    """What runs in this thread, and what ran before: the name of its attention by each config's id."""

    now: tuple[Attend, Mapping[int, str]] | None = None

    def __call__(self) -> tuple[Attend, Mapping[int, str]]:
        if self.now is None:
            raise engine.elsewhere()
        return self.now


_active = _Active()

#: What attention modules pass along that changes nothing here, or is None or zero outside of training.
_HARMLESS = {
    "attention_mask", "dropout", "is_causal", "position_ids", "cache_position", "use_cache", "output_attentions",
    "past_key_values", "position_embeddings", "output_router_logits", "return_dict", "logits_to_keep",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Variant:
    """How this attention differs from the plain one."""

    scaling: float
    #: A query sees this many tokens back, itself included; None for all.
    window: int | None = None
    softcap: float | None = None
    #: A logit for each head that takes its share of the probability and gives nothing.
    sinks: Tensor | None = None


@contextmanager
def attention(root: nn.Module, attend: Attend) -> Iterator[None]:
    """Let every attention of the model run `attend`; the model's own choice is back afterwards, whatever happens.

    It runs in this thread alone: another that runs the model meanwhile is refused.
    """
    _register()
    with engine.other_attention(root, NAME) as before:
        outer, _active.now = _active.now, (attend, before)
        try:
            yield
        finally:
            _active.now = outer


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _dispatch)
    # Which token sees which is decided here, so no mask need be made.
    AttentionMaskInterface.register(NAME, _no_mask)


def _no_mask(*_: Any, **__: Any) -> None:
    _active()


def _dispatch(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **more: Any
) -> tuple[Tensor, None]:
    attend, before = _active()
    scaling, softcap = more.pop("scaling", None), more.pop("softcap", None)
    if before.get(id(getattr(module, "config", None))) == "sdpa":
        softcap = None  # sdpa has none: older transformers leave it out without a word, newer ones refuse to run
    variant = Variant(
        query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        more.pop("sliding_window", None), softcap, more.pop("s_aux", None),
    )  # fmt: skip
    unknown = [
        name for name, given in more.items() if name not in _HARMLESS and given is not None and given is not False
    ]
    if unknown:
        raise NotImplementedError(f"its attention is given {', '.join(unknown)}, which packed rows do not handle")
    return attend(module, query, key, value, variant), None


def attended(query: Tensor, key: Tensor, value: Tensor, sees: Tensor | None, variant: Variant) -> Tensor:
    """Attention of `[row, head, query, width]` over `[row, group, key, width]`: `[row, query, head, width]`.

    Args:
        sees: `[row or 1, 1, query, key]`, which token sees which; None for all.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if variant.softcap is None and variant.sinks is None:
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=sees, scale=variant.scaling)
        return out.transpose(1, 2)
    scores = query @ key.transpose(-1, -2) * variant.scaling
    if variant.softcap is not None:
        scores = (scores / variant.softcap).tanh() * variant.softcap
    if sees is not None:
        scores = scores.masked_fill(~sees, float("-inf"))
    if variant.sinks is not None:
        sinks = variant.sinks.to(scores)[None, :, None, None].expand(*scores.shape[:3], 1)
        weights = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
    else:
        # Transformers' own code for capped scores takes the softmax in float32, whatever the model's dtype.
        weights = scores.softmax(-1, dtype=torch.float32).to(scores)
    return (weights @ value).transpose(1, 2)


# --- the two uses -----------------------------------------------------------------------------------------------------


@dataclass
class KeysAndValues:
    """Keys and values of a whole run, by attention module: `[prompt, group, token, width]`."""

    of: dict[nn.Module, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __call__(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, variant: Variant) -> Tensor:
        """Plain causal attention that keeps what it is given."""
        if module in self.of:
            raise NotImplementedError("one attention module runs several times in a pass")
        self.of[module] = (key, value)
        length = key.shape[2]
        sees = visible(torch.arange(length, device=key.device)[None], length, variant.window)
        return attended(query, key, value, sees, variant)


@dataclass
class Packed:
    """Attention of packed rows over the recorded prefix and their own tokens."""

    #: Of all recorded tokens, by attention module.
    recorded: Mapping[nn.Module, KeyValue]
    groups: Sequence[Group]
    #: Own keys and values from an earlier pass through this block, whose queries were not asked.
    own: KeyValue | None = None
    #: Whether this is such an earlier pass.
    leaves: bool = False

    def __call__(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, variant: Variant) -> Tensor:
        """`[1, token, head, width]` for the packed tokens."""
        if module not in self.recorded:
            raise NotImplementedError("an attention module runs that the recorded pass did not run")
        if self.leaves:
            raise Left((key[0], value[0]))
        own = self.own or (key[0], value[0])
        keys, values = (torch.cat(pair, 1) for pair in zip(self.recorded[module], own, strict=True))
        out = query.new_empty(1, query.shape[2], query.shape[1], value.shape[-1])
        for group in self.groups:
            asks = query[0][:, group.asks].transpose(0, 1)
            k, v = (t[:, group.keys].transpose(0, 1) for t in (keys, values))
            out[0, group.asks] = attended(asks, k, v, group.sees(variant.window), variant)
        return out


class Left(Exception):  # no error: the way out of a block that was entered for its keys and values alone
    """A pass through a block ended where its keys and values were known."""

    def __init__(self, own: KeyValue) -> None:
        super().__init__("a block was left early")
        self.own = own
