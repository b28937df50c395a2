"""What an encoding holds beside its token ids: needed for no run, taken along, or refused, and never left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from nnsplice import engine
from nnsplice.activations.images import Ids, image_token_of
from nnsplice.atlas import unwrap
from nnsplice.errors import BadArgument, ShapeError

#: Read wherever prompts are.
_READ = frozenset({"input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask"})
#: Answers and bookkeeping of tokenizers, and arguments that say how a run is made; a cache with tokens is refused.
_NO_INPUT = frozenset({
    "labels", "length", "offset_mapping", "special_tokens_mask", "overflow_to_sample_mapping", "overflowing_tokens",
    "num_truncated_tokens", "past_key_values", "cache_params", "state", "cache", "cache_position", "use_cache",
    "return_dict", "output_attentions", "output_hidden_states", "logits_to_keep",
})  # fmt: skip
#: A number for each token that says of which kind it is.
_TYPES = ("token_type_ids", "mm_token_type_ids")


def needed(encoding: Mapping[str, Any]) -> bool:
    """Whether it holds more that a run reads than token ids and their mask."""
    return bool(set(encoding) - _NO_INPUT - {"input_ids", "attention_mask"})


def rows(encoding: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """An encoding for each prompt of one.

    Raises:
        ShapeError: an entry has no row for each prompt.
    """
    held = {name: torch.as_tensor(value) for name, value in encoding.items() if name not in _NO_INPUT}
    held = {name: value[None] if value.dim() == 1 else value for name, value in held.items()}
    number = len(held["input_ids"])
    if strange := [name for name, value in held.items() if value.shape[:1] != (number,)]:
        raise ShapeError(
            f"{strange[0]} of shape {list(held[strange[0]].shape)} beside {number} rows of input_ids",
            expected="a row for each prompt",
        )
    return [{name: value[row : row + 1] for name, value in held.items()} for row in range(number)]


def has_types(model: engine.Model, encoding: Any) -> bool:
    """Whether a text beside images says of its tokens what makes its run another one; it is read as those are."""
    if not isinstance(encoding, Mapping) or "input_ids" not in encoding or image_token_of(model) is None:
        return False
    return any(name in encoding and not _are_default(model, name, encoding[name]) for name in _TYPES)


def check(model: engine.Model, prompts: Any) -> None:
    """Raise for an encoding of text, or one of a list of them, that holds what a run would be made without.

    Raises:
        BadArgument: it does, or one of them.
    """
    each = prompts if isinstance(prompts, Sequence) and not isinstance(prompts, str) else [prompts]
    for one in each:
        if isinstance(one, Mapping) and "input_ids" in one and "pixel_values" not in one and not has_types(model, one):
            _check(model, one)


def _check(model: engine.Model, encoding: Mapping[str, Any]) -> None:
    for name in encoding:
        if name in _READ | _NO_INPUT or encoding[name] is None or _is_default(model, name, encoding):
            continue
        raise BadArgument(
            f"this encoding holds {name} beside its input_ids, and prompts of text are run without that",
            expected="input_ids and attention_mask; images as pixel_values",
            write='{"input_ids": encoding["input_ids"], "attention_mask": encoding["attention_mask"]}, if the run '
            "without it is meant",
        )


def check_decoder(model: engine.Model, ids: Ids, decoder: Ids) -> None:
    """Raise for a decoder's tokens that belong to no decoder, or not to these prompts.

    Raises:
        BadArgument: the model has one tower.
        ShapeError: not as many rows.
    """
    if not engine.is_encoder_decoder(model):
        raise BadArgument(
            f"these prompts hold decoder_input_ids, and {type(unwrap(model)).__name__} has no decoder beside an "
            "encoder",
            expected="input_ids alone",
        )
    if len(decoder) != len(ids):
        raise ShapeError(
            f"{len(ids)} rows of input_ids and {len(decoder)} of decoder_input_ids", expected="one for each prompt"
        )
    if not all(decoder):
        row = next(row for row, tokens in enumerate(decoder) if not tokens)
        raise BadArgument(f"prompt {row} has no tokens for the decoder", expected="at least one token in every prompt")


def _is_default(model: engine.Model, name: str, encoding: Mapping[str, Any]) -> bool:
    """Whether a run without this argument is the run with it."""
    if name in _TYPES:
        return _are_default(model, name, encoding[name])
    if name not in ("position_ids", "decoder_position_ids"):
        return False
    positions = torch.as_tensor(encoding[name])
    mask = encoding.get(name.replace("position_ids", "attention_mask"))
    own = torch.ones_like(positions) if mask is None else torch.as_tensor(mask)
    if positions.shape != own.shape:
        return False
    own = own.bool()
    return bool(((own.cumsum(-1) - 1 == positions) | ~own).all())


def _are_default(model: engine.Model, name: str, types: Any) -> bool:
    """Whether kinds of tokens are those of a run without them."""
    root = unwrap(model)
    if name not in engine.taken_by(type(root)).names:
        return True
    if bool(torch.as_tensor(types).any()):
        return False
    config = getattr(root, "config", None)
    # Elsewhere zeros are a kind too: GPT-2 adds an embedding for it, PaliGemma reads such tokens both ways.
    return (
        name == "mm_token_type_ids"
        or hasattr(config, "type_vocab_size")
        or str(getattr(config, "model_type", "")).startswith("gemma3")
    )
