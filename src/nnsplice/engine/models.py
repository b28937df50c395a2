"""Properties of a whole model: name, tokenizer, towers, causality."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any

from torch import nn

from nnsplice.atlas import text_config, unwrap
from nnsplice.atlas.families import NOT_TEXT, POSITIONS
from nnsplice.engine.hooks import has_own_code
from nnsplice.engine.sharding import accepting_sharded, check_unsharded
from nnsplice.engine.tracing import Model
from nnsplice.errors import BadArgument, BadType, named


def as_model(model: object, *, sharded: bool = False) -> Model:
    """The nnsight model, or an error that says how to make one.

    Args:
        sharded: accept a model over several processes; the caller reads its values through `gather`.
    """
    if not isinstance(model, Model):
        raise BadType(
            f"{named(model)} is not wrapped for tracing",
            expected="an nnsight model",
            write=f"model = ns.load({'name' if isinstance(model, str) else 'module, tokenizer=tokenizer'})",
        )
    if model.parent is not None:
        raise BadArgument(f"{model.path} is a part of a model", expected="the whole model, which the paths start from")
    with accepting_sharded(model) if sharded else nullcontext():
        check_unsharded(unwrap(model))
    return model


def tokenizer_of(model: Model) -> Any:
    """The model's tokenizer, or None."""
    held = model.__dict__
    return held.get("tokenizer") or getattr(held.get("processor"), "tokenizer", None)


def token_texts(model: Model, rows: Iterable[Iterable[int]]) -> tuple[tuple[str, ...], ...]:
    """Each token by itself as text, or its number where the model has no tokenizer."""
    tokenizer = tokenizer_of(model)
    return tuple(tuple(str(t) if tokenizer is None else tokenizer.decode([t]) for t in row) for row in rows)


def check_tokens(model: Model, rows: Iterable[Sequence[int]]) -> None:
    """Raise for tokens and positions without a row in the embeddings; torch would name neither prompt nor token."""
    module = unwrap(model)
    words: int = getattr(_embedding(module), "num_embeddings", 0)
    learned = [
        inner.num_embeddings
        for name, inner in module.named_modules()
        if isinstance(inner, nn.Embedding)
        and name.rpartition(".")[2] in POSITIONS
        and not NOT_TEXT & set(name.split("."))
    ]
    for number, ids in enumerate(rows):
        strange = next((token for token in ids if not 0 <= token < words), None)
        if words and strange is not None:
            raise BadArgument(
                f"prompt {number} has the token id {strange}, and the model has no such token",
                expected=f"ids from 0 to {words - 1}; the tokenizer has to be this model's own",
            )
        if learned and len(ids) > min(learned):
            raise BadArgument(
                f"prompt {number} has {len(ids)} tokens, and the model has positions for {min(learned)}",
                expected="shorter prompts",
            )


def _embedding(module: Any) -> Any:
    try:
        return module.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # no Hugging Face model, or one without an answer
        return None


def is_encoder_decoder(model: Model) -> bool:
    """Whether the model has two towers."""
    return bool(getattr(getattr(unwrap(model), "config", None), "is_encoder_decoder", False))


def is_edited(model: Model) -> bool:
    """Whether the model has edits of nnsight, which apply in traces and not in plain calls of its module."""
    return bool(model._edits)


def refuse_edits(model: Model) -> None:
    """Raise for a model with edits where its module is called without a trace.

    Raises:
        BadArgument: the edits would have no effect.
    """
    if is_edited(model):
        raise BadArgument(
            "this model has edits of nnsight (model.edit), and what runs here calls its module without them",
            write="model.clear_edits(), or the model that was edited into a copy",
        )


def in_training(model: Model) -> bool:
    """Whether any part of the model is in train mode."""
    return any(module.training for module in unwrap(model).modules())


def keeps_logits(model: Model) -> bool:
    """Whether the model can be asked for the logits of its last tokens only, and runs all its layers on all tokens."""
    root = unwrap(model)
    if not _takes_logits(type(root)):
        return False
    # User code behind the layers would get these tokens only, and it may mix them.
    inside = f"{getattr(root, 'base_model_prefix', '')}."
    outer = [module for name, module in root.named_modules() if not f"{name}.".startswith(inside)]
    if has_own_code(outer):
        return False
    # Gemma 4 hands the argument to its layers that share keys and values, which then run for the last tokens only.
    inner = {type(module) for module in root.modules() if hasattr(module, "config")} - {type(root)}
    return not any(_takes_logits(kind) for kind in inner)


@cache
def _takes_logits(kind: type) -> bool:
    return "logits_to_keep" in inspect.signature(kind.forward).parameters  # type: ignore[attr-defined]


def attention_of(model: Model) -> str | None:
    """The name of the attention implementation; None if the config has none."""
    return getattr(text_config(unwrap(model)), "_attn_implementation", None)


def decoder_start(model: Model) -> int:
    """The first token of the decoder of a model with two towers."""
    config = unwrap(model).config
    for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id"):
        token = getattr(config, name, None)
        if isinstance(token, int):
            return token
    raise BadArgument("this model's config names no token for its decoder to start with", expected="decoder_input_ids")


def name_of(model: Model) -> tuple[str, str | None]:
    """The name of a model in results: the checkpoint's name or the class, and the revision."""
    module = unwrap(model)
    kind = type(module)
    if kind.__bases__[0].__name__ == "FSDPModule":  # fully_shard makes a subclass of the model's class
        kind = kind.__bases__[1]
    name = getattr(getattr(module, "config", None), "_name_or_path", "") or kind.__name__
    return name, model.__dict__.get("revision")
