"""The arguments of a model's call by name, and the number of cached tokens.

The number is read from the cache in the call. Transformers has renamed that argument before (`layer_past`,
`past_key_values`, `cache`), and an overlooked cache shifts every position. So its names stand in one table, and a call
that hints at earlier tokens in another way (an argument of an unknown name, a mask or positions that begin earlier) is
refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from torch import Tensor, nn

from nnsplice.errors import BadArgument, named

#: Names of the cache in a model's call and output, the newest first (transformers 5.24 on; before; of Mamba).
CACHE_NAMES = ("cache", "past_key_values", "cache_params")
#: Its names in calls of a block or its attention.
BLOCK_CACHE_NAMES = frozenset({*CACHE_NAMES, "past_key_value", "layer_past"})
#: Caches that do not tell their number of tokens (XLNet, RWKV, Reformer).
_UNCOUNTED = frozenset({"mems", "state", "past_buckets_states"})
#: Arguments with "cache" or "past" in their name that hold no earlier tokens.
_NO_CACHE = frozenset({"cache_position", "cache_implementation", "past_values", "past_observed_mask"})

_WRITE = (
    f"the cache as {CACHE_NAMES[0]}=... or {CACHE_NAMES[1]}=..., whichever the model's forward names; "
    "or use_cache=False and all tokens in every pass"
)


@lru_cache(maxsize=256)
def parameters_of(kind: type) -> tuple[str, ...]:
    """The names of the arguments of a module's `forward`."""
    return tuple(inspect.signature(kind.forward).parameters)[1:]


def arguments_of(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a module's call by name."""
    return dict(zip(parameters_of(type(module)), args, strict=False)) | dict(kwargs)


def cache_of(named_values: Any) -> Any:
    """The cache in the arguments or in the output of a call; None if there is none."""
    if isinstance(named_values, Mapping):
        values: Any = named_values
    elif isinstance(named_values, tuple):  # an output without names
        return next((value for value in named_values if hasattr(value, "get_seq_length")), None)
    else:  # an output also answers to old names, with a warning; its dictionary has the new one
        values = getattr(named_values, "__dict__", {})
    return next((values[name] for name in CACHE_NAMES if values.get(name) is not None), None)


def cache_argument(module: nn.Module) -> str:
    """The name of the cache argument of this model's `forward`."""
    taken = parameters_of(type(module))
    return next((name for name in CACHE_NAMES if name in taken), CACHE_NAMES[0])


def tokens_before(given: Mapping[str, Any], new: int, prefix: str = "") -> int:
    """The number of tokens of each row before the `new` ones of a pass.

    Args:
        given: the call's arguments.
        prefix: the prefix of the names of a decoder's own mask and positions.

    Raises:
        BadArgument: the call does not tell this number.
    """
    mask = mask_of(given, prefix)
    width = None if mask is None else mask.shape[-1]
    cache = cache_of(given)
    if cache is None:
        _refuse_unknown(given)
        if width is not None and width > new:
            raise _unknown_tokens(f"the mask has {width} columns and the pass {new}, and no cache is given")
        if width is None:
            _refuse_positions(given.get(f"{prefix}position_ids"))
        return 0
    before = _length_of(cache)
    if mask is not None and mask.dim() == 2 and mask.shape[1] < before + new:
        raise BadArgument(
            f"the mask has {width} columns for the {before} tokens in the cache and the {new} of this pass",
            expected=f"a mask of all {before + new} tokens",
        )
    return before


def mask_of(given: Mapping[str, Any], prefix: str = "") -> Tensor | None:
    """The mask of all tokens of a call, `[row, column]` or as blocks take it."""
    mask = given.get(f"{prefix}attention_mask")
    if isinstance(mask, Mapping):  # a mask for each kind of attention, made by `generate` for caches of a fixed size
        mask = mask.get("full_attention")
    return mask if isinstance(mask, Tensor) and mask.dim() in (2, 4) else None


def _length_of(cache: Any) -> int:
    """The number of tokens in a cache."""
    if hasattr(cache, "get_seq_length"):
        try:
            return int(cache.get_seq_length())
        except ValueError as error:  # layers with a recurrent state
            if not cache.has_previous_state():
                return 0
            raise _unknown_tokens(f"the {type(cache).__name__} of this run does not count tokens ({error})") from None
    if isinstance(cache, (Mapping, tuple, list)) and not cache:
        return 0
    raise _unknown_tokens(f"{named(cache)} is given as a cache, and does not say how many tokens it holds")


def _refuse_unknown(given: Mapping[str, Any]) -> None:
    for name, value in given.items():
        if _holds_tokens(name, value):
            raise _unknown_tokens(
                f"{name}={named(value)} looks like a cache of earlier tokens, by a name that is not known"
            )


def _holds_tokens(name: str, value: Any) -> bool:
    if hasattr(value, "get_seq_length"):
        return True
    if value is None or isinstance(value, (bool, int, float, str)) or name in _NO_CACHE:
        return False
    if isinstance(value, (Mapping, tuple, list)) and not value:
        return False
    return name in _UNCOUNTED or "cache" in name or "past" in name


def _refuse_positions(positions: Any) -> None:
    """Raise for positions that begin after 0, without a mask that explains them."""
    if isinstance(positions, Tensor) and positions.numel() and (first := int(positions[..., 0].min())) > 0:
        raise BadArgument(
            f"the positions of this pass begin at {first}, and no cache is given, so whether tokens came before is "
            "unknown",
            expected=_WRITE,
            write="attention_mask=torch.ones_like(input_ids), where none came before",
        )


def _unknown_tokens(found: str) -> BadArgument:
    return BadArgument(f"{found}, so which tokens this pass computes is unknown", expected=_WRITE)
