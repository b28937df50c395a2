"""Attention for packed tokens, through the attention registry of transformers.

Transformers looks up its attention function by name in a public registry. The name registered here calls the function
that `attention(root, attend)` has set: one that records keys, values and masks of a whole run, or one that lets each
packed row attend to the recorded prefix and its own tokens. The arithmetic is left to the model's own function (sdpa,
eager, ...).
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nnsplice import engine
from nnsplice.errors import RefusedExecutor
from nnsplice.packed.layout import AttentionGroup
from nnsplice.packed.masks import LATER, causal, without

NAME = "nnsplice_packed"
#: `[group, token, width]` each.
KeyValue = tuple[Tensor, Tensor]

#: Arguments of attention modules that do not change the result for given queries, keys and values.
_RUN_ARGUMENTS = {
    "position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states",
    *engine.BLOCK_CACHE_NAMES, "position_embeddings", "output_router_logits", "return_dict", "logits_to_keep",
}  # fmt: skip
#: Arguments that attention functions of transformers read.
_KNOWN = {"dropout", "scaling", "softcap", "s_aux", "sliding_window"}


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """One call of a model's attention function; queries, keys and values are `[batch, head, token, width]`."""

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    #: The mask that the module was called with.
    mask: Tensor | None
    is_causal: bool
    #: The other arguments of the function: scaling, softcap, ...
    more: Mapping[str, Any]
    #: The name of the model's own attention function: `"sdpa"`, `"eager"`, ...
    own: str

    def attended(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """The model's own function for other tokens: `[row, query, head, width]`.

        Args:
            mask: `[row or 1, head or 1, query, key]`: True where a query sees a key, or numbers added to the scores;
                None if every query sees every key.
        """
        if self.own != "eager":
            return _registered("sdpa")(self.module, query, key, value, mask, is_causal=False, **self.more)[0]
        if mask is not None and mask.dtype is torch.bool:
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
        return _eager(self.module)(self.module, query, key, value, mask, **self.more)[0]

    @property
    def masks_by_arguments(self) -> bool:
        """Whether the mask is given by arguments such as `sliding_window` only, as for flash attention."""
        return "flash" in self.own


Attend = Callable[[AttentionCall], Tensor]


class _Active(threading.local):
    """The attention function set in this thread, and the model's own one: its name by the config's id."""

    now: tuple[Attend, Mapping[int, str]] | None = None

    def __call__(self) -> tuple[Attend, Mapping[int, str]]:
        if self.now is None:
            raise engine.other_thread_error()
        return self.now


_active = _Active()


@contextmanager
def attention(root: nn.Module, attend: Attend) -> Iterator[None]:
    """In this block every attention of the model runs `attend`; the model's own function is restored at the end.

    It holds in this thread only; a run of the model in another thread is refused meanwhile.
    """
    _register()
    with engine.other_attention(root, NAME) as before:
        outer = _active.now
        own = {i: outer[1].get(i, "sdpa") if name == NAME and outer is not None else name for i, name in before.items()}
        _active.now = (attend, own)
        try:
            yield
        finally:
            _active.now = outer


def is_exchanged() -> bool:
    """Whether an attention function is set in this thread."""
    return _active.now is not None


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _dispatch)
    AttentionMaskInterface.register(NAME, _mask)


def _registered(name: str) -> Callable[..., Any]:
    from transformers import AttentionInterface

    return AttentionInterface()[name]


def _eager(module: nn.Module) -> Callable[..., Any]:
    """The eager attention of a module, a function in the file of its class."""
    for kind in type(module).__mro__:
        found = getattr(sys.modules.get(kind.__module__), "eager_attention_forward", None)
        if found is not None:
            return found
    raise NotImplementedError("its attention is eager, and the function that computes it was not found")


def _own(config: Any) -> str:
    return _active()[1].get(id(config)) or "sdpa"


def _mask(*args: Any, **kwargs: Any) -> Any:
    """The mask of the model's own attention, as a tensor also where sdpa would use `is_causal` instead."""
    from transformers import AttentionMaskInterface

    made = AttentionMaskInterface()["eager" if _own(kwargs.get("config")) == "eager" else "sdpa"]
    return made(*args, **{**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})


def _dispatch(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **more: Any
) -> tuple[Tensor, None]:
    attend, _ = _active()
    is_causal = more.pop("is_causal", None)
    given = {name: value for name, value in more.items() if name not in _RUN_ARGUMENTS}
    unknown = [n for n, value in given.items() if n not in _KNOWN and value is not None and value is not False]
    if unknown:
        raise RefusedExecutor(f"its attention is given {', '.join(unknown)}, which packed rows do not handle")
    call = AttentionCall(
        module,
        query,
        key,
        value,
        attention_mask,
        getattr(module, "is_causal", True) if is_causal is None else is_causal,
        {name: value for name, value in given.items() if name in _KNOWN},
        _own(getattr(module, "config", None)),
    )
    return attend(call), None


# --- the two uses -----------------------------------------------------------------------------------------------------


@dataclass
class KeyValueRecorder:
    """Keys, values and masks of a whole run, by attention module."""

    #: `[prompt, group, token, width]`
    key_values: dict[nn.Module, tuple[Tensor, Tensor]] = field(default_factory=dict)
    masks: dict[nn.Module, Tensor] = field(default_factory=dict)
    #: The tensor arguments of the block that runs now.
    block_inputs: Sequence[Tensor] = ()
    #: Masks of attention that is masked by arguments: by length, window and device.
    _built: dict[tuple[int, int | None, torch.device], Tensor] = field(default_factory=dict, repr=False)
    #: Masks that accelerate copied to a block's device: by the id of the original and the device.
    _moved: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    def __call__(self, call: AttentionCall) -> Tensor:
        """Record a call, and run the model's own attention."""
        if call.module in self.key_values:
            raise NotImplementedError("one attention module runs several times in a pass")
        self.key_values[call.module] = (call.key, call.value)
        self.masks[call.module] = mask = self._mask(call)
        return call.attended(call.query, call.key, call.value, mask)

    def _mask(self, call: AttentionCall) -> Tensor:
        mask, length = call.mask, call.key.shape[2]
        if call.masks_by_arguments or mask is None:
            if not call.is_causal or (call.own == "eager" and mask is None):
                raise NotImplementedError(LATER)
            window = call.more.get("sliding_window") if call.masks_by_arguments else None
            device = call.key.device
            return self._built.setdefault((length, window, device), causal(length, window, device))
        if not isinstance(mask, Tensor):
            raise NotImplementedError(f"its attention is given a {type(mask).__name__} as a mask")
        memory = mask.untyped_storage().data_ptr()
        if any(tensor.untyped_storage().data_ptr() == memory for tensor in self.block_inputs):
            return mask
        # accelerate copies the arguments of a block on another device.
        for given in self.block_inputs:
            if given.device != mask.device and given.shape == mask.shape and given.dtype == mask.dtype:
                known = self._moved.get((id(given), mask.device))
                if known is not None and known[0] is given and torch.equal(known[1], mask):
                    return known[1]
                if torch.equal(given.to(mask.device), mask):
                    self._moved[id(given), mask.device] = given, mask
                    return mask
        raise NotImplementedError("its layers compute a mask of their own from what they are given")


@dataclass
class PackedAttention:
    """Attention of packed rows over the recorded prefix and their own tokens."""

    #: Keys and values of all recorded tokens, by attention module.
    recorded: Mapping[nn.Module, KeyValue]
    #: The masks of the recorded prompts, by attention module; see `masks.tables`.
    masks: Mapping[nn.Module, Tensor | None]
    groups: Sequence[AttentionGroup]
    #: The rows' own keys and values from an earlier pass through this block; None: those of this call.
    own: KeyValue | None = None
    #: Whether to leave the block (`LeftBlock`) once the rows' own keys and values are known.
    stops_at_keys: bool = False
    #: Knockouts: token of the pack -> pairs of a head and the position of a key that it does not see.
    cut_edges: Mapping[int, Sequence[tuple[int, int]]] = field(default_factory=dict)

    def __call__(self, call: AttentionCall) -> Tensor:
        """`[1, token, head, width]` for the packed tokens."""
        query, module = call.query, call.module
        if module not in self.recorded:
            raise NotImplementedError("an attention module runs that the recorded pass did not run")
        if self.stops_at_keys:
            raise LeftBlock((call.key[0], call.value[0]))
        own = self.own or (call.key[0], call.value[0])
        keys, values = (torch.cat(pair, 1) for pair in zip(self.recorded[module], own, strict=True))
        out = query.new_empty(1, query.shape[2], query.shape[1], values.shape[-1])
        for group in self.groups:
            at = group.queries.tensor
            own_queries = query[0][:, at].transpose(0, 1)
            k, v = (t[:, group.keys.tensor].transpose(0, 1) for t in (keys, values))
            table = self.masks[module]
            mask = group.mask(table)
            if self.cut_edges and (edges := group.edges(self.cut_edges)):
                rows, heads, queries, _ = own_queries.shape
                known = group.positions.array if table is None else None
                mask = without(mask, (rows, heads, queries, k.shape[2]), edges, own_queries.device, known)
            out[0, at] = call.attended(own_queries, k, v, mask).to(out)
        return out


class LeftBlock(Exception):  # no error: ends a block that ran for its keys and values only
    """Ends a pass through a block once its keys and values are known."""

    def __init__(self, own: KeyValue) -> None:
        super().__init__("a block was left early")
        self.own = own
