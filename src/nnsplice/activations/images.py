"""Images in prompts: what a processor gives beside the tokens, cut by prompt, and where a prompt's images stand."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor

from nnsplice import engine
from nnsplice.activations.messages import Chat, is_chat
from nnsplice.atlas import peel
from nnsplice.digests import digest_of
from nnsplice.errors import BadArgument, BadType, ShapeError, named

#: What the names of a forward's arguments begin with that hold images, or say how they are cut.
_PARTS = ("pixel_", "image_")
#: Arguments with a number for each token.
_BY_TOKEN = ("token_type_ids", "mm_token_type_ids")
#: Those of them in which an appended token of text is 0 in every family.
_TEXT_IS_ZERO = ("mm_token_type_ids",)
#: What an encoding holds besides.
_TOKENS = ("input_ids", "attention_mask")


@dataclass(frozen=True, eq=False)
class PromptImages:
    """What a forward takes of one prompt beside its tokens."""

    #: By argument, `[image or piece of one, ...]`: what belongs to several prompts stands one behind another.
    parts: Mapping[str, Tensor]
    #: By argument, `[token]`.
    by_token: Mapping[str, Tensor]
    #: Where the tokens stand that are an image's.
    columns: tuple[int, ...]

    @cached_property
    def digest(self) -> str:
        """The same for the same images, and for no others."""
        return digest_of({**self.parts, **self.by_token})

    @property
    def shape(self) -> tuple[object, ...]:
        """Prompts of one shape run in one pass."""
        parts = tuple((name, tuple(value.shape)) for name, value in sorted(self.parts.items()))
        return (len(self.columns), *parts, *sorted(self.by_token))

    @property
    def form(self) -> tuple[object, ...]:
        """Prompts of one form have their images at the same tokens, and are told the same of each token."""
        told = tuple((name, tuple(value.tolist())) for name, value in sorted(self.by_token.items()))
        return (self.columns, told, self.shape)

    @property
    def ends(self) -> tuple[int, ...]:
        """The last token of each stretch of an image."""
        return tuple(n for n in self.columns if n + 1 not in self.columns)

    def longer(self, more: int) -> PromptImages:
        """With so many tokens of text appended.

        Raises:
            BadArgument: the model is told of each token what it is, and what it is told of such tokens is not known.
        """
        strange = [name for name in self.by_token if name not in _TEXT_IS_ZERO]
        if more and strange:
            raise BadArgument(
                f"tokens are appended to these prompts with images, and their {strange[0]} is not known",
                expected="a metric of answers of one token",
            )
        longer = {name: torch.cat([value, value.new_zeros(more)]) for name, value in self.by_token.items()}
        return PromptImages(self.parts, longer, self.columns)


Ids = tuple[tuple[int, ...], ...]


def image_token_of(model: engine.Model) -> int | None:
    """The token that stands for a piece of an image; None for a model that its config tells of none."""
    config = getattr(peel(model), "config", None)
    for name in ("image_token_id", "image_token_index"):
        if isinstance(token := getattr(config, name, None), int):
            return token
    return None


def has_images(encoding: Any) -> bool:
    """Whether an encoding holds images."""
    return isinstance(encoding, Mapping) and "pixel_values" in encoding


def are_shown(chats: Sequence[Any]) -> bool:
    """Whether a message of some chat holds an image."""
    return any(_shows(message) for chat in chats if is_chat(chat) for message in _messages(chat))


def encodings_of(model: engine.Model, prompts: Any) -> tuple[tuple[str, ...] | None, list[Mapping[str, Any]]] | None:
    """The texts and encodings of prompts with images; None for prompts without."""
    if isinstance(prompts, Mapping):
        if has_images(prompts):
            return None, [prompts]
        if "images" in prompts and "input_ids" not in prompts:
            return _processed(model, prompts)
        return None
    if is_chat(prompts) and are_shown([prompts]):
        return None, [_templated(model, prompts)]
    if isinstance(prompts, Sequence) and not isinstance(prompts, str):
        if not are_shown(prompts) and not any(map(has_images, prompts)):
            return None
        each = [_templated(model, one) if is_chat(one) else one for one in prompts]
        if strange := [named(one) for one in each if not (isinstance(one, Mapping) and "input_ids" in one)]:
            raise BadType(f"prompts with images, and {strange[0]}", expected="an encoding for each prompt")
        return None, each
    return None


def _processed(
    model: engine.Model, prompts: Mapping[str, Any]
) -> tuple[tuple[str, ...] | None, list[Mapping[str, Any]]]:
    """What the model's processor makes of texts and images, a pair at a time, so that nothing is padded."""
    processor = _processor(model)
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
    return tuple(texts), [
        processor(text=[t], images=one, return_tensors="pt") for t, one in zip(texts, images, strict=True)
    ]


def _templated(model: engine.Model, prompt: Any) -> Mapping[str, Any]:
    """What the processor makes of messages with images in them."""
    messages = [dict(message) for message in _messages(prompt)]
    goes_on = messages[-1]["role"] == "assistant"
    asked = {"add_generation_prompt": not goes_on, "continue_final_message": goes_on, **getattr(prompt, "options", {})}
    return _processor(model).apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", **asked
    )


def _messages(chat: Any) -> Sequence[Mapping[str, Any]]:
    return chat.messages if isinstance(chat, Chat) else chat


def _shows(message: Mapping[str, Any]) -> bool:
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
        BadArgument: the model takes no images, or not these; or which prompt an image belongs to is not known.
        ShapeError: values whose shape no image has.
    """
    taken, token = engine.taken_by(type(peel(model))), image_token_of(model)
    values = {name: _tensor(name, value) for name, value in encoding.items() if name not in _TOKENS}
    for name in values:
        if not (name.startswith(_PARTS) or name in _BY_TOKEN) or "video" in name:
            raise BadArgument(
                f"this encoding with images holds {name}, and how that belongs to single prompts is not known",
                expected=f"{', '.join(_TOKENS)}, images, and a number for each token ({', '.join(_BY_TOKEN)})",
            )
        if not taken.takes(name) or (token is None and name.startswith(_PARTS)):
            raise BadArgument(
                f"these prompts hold {name}, and {type(peel(model)).__name__} reads no images in its prompts",
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
    dtype = peel(model).dtype
    parts = {name: value for name, value in values.items() if name not in _BY_TOKEN}
    cut = _cut(parts, counts)
    masks = torch.as_tensor(encoding.get("attention_mask", torch.ones_like(torch.as_tensor(encoding["input_ids"]))))
    by_token = {name: _by_token(name, values[name], masks) for name in values if name in _BY_TOKEN}
    return tuple(
        PromptImages(
            {n: v.to(dtype) if v.is_floating_point() else v for n, v in cut[row].items()},
            {name: rows[row] for name, rows in by_token.items()},
            tuple(n for n, one in enumerate(tokens) if one == token),
        )
        for row, tokens in enumerate(ids)
    )


def check_without(model: engine.Model, ids: Ids) -> None:
    """Raise for prompts of text with tokens that stand for an image, where none is given."""
    token = image_token_of(model)
    row = None if token is None else next((n for n, one in enumerate(ids) if token in one), None)
    if row is not None and _reads(model):
        raise BadArgument(
            f"prompt {row} has {ids[row].count(token or 0)} tokens that stand for an image (id {token}), and no image "
            "is given",
            expected="what the processor makes of texts and images together",
            write="ns.capture(model, processor(text=texts, images=images, return_tensors='pt'), sites)",
        )


def spans_of_images(model: engine.Model, ids: Ids, images: Sequence[PromptImages]) -> dict[str, Any]:
    """The spans `"image"`, `"image 2"`, ... of the tokens that stand for the images, where all prompts have them.

    An image is cut into several stretches by some processors (rows, tiles); the one image of a prompt then reaches from
    the first of them to the last.
    """
    token = image_token_of(model)
    each: list[list[tuple[int, int]]] = []
    for row, held in zip(ids, images, strict=True):
        runs = [(run[0], run[-1] + 1) for run in _runs(row, token)]
        number = _number(held.parts)
        if number == 1 and runs:
            runs = [(runs[0][0], runs[-1][1])]
        each.append(runs if len(runs) == (number or 1) else [])
    fewest = min(map(len, each), default=0)
    return {f"image {n + 1}" if n else "image": tuple(runs[n] for runs in each) for n in range(fewest)}


def moved(found: tuple[int, int], plain: Sequence[int], ids: Sequence[int]) -> tuple[int, int] | None:
    """Where a stretch of a text's own tokens stands in the tokens that its processor made of it, images in between.

    None for a stretch that is not certain: it has to stand before all that the processor put in, or behind it.
    """
    start, stop = found
    alike = _alike(plain, ids)
    behind = len(plain) - _alike(plain[::-1], ids[::-1])
    if stop <= min(alike, behind):
        return found
    more = len(ids) - len(plain)
    return (start + more, stop + more) if start >= max(alike, behind) else None


def _alike(one: Sequence[int], other: Sequence[int]) -> int:
    """How many numbers both begin with."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def joined(images: Sequence[PromptImages], device: torch.device | None) -> dict[str, Tensor]:
    """What the forward takes for these prompts.

    Raises:
        ShapeError: prompts of different shapes, whose images do not stand in one tensor.
    """
    if len({one.shape for one in images}) > 1:
        raise ShapeError(
            "prompts with images of different shapes do not run in one pass", expected="images of one shape"
        )
    parts = {name: torch.cat([one.parts[name] for one in images]).to(device) for name in images[0].parts}
    return parts | {name: torch.stack([one.by_token[name] for one in images]).to(device) for name in images[0].by_token}


def shared_start(one: PromptImages | None, other: PromptImages | None) -> int:
    """How many tokens come before anything in which the images of two prompts differ."""
    held = [images for images in (one, other) if images is not None]
    if len(held) == 2 and held[0].digest == held[1].digest:
        return sys.maxsize
    if len(held) == 2 and held[0].form[1] != held[1].form[1]:
        return 0
    return min((images.columns[0] for images in held if images.columns), default=0)


def _reads(model: engine.Model) -> bool:
    """Whether the model's forward takes images."""
    return "pixel_values" in engine.taken_by(type(peel(model))).names


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
    channels = getattr(getattr(peel(model).config, "vision_config", None), "num_channels", pixels.shape[-3])
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


def _cut(parts: Mapping[str, Tensor], counts: Sequence[int]) -> list[dict[str, Tensor]]:
    """The images of each prompt, by how many tokens of images it has."""
    if len(counts) == 1:
        return [dict(parts)]
    if "image_grid_thw" in parts:
        return _by_grid(parts, counts)
    total = {len(value) for value in parts.values()}
    if len(total) == 1:
        number = total.pop()
        each = sum(counts) // number if number and sum(counts) % number == 0 else 0
        if each and not any(count % each for count in counts):  # as many tokens for every image
            numbers = [count // each for count in counts]
            return _split(parts, numbers)
        if number == len(counts) and all(counts):
            return _split(parts, [1] * number)
    raise _unknown(f"{', '.join(f'{name} {list(value.shape)}' for name, value in parts.items())}", counts)


def _by_grid(parts: Mapping[str, Tensor], counts: Sequence[int]) -> list[dict[str, Tensor]]:
    """Images of any size, each with its grid: so many patches stand for one token in all of them."""
    sizes = parts["image_grid_thw"].prod(-1).tolist()
    strange = [name for name in parts if name not in ("pixel_values", "image_grid_thw")]
    merged, rest = divmod(sum(sizes), max(sum(counts), 1))
    ends, numbers = list(accumulate(sizes, initial=0)), []
    for end in accumulate(count * merged for count in counts):
        rest = rest or end not in ends
        numbers.append(0 if rest else ends.index(end) - sum(numbers))
    if rest or strange:
        raise _unknown(f"image_grid_thw {parts['image_grid_thw'].tolist()}", counts)
    grids = _split({"image_grid_thw": parts["image_grid_thw"]}, numbers)
    patches = [int(one["image_grid_thw"].prod(-1).sum()) if one else 0 for one in grids]
    return [a | b for a, b in zip(_split({"pixel_values": parts["pixel_values"]}, patches), grids, strict=True)]


def _split(parts: Mapping[str, Tensor], numbers: Sequence[int]) -> list[dict[str, Tensor]]:
    pieces = {name: value.split(list(numbers)) for name, value in parts.items()}
    return [
        {name: piece[row] for name, piece in pieces.items()} if number else {} for row, number in enumerate(numbers)
    ]


def _unknown(held: str, counts: Sequence[int]) -> BadArgument:
    return BadArgument(
        f"which image belongs to which prompt is not known: {held}, for prompts with {', '.join(map(str, counts))} "
        "tokens of images",
        expected="a list with an encoding for each prompt",
        write="[processor(text=text, images=image, return_tensors='pt') for text, image in ...]",
    )


def _runs(row: Sequence[int], token: int | None) -> Iterator[list[int]]:
    for is_image, run in groupby(range(len(row)), key=lambda n: row[n] == token):
        if is_image:
            yield list(run)


def _number(parts: Mapping[str, Tensor]) -> int | None:
    """How many images a prompt has; None where its images are cut into tiles of which nobody says whose they are."""
    for name in ("image_grid_thw", "image_sizes"):
        if name in parts:
            return len(parts[name])
    pixels = parts.get("pixel_values")
    return len(pixels) if pixels is not None and pixels.dim() == 4 else None
