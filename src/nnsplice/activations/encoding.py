"""`encode`: prompts in any form that a user gives, as `Prompts`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from nnsplice import engine
from nnsplice.activations import extra_inputs
from nnsplice.activations import sounds as sound_values
from nnsplice.activations.image_inputs import encodings_of, has_images, have_images, images_of, is_pair, pairs_of
from nnsplice.activations.images import Ids, PromptImages, check_without, spans_of_images
from nnsplice.activations.messages import is_chat, templated
from nnsplice.activations.named_spans import bounds_of
from nnsplice.activations.prompts import Prompts, PromptsLike, SpanTexts
from nnsplice.activations.sounds import Sound
from nnsplice.atlas import unwrap
from nnsplice.errors import BadArgument, BadType, ShapeError, named
from nnsplice.warn import warn_caller


def encode(
    model: engine.Model,
    prompts: PromptsLike,
    spans: SpanTexts | None = None,
    *,
    images: bool = False,
    sounds: bool = False,
) -> Prompts:
    """Prompts in any form as `Prompts`, checked; the first is the probe of a module of the user's own.

    Args:
        images: whether the caller supports prompts with images.
        sounds: whether the caller supports audio.

    Raises:
        BadArgument: prompts with images or sounds, for a caller that takes none.
    """
    given = prompts if isinstance(prompts, Prompts) else _prompts(model, prompts, spans)
    if given.images is not None and not images:
        raise BadArgument(
            "these prompts hold images, and this question runs on tokens alone",
            expected="prompts of text; ns.capture, ns.sweep, ns.ablate, ns.attribute, ns.path_patch, ns.causal_trace, "
            "ns.patched_logits, ns.align, ns.steering.fit_from_prompts and the logit lens take images",
        )
    if given.sounds is not None and not sounds:
        raise BadArgument(
            f"these prompts are {given.sounds[0].name}, and this question runs on tokens alone",
            expected="ns.capture, ns.patched_logits, ns.sweep, ns.ablate or ns.attribute, which take them",
        )
    if given is prompts:
        return given
    if len(given):
        engine.offer_probe(model, lambda: given.inputs([0], model.device), always=given.sounds is not None)
    return given


def _prompts(model: engine.Model, prompts: Any, spans: SpanTexts | None) -> Prompts:
    if spans is not None and not isinstance(spans, Mapping):
        raise BadType(f"spans is {named(spans)}", expected='a name for each span: spans={"subject": [...]}')
    if isinstance(prompts, Tensor) and prompts.is_floating_point():
        if prompts.dim() != 3 and not (prompts.dim() == 2 and _is_plain(model)):
            raise BadType(
                f"prompts of shape {list(prompts.shape)} and {prompts.dtype}",
                expected="token ids, which are integers [prompt, token], or values [prompt, token, width]",
                write="ids.long()",
            )
        if spans:
            raise BadArgument("spans are stretches of tokens, and these prompts are values, not tokens")
        return Prompts(values=prompts)
    if isinstance(prompts, Mapping) and "input_ids" not in prompts and not is_chat(prompts) and _is_plain(model):
        return _named_inputs(model, prompts)
    if (sounds := sound_values.sounds_of(model, prompts)) is not None:
        return _audio_prompts(model, prompts, sounds, spans)
    extra_inputs.check_extra(model, prompts)
    images = None
    chats = [prompts] if is_chat(prompts) else _several_chats(prompts)
    chats = [] if have_images(chats) else chats
    if chats:
        texts, ids, messages = _chats(model, chats)
        decoder_ids = None
    else:
        texts, ids, decoder_ids, images = _ids(model, prompts)
        messages = {} if images is None else spans_of_images(model, ids, images)
    if not ids:
        raise BadArgument("no prompts", expected="at least one prompt")
    for row, tokens in enumerate(ids):
        if not tokens:
            raise BadArgument(f"prompt {row} has no tokens", expected="at least one token in every prompt")
    engine.check_tokens(model, ids)
    if images is None:
        check_without(model, ids)
        if texts is not None and not chats:
            _warn_of_unknown(engine.tokenizer_of(model), texts, ids)
    named_spans = {name: tuple(bounds_of(model, name, of, texts, ids)) for name, of in (spans or {}).items()}
    found = None if spans is None and not messages else {**messages, **named_spans}
    # With images, the texts alone do not determine the tokens.
    texts = texts if images is None else None
    if decoder_ids is not None:
        extra_inputs.check_decoder(model, ids, decoder_ids)
    if engine.is_encoder_decoder(model) and decoder_ids is None:
        decoder_ids = ((engine.decoder_start(model),),) * len(ids)
    return Prompts(ids, texts, decoder_ids, None, found, engine.signature_of(type(unwrap(model))), images=images)


def _warn_of_unknown(tokenizer: Any, texts: Sequence[str], ids: Ids) -> None:
    """Warn of words outside the vocabulary: all become one token, so prompts that differ in them are the same."""
    unknown, token = getattr(tokenizer, "unk_token_id", None), str(getattr(tokenizer, "unk_token", None))
    # Some tokenizers have the end of a text as their unknown token, which may be meant.
    if unknown is None or token in (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token):
        return
    for row, (text, tokens) in enumerate(zip(texts, ids, strict=True)):
        if unknown in tokens and token not in text:
            what = f"{tokens.count(unknown)} words"
            if getattr(tokenizer, "is_fast", False):
                encoded = tokenizer(text, return_offsets_mapping=True)
                each = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
                what = ", ".join(repr(text[start:stop].strip()) for one, (start, stop) in each if one == unknown)
            warn_caller(f"the tokenizer does not know {what} in prompt {row}, and writes {token} for each")
            return


def _audio_prompts(model: engine.Model, prompts: Any, sounds: tuple[Sound, ...], spans: Any) -> Prompts:
    """Prompts of audio for an encoder."""
    if spans:
        raise BadArgument("spans are stretches of tokens, and an encoder hears these prompts")
    given = _decoder_ids([prompts] if isinstance(prompts, Mapping) else prompts, "prompts to hear")
    decoder_ids: Ids = ((engine.decoder_start(model),),) * len(sounds) if given is None else given
    if len(decoder_ids) != len(sounds) or not all(decoder_ids):
        raise BadArgument(
            f"{len(sounds)} prompts to hear and {len(decoder_ids)} rows of decoder_input_ids",
            expected="a row of at least one token for each",
        )
    signature, dtype = engine.signature_of(type(unwrap(model))), sound_values.dtype_of(model)
    return Prompts(tuple(one.ids for one in sounds), None, decoder_ids, signature=signature, sounds=sounds, dtype=dtype)


def _is_plain(model: engine.Model) -> bool:
    """Whether it is a module of the user's own, without a config."""
    return not hasattr(unwrap(model), "config")


def _named_inputs(model: engine.Model, inputs: Mapping[str, Any]) -> Prompts:
    """The inputs of a module of the user's own, by the names of its forward's arguments."""
    signature = engine.signature_of(type(unwrap(model)))
    if unknown := [name for name in inputs if not signature.takes(name)]:
        raise BadArgument(
            f"this model's forward takes no {unknown[0]}",
            expected=f"its arguments by name: {', '.join(signature.names) or 'none'}",
        )
    if missing := [name for name in signature.required if name not in inputs]:
        expected = f"all of {', '.join(signature.required)}"
        raise BadArgument(f"this model's forward needs {missing[0]}", expected=expected)
    first = next((value for value in inputs.values() if isinstance(value, Tensor) and value.dim() > 0), None)
    if first is None or not len(first):
        raise BadArgument("these inputs hold no row", expected="a tensor with a row for each prompt")
    return Prompts(values=first, signature=signature, inputs_by_name=dict(inputs))


def one_by_one(prompts: Any) -> list[Any]:
    """Prompts in any form but values, as a list with one entry for each prompt.

    >>> from nnsplice.activations.encoding import one_by_one
    >>> one_by_one("w3 w4"), one_by_one([3, 4])
    (['w3 w4'], [[3, 4]])
    >>> one_by_one({"input_ids": [[3, 4], [5, 0]], "attention_mask": [[1, 1], [1, 0]]})
    [[3, 4], [5]]

    Raises:
        BadType: not prompts.
        BadArgument: an encoding of several prompts with images, which cannot be split.
    """
    if isinstance(prompts, str) or is_chat(prompts):
        return [prompts]
    if isinstance(prompts, Tensor):
        return [list(row) for row in _unpadded(prompts, None)]
    if isinstance(prompts, Mapping):
        if is_pair(prompts):
            return pairs_of(prompts)
        if has_images(prompts):
            if len(prompts["input_ids"]) == 1:
                return [prompts]
            raise BadArgument(
                f"an encoding of {len(prompts['input_ids'])} prompts with images, where each prompt is taken by itself",
                expected="a list with an encoding for each prompt",
                write='{"text": [...], "images": [...]}, for a model that was loaded with its processor',
            )
        if "input_ids" in prompts and extra_inputs.has_extra(prompts):
            return extra_inputs.split_rows(prompts)
        return [list(row) for row in _of_encoding(prompts)[0]]
    if not isinstance(prompts, Iterable):
        raise BadType(f"{named(prompts)} is no prompt", expected="a prompt, or several")
    several = list(prompts)
    return [several] if several and all(isinstance(token, int) for token in several) else several


def _several_chats(prompts: Any) -> list[Any]:
    """The prompts if at least one is a chat, else an empty list."""
    several = isinstance(prompts, Sequence) and not isinstance(prompts, str) and any(map(is_chat, prompts))
    return list(prompts) if several else []


def _chats(
    model: engine.Model, prompts: Sequence[Any]
) -> tuple[tuple[str, ...] | None, Ids, dict[str, tuple[tuple[int, int], ...]]]:
    """Texts, token ids and the message spans that all prompts have."""
    for row, prompt in enumerate(prompts):
        if not is_chat(prompt):
            raise BadType(
                f"prompt {row} is {named(prompt)}, and others are chat messages",
                expected="all prompts of one kind",
                write='[{"role": "user", "content": text}] for a text',
            )
    chats = [templated(model, prompt) for prompt in prompts]
    texts = tuple(chat.text for chat in chats if chat.text is not None)
    names = [name for name in chats[0].spans if all(name in chat.spans for chat in chats)]
    spans = {name: tuple(chat.spans[name] for chat in chats) for name in names}
    return texts if len(texts) == len(chats) else None, tuple(chat.ids for chat in chats), spans


def _ids(
    model: engine.Model, prompts: Any
) -> tuple[tuple[str, ...] | None, Ids, Ids | None, tuple[PromptImages, ...] | None]:
    """Texts, token ids, the decoder's token ids and the images of prompts other than chats."""
    if (with_images := encodings_of(model, prompts)) is None:
        return *_of_tokens(model, prompts), None
    texts, encodings = with_images
    each = [_of_tokens(model, encoding)[1] for encoding in encodings]
    images = [images_of(model, one, ids) for one, ids in zip(encodings, each, strict=True)]
    return texts, tuple(chain.from_iterable(each)), None, tuple(chain.from_iterable(images))


def _of_tokens(model: engine.Model, prompts: Any) -> tuple[tuple[str, ...] | None, Ids, Ids | None]:
    if isinstance(prompts, str):
        prompts = [prompts]
    if isinstance(prompts, Mapping) or hasattr(prompts, "input_ids"):
        return None, *_of_encoding(prompts)
    if isinstance(prompts, Tensor):
        return None, _unpadded(prompts, None), None
    if not isinstance(prompts, Sequence):
        raise BadType(
            f"{named(prompts)} is no prompt",
            expected="a text, a list of texts, chat messages, token ids (a list, a list of lists, a tensor), or an "
            "encoding",
        )
    if all(isinstance(prompt, str) for prompt in prompts):
        texts = tuple(prompts)
        tokenizer = engine.tokenizer_of(model)
        if tokenizer is None:
            raise BadArgument(
                "this model has no tokenizer, so prompts cannot be texts",
                expected="token ids, or a model with a tokenizer",
                write="ns.load(module, tokenizer=tokenizer)",
            )
        return texts, tuple(tuple(row) for row in tokenizer(list(texts))["input_ids"]) if texts else (), None
    if prompts and all(isinstance(one, Mapping) and "input_ids" in one for one in prompts):
        return None, *_of_encodings(prompts)
    if all(isinstance(token, int) for token in prompts):
        return None, (tuple(prompts),), None
    if all(isinstance(row, Sequence) and all(isinstance(t, int) for t in row) for row in prompts):
        return None, tuple(tuple(row) for row in prompts), None
    raise BadType("prompts of mixed kinds", expected="all texts, all lists of token ids, or all encodings")


def _of_encodings(prompts: Sequence[Mapping[str, Any]]) -> tuple[Ids, Ids | None]:
    """The token ids, and the decoder's, of a list of encodings."""
    ids = tuple(chain.from_iterable(_of_encoding(one)[0] for one in prompts))
    return ids, _decoder_ids(prompts, "encodings") or None


def _decoder_ids(each: Sequence[Any], what: str) -> Ids | None:
    """The decoder's token ids of encodings; None where they hold none.

    Args:
        what: the kind of prompts, for the error.
    """
    given = [one for one in each if one.get("decoder_input_ids") is not None]
    if len(given) not in (0, len(each)):
        raise BadArgument(f"{len(given)} of {len(each)} {what} hold decoder_input_ids", expected="all of them, or none")
    rows = [_unpadded(one["decoder_input_ids"], one.get("decoder_attention_mask")) for one in given]
    return tuple(chain.from_iterable(rows)) if given else None


def _of_encoding(prompts: Any) -> tuple[Ids, Ids | None]:
    """The token ids, and the decoder's, of a tokenizer's encoding."""
    if "input_ids" not in prompts:
        raise BadType(
            f"a mapping with {', '.join(map(repr, prompts)) or 'nothing'} is no encoding",
            expected='an encoding with "input_ids", or a list of chat messages',
            write='[{"role": "user", "content": "..."}]' if "role" in prompts else None,
        )
    decoder = prompts.get("decoder_input_ids")
    _refuse_cache(prompts, "" if decoder is None else "decoder_")
    ids = _unpadded(prompts["input_ids"], prompts.get("attention_mask"))
    return ids, None if decoder is None else _unpadded(decoder, prompts.get("decoder_attention_mask"))


def _first(row: list[int], value: int) -> int:
    """The index of the first such value; the length of the row if there is none."""
    return row.index(value) if value in row else len(row)


def _refuse_cache(prompts: Any, prefix: str) -> None:
    """Raise for prompts that continue a cache, whose tokens would be left out."""
    width = torch.as_tensor(prompts[f"{prefix}input_ids"]).shape[-1]
    before = engine.tokens_before(dict(prompts), width, prefix)
    if before:
        raise BadArgument(
            f"these prompts go on with {before} tokens in a cache, which would be left out",
            expected="prompts with all of their tokens, and no cache",
        )


def _unpadded(ids: Any, mask: Any) -> Ids:
    rows = torch.as_tensor(ids)
    rows = rows[None] if rows.dim() == 1 else rows
    if rows.dim() != 2 or rows.is_floating_point():
        raise BadType(f"token ids of shape {list(rows.shape)} and {rows.dtype}", expected="integers [prompt, token]")
    if mask is None:
        return tuple(tuple(row) for row in rows.tolist())
    own = torch.as_tensor(mask).bool()
    own = own[None] if own.dim() == 1 else own
    if own.shape != rows.shape:
        raise ShapeError(
            f"an attention mask of shape {list(own.shape)} for token ids of shape {list(rows.shape)}",
            expected="a 1 for each token and a 0 for each place of padding: [prompt, token]",
        )
    for row, kept in enumerate(own.int().tolist()):
        if 0 in kept[_first(kept, 1) : len(kept) - _first(kept[::-1], 1)]:
            raise BadArgument(
                f"the attention mask of prompt {row} has a 0 between tokens, and only padding is masked",
                expected="zeros before the first token or behind the last",
                write="the prompt without the masked tokens",
            )
    return tuple(tuple(row[kept].tolist()) for row, kept in zip(rows, own, strict=True))
