"""Images in prompts: the inputs of `forward` beside the tokens, and the positions of image tokens."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from nnsplice import engine
from nnsplice.atlas import unwrap
from nnsplice.digests import digest_of
from nnsplice.errors import BadArgument, ShapeError

#: Arguments with a number for each token in which an appended token of text is 0 in every family.
_TEXT_IS_ZERO = ("mm_token_type_ids",)
#: Token ids per prompt.
Ids = tuple[tuple[int, ...], ...]


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


def image_token_of(model: engine.Model) -> int | None:
    """The token that stands for a piece of an image; None for a model that its config tells of none."""
    config = getattr(unwrap(model), "config", None)
    for name in ("image_token_id", "image_token_index"):
        if isinstance(token := getattr(config, name, None), int):
            return token
    return None


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


def _alike(one: Sequence[int], other: Sequence[int]) -> int:
    """How many numbers both begin with."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _reads(model: engine.Model) -> bool:
    """Whether the model's forward takes images."""
    return "pixel_values" in engine.signature_of(type(unwrap(model))).names


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
