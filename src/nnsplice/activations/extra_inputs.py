"""Entries of an encoding besides its token ids: passed on, ignored if a run does not depend on them, or refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch

from nnsplice import engine
from nnsplice.activations.images import Ids, image_token_of
from nnsplice.atlas import unwrap
from nnsplice.errors import BadArgument, ShapeError

#: Entries that every prompt is read from.
_TOKEN_INPUTS = frozenset({"input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask"})
#: Labels, bookkeeping of tokenizers and run options. A cache that holds tokens is refused elsewhere.
_NO_INPUT = frozenset({
    "labels", "length", "offset_mapping", "special_tokens_mask", "overflow_to_sample_mapping", "overflowing_tokens",
    "num_truncated_tokens", "past_key_values", "cache_params", "state", "cache", "cache_position", "use_cache",
    "return_dict", "output_attentions", "output_hidden_states", "logits_to_keep",
})  # fmt: skip
#: Entries with the type of each token.
_TYPES = ("token_type_ids", "mm_token_type_ids")


def has_extra(encoding: Mapping[str, Any]) -> bool:
    """Whether a run may depend on more than the token ids and their mask."""
    return bool(set(encoding) - _NO_INPUT - {"input_ids", "attention_mask"})


def split_rows(encoding: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Split an encoding of several prompts into one for each.

    Raises:
        ShapeError: an entry has no row for each prompt.
    """
    tensors = {name: torch.as_tensor(value) for name, value in encoding.items() if name not in _NO_INPUT}
    tensors = {name: value[None] if value.dim() == 1 else value for name, value in tensors.items()}
    number = len(tensors["input_ids"])
    if wrong := [name for name, value in tensors.items() if value.shape[:1] != (number,)]:
        raise ShapeError(
            f"{wrong[0]} of shape {list(tensors[wrong[0]].shape)} beside {number} rows of input_ids",
            expected="a row for each prompt",
        )
    return [{name: value[row : row + 1] for name, value in tensors.items()} for row in range(number)]


def has_token_types(model: engine.Model, encoding: Any) -> bool:
    """Whether a text for a model with images has token types that change its run; it is then read like images."""
    if not isinstance(encoding, Mapping) or "input_ids" not in encoding or image_token_of(model) is None:
        return False
    return any(name in encoding and not _are_default_types(model, name, encoding[name]) for name in _TYPES)


def check_extra(model: engine.Model, prompts: Any) -> None:
    """Raise for encodings of text with an entry that a run here would ignore.

    Raises:
        BadArgument: names the entry.
    """
    each = prompts if isinstance(prompts, Sequence) and not isinstance(prompts, str) else [prompts]
    for prompt in each:
        is_text = isinstance(prompt, Mapping) and "input_ids" in prompt and "pixel_values" not in prompt
        if is_text and not has_token_types(model, prompt):
            _check_encoding(model, cast("Mapping[str, Any]", prompt))


def _check_encoding(model: engine.Model, encoding: Mapping[str, Any]) -> None:
    for name in encoding:
        if name in _TOKEN_INPUTS | _NO_INPUT or encoding[name] is None or _is_default(model, name, encoding):
            continue
        raise BadArgument(
            f"this encoding holds {name} beside its input_ids, and prompts of text are run without that",
            expected="input_ids and attention_mask; images as pixel_values",
            write='{"input_ids": encoding["input_ids"], "attention_mask": encoding["attention_mask"]}, if the run '
            "without it is meant",
        )


def check_decoder(model: engine.Model, ids: Ids, decoder: Ids) -> None:
    """Raise for decoder tokens that do not fit the model or the prompts.

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
    """Whether the run is the same without this argument."""
    if name in _TYPES:
        return _are_default_types(model, name, encoding[name])
    if name not in ("position_ids", "decoder_position_ids"):
        return False
    positions = torch.as_tensor(encoding[name])
    mask = encoding.get(name.replace("position_ids", "attention_mask"))
    own = torch.ones_like(positions) if mask is None else torch.as_tensor(mask)
    if positions.shape != own.shape:
        return False
    own = own.bool()
    return bool(((own.cumsum(-1) - 1 == positions) | ~own).all())


def _are_default_types(model: engine.Model, name: str, types: Any) -> bool:
    """Whether the run is the same without these token types."""
    root = unwrap(model)
    if name not in engine.signature_of(type(root)).names:
        return True
    if bool(torch.as_tensor(types).any()):
        return False
    config = getattr(root, "config", None)
    # In other models 0 is a type as well: GPT-2 adds its embedding, PaliGemma attends to such tokens both ways.
    return (
        name == "mm_token_type_ids"
        or hasattr(config, "type_vocab_size")
        or str(getattr(config, "model_type", "")).startswith("gemma3")
    )
