"""Prompts with images in any form as encodings, and the images of each prompt of an encoding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from nnsplice import engine
from nnsplice.activations.extra_inputs import has_token_types
from nnsplice.activations.images import Ids, PromptImages, check_without, image_token_of
from nnsplice.activations.messages import Chat, is_chat
from nnsplice.atlas import unwrap
from nnsplice.errors import BadArgument, BadType, ShapeError, named

#: Prefixes of the arguments with images, or with the layout of their patches.
_IMAGE_PREFIXES = ("pixel_", "image_")
#: Arguments with the type of each token.
_BY_TOKEN = ("token_type_ids", "mm_token_type_ids")
#: The other entries of an encoding.
_TOKENS = ("input_ids", "attention_mask")


def has_images(encoding: Any) -> bool:
    """Whether an encoding holds images."""
    return isinstance(encoding, Mapping) and "pixel_values" in encoding


def is_pair(prompts: Any) -> bool:
    """Whether this is `{"text": ..., "images": ...}`, before a processor is applied."""
    return isinstance(prompts, Mapping) and "images" in prompts and "input_ids" not in prompts


def pairs_of(prompts: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Split `{"text": [...], "images": [...]}` into one mapping for each text."""
    texts, images = _texts_and_images(prompts)
    return [{"text": text, "images": one} for text, one in zip(texts, images, strict=True)]


def have_images(chats: Sequence[Any]) -> bool:
    """Whether a message of any of these chats contains an image."""
    return any(_has_image(message) for chat in chats if is_chat(chat) for message in _messages(chat))


def encodings_of(model: engine.Model, prompts: Any) -> tuple[tuple[str, ...] | None, list[Mapping[str, Any]]] | None:
    """The texts and encodings of prompts with images; None for prompts without."""
    if isinstance(prompts, Mapping):
        if has_images(prompts) or has_token_types(model, prompts):
            return None, [prompts]
        if is_pair(prompts):
            return _processed(model, prompts)
        return None
    if is_chat(prompts) and have_images([prompts]):
        return None, [_templated(model, prompts)]
    if isinstance(prompts, Sequence) and not isinstance(prompts, str):
        if not have_images(prompts) and not any(
            has_images(one) or is_pair(one) or has_token_types(model, one) for one in prompts
        ):
            return None
        texts: list[str] = []
        each: list[Any] = []
        for one in prompts:
            if is_pair(one):
                own, encodings = _processed(model, one)
                texts += own
                each += encodings
            else:
                each.append(_templated(model, one) if is_chat(one) else one)
        if others := [named(one) for one in each if not (isinstance(one, Mapping) and "input_ids" in one)]:
            raise BadType(f"prompts with images, and {others[0]}", expected="an encoding for each prompt")
        return tuple(texts) if all(map(is_pair, prompts)) else None, each
    return None


def _processed(model: engine.Model, prompts: Mapping[str, Any]) -> tuple[tuple[str, ...], list[Mapping[str, Any]]]:
    """Encodings by the model's processor, one text at a time, so that nothing is padded."""
    processor = _processor(model)
    texts, images = _texts_and_images(prompts)
    return tuple(texts), [
        processor(text=[t], images=one, return_tensors="pt") for t, one in zip(texts, images, strict=True)
    ]


def _texts_and_images(prompts: Mapping[str, Any]) -> tuple[Sequence[str], Sequence[Any]]:
    """The texts, and the images of each.

    Raises:
        BadArgument: another entry.
        BadType: no texts.
        ShapeError: not as many entries of images as texts.
    """
    if unknown := sorted(set(prompts) - {"text", "images"}):
        raise BadArgument(f"a prompt of {', '.join(map(repr, sorted(prompts)))} has no {unknown[0]!r}",
                          expected='"text" and "images"')  # fmt: skip
    texts, images = prompts.get("text"), prompts["images"]
    if isinstance(texts, str):
        texts, images = [texts], [images]
    if not (isinstance(texts, Sequence) and all(isinstance(text, str) for text in texts)):
        raise BadType(f"the text beside the images is {named(texts)}", expected="a text, or a list of texts")
    if not isinstance(images, Sequence) or len(images) != len(texts):
        number = len(images) if isinstance(images, Sequence) else 1
        raise ShapeError(
            f"{len(texts)} texts and {number} entries of images",
            expected="an image, or a list of images, for each text",
        )
    return texts, images


def _templated(model: engine.Model, prompt: Any) -> Mapping[str, Any]:
    """The processor's encoding of messages with images."""
    messages = [dict(message) for message in _messages(prompt)]
    goes_on = messages[-1]["role"] == "assistant"
    options = {"add_generation_prompt": not goes_on, "continue_final_message": goes_on}
    options |= getattr(prompt, "options", {})
    return _processor(model).apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", **options
    )


def _messages(chat: Any) -> Sequence[Mapping[str, Any]]:
    return chat.messages if isinstance(chat, Chat) else chat


def _has_image(message: Mapping[str, Any]) -> bool:
    content = message.get("content")
    return isinstance(content, list) and any(isinstance(p, Mapping) and p.get("type") == "image" for p in content)


def _processor(model: engine.Model) -> Any:
    processor = model.__dict__.get("processor")
    if processor is None:
        raise BadArgument(
            "these prompts hold images, and this model has no processor to read them with",
            expected="a model with a processor, or what a processor made of texts and images",
            write="ns.load(module, processor=processor), or ns.capture(model, processor(text=..., images=..., "
            "return_tensors='pt'), sites)",
        )
    return processor


def images_of(model: engine.Model, encoding: Mapping[str, Any], ids: Ids) -> tuple[PromptImages, ...]:
    """The images of each prompt of an encoding.

    Args:
        ids: the prompts' own tokens, without padding.

    Raises:
        BadArgument: the model takes no such images, or the prompt of an image is not known.
        ShapeError: values that have not the shape of images.
    """
    signature, token = engine.signature_of(type(unwrap(model))), image_token_of(model)
    values = {name: _tensor(name, value) for name, value in encoding.items() if name not in _TOKENS}
    for name in values:
        if not (name.startswith(_IMAGE_PREFIXES) or name in _BY_TOKEN) or "video" in name:
            raise BadArgument(
                f"this encoding with images holds {name}, and how that belongs to single prompts is not known",
                expected=f"{', '.join(_TOKENS)}, images, and a number for each token ({', '.join(_BY_TOKEN)})",
            )
        if not signature.takes(name) or (token is None and name.startswith(_IMAGE_PREFIXES)):
            raise BadArgument(
                f"these prompts hold {name}, and {type(unwrap(model)).__name__} reads no images in its prompts",
                expected="a model whose config names the token of an image",
            )
    assert token is not None
    if engine.is_encoder_decoder(model):
        raise BadArgument(
            "these prompts hold images, and this model has two towers for text", expected="a causal decoder"
        )
    counts = [row.count(token) for row in ids]
    if not has_images(values):
        check_without(model, ids)
    elif 0 in counts and (len(ids) == 1 or not any(counts)):
        raise BadArgument(
            f"there are images, and prompt {counts.index(0)} has no token for one (id {token})",
            expected="the tokens that the processor makes of the text and its images together",
            write="processor(text=texts, images=images, return_tensors='pt')",
        )
    else:
        _check_pixels(model, values)
    root: Any = unwrap(model)
    dtype: torch.dtype = root.dtype
    parts = {name: value for name, value in values.items() if name not in _BY_TOKEN}
    by_prompt = _by_prompt(parts, counts)
    masks = torch.as_tensor(encoding.get("attention_mask", torch.ones_like(torch.as_tensor(encoding["input_ids"]))))
    by_token = {name: _by_token(name, values[name], masks) for name in values if name in _BY_TOKEN}
    return tuple(
        PromptImages(
            {n: v.to(dtype) if v.is_floating_point() else v for n, v in by_prompt[row].items()},
            {name: rows[row] for name, rows in by_token.items()},
            tuple(n for n, one in enumerate(tokens) if one == token),
        )
        for row, tokens in enumerate(ids)
    )


def _tensor(name: str, value: Any) -> Tensor:
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise BadType(
            f"{name} of these prompts is {named(value)}",
            expected="a tensor",
            write="processor(..., return_tensors='pt')",
        ) from None


def _check_pixels(model: engine.Model, values: Mapping[str, Tensor]) -> None:
    pixels = values["pixel_values"]
    if "image_grid_thw" in values:  # patches, flat: the vision tower's own width
        grid = values["image_grid_thw"]
        if grid.dim() != 2 or grid.shape[1] != 3 or pixels.dim() != 2 or int(grid.prod(-1).sum()) != len(pixels):
            raise ShapeError(
                f"pixel_values of shape {list(pixels.shape)} and image_grid_thw {grid.tolist()}",
                expected="[patch, values], with as many patches as the grids have together",
            )
        return
    if not pixels.is_floating_point() or pixels.dim() not in (4, 5):
        raise ShapeError(
            f"pixel_values of shape {list(pixels.shape)} and {pixels.dtype}",
            expected="numbers [image, channel, height, width], or with an axis of tiles or images before the channel",
            write="processor(text=texts, images=images, return_tensors='pt')",
        )
    channels = getattr(getattr(unwrap(model).config, "vision_config", None), "num_channels", pixels.shape[-3])
    if pixels.shape[-3] != channels:
        raise ShapeError(
            f"pixel_values of shape {list(pixels.shape)}, whose axis of channels has {pixels.shape[-3]}",
            expected=f"{channels} channels: [image, channel, height, width]",
        )


def _by_token(name: str, value: Tensor, mask: Tensor) -> list[Tensor]:
    if value.shape != mask.shape:
        raise ShapeError(
            f"{name} of shape {list(value.shape)}", expected=f"a number for each token: {list(mask.shape)}"
        )
    return [row[own.bool()] for row, own in zip(value, mask, strict=True)]


def _by_prompt(parts: Mapping[str, Tensor], counts: Sequence[int]) -> list[dict[str, Tensor]]:
    """The images of each prompt, assigned by its number of image tokens."""
    if len(counts) == 1:
        return [dict(parts)]
    if "image_grid_thw" in parts:
        return _by_grid(parts, counts)
    total = {len(value) for value in parts.values()}
    if len(total) == 1:
        number = total.pop()
        each = sum(counts) // number if number and sum(counts) % number == 0 else 0
        if each and not any(count % each for count in counts):  # every image has as many tokens
            numbers = [count // each for count in counts]
            return _split(parts, numbers)
        if number == len(counts) and all(counts):
            return _split(parts, [1] * number)
    raise _cannot_assign(f"{', '.join(f'{name} {list(value.shape)}' for name, value in parts.items())}", counts)


def _by_grid(parts: Mapping[str, Tensor], counts: Sequence[int]) -> list[dict[str, Tensor]]:
    """Images with a patch grid each; the number of patches per token is the same in all of them."""
    sizes = parts["image_grid_thw"].prod(-1).tolist()
    others = [name for name in parts if name not in ("pixel_values", "image_grid_thw")]
    merged, rest = divmod(sum(sizes), max(sum(counts), 1))
    ends, numbers = list(accumulate(sizes, initial=0)), []
    for end in accumulate(count * merged for count in counts):
        rest = rest or end not in ends
        numbers.append(0 if rest else ends.index(end) - sum(numbers))
    if rest or others:
        raise _cannot_assign(f"image_grid_thw {parts['image_grid_thw'].tolist()}", counts)
    grids = _split({"image_grid_thw": parts["image_grid_thw"]}, numbers)
    patches = [int(one["image_grid_thw"].prod(-1).sum()) if one else 0 for one in grids]
    return [a | b for a, b in zip(_split({"pixel_values": parts["pixel_values"]}, patches), grids, strict=True)]


def _split(parts: Mapping[str, Tensor], numbers: Sequence[int]) -> list[dict[str, Tensor]]:
    pieces = {name: value.split(list(numbers)) for name, value in parts.items()}
    return [
        {name: piece[row] for name, piece in pieces.items()} if number else {} for row, number in enumerate(numbers)
    ]


def _cannot_assign(found: str, counts: Sequence[int]) -> BadArgument:
    return BadArgument(
        f"which image belongs to which prompt is not known: {found}, for prompts with {', '.join(map(str, counts))} "
        "tokens of images",
        expected="a list with an encoding for each prompt",
        write="[processor(text=text, images=image, return_tensors='pt') for text, image in ...]",
    )
