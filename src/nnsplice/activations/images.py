"""Images in prompts: the inputs of `forward` besides the tokens, and the positions of image tokens."""

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

#: Token types in which a text token is 0 in every family.
_TEXT_IS_ZERO = ("mm_token_type_ids",)
#: Token ids per prompt.
Ids = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, eq=False)
class PromptImages:
    """The inputs of `forward` for one prompt besides its tokens."""

    #: Argument -> `[image or patch, ...]`; those of several prompts are concatenated.
    parts: Mapping[str, Tensor]
    #: Argument -> `[token]`.
    by_token: Mapping[str, Tensor]
    #: The positions of the image tokens.
    columns: tuple[int, ...]

    @cached_property
    def digest(self) -> str:
        """A digest of the images."""
        return digest_of({**self.parts, **self.by_token})

    @property
    def shape(self) -> tuple[object, ...]:
        """Prompts of one shape run in one pass."""
        parts = tuple((name, tuple(value.shape)) for name, value in sorted(self.parts.items()))
        return (len(self.columns), *parts, *sorted(self.by_token))

    @property
    def form(self) -> tuple[object, ...]:
        """Prompts of one form have images at the same positions and the same token types."""
        types = tuple((name, tuple(value.tolist())) for name, value in sorted(self.by_token.items()))
        return (self.columns, types, self.shape)

    @property
    def ends(self) -> tuple[int, ...]:
        """The last position of each run of image tokens."""
        return tuple(n for n in self.columns if n + 1 not in self.columns)

    def longer(self, more: int) -> PromptImages:
        """The images of the prompt with so many text tokens appended.

        Raises:
            BadArgument: the types of appended tokens are not known.
        """
        unknown = [name for name in self.by_token if name not in _TEXT_IS_ZERO]
        if more and unknown:
            raise BadArgument(
                f"tokens are appended to these prompts with images, and their {unknown[0]} is not known",
                expected="a metric of answers of one token",
            )
        longer = {name: torch.cat([value, value.new_zeros(more)]) for name, value in self.by_token.items()}
        return PromptImages(self.parts, longer, self.columns)


def image_token_of(model: engine.Model) -> int | None:
    """The id of the image token in the model's config; None if there is none."""
    config = getattr(unwrap(model), "config", None)
    for name in ("image_token_id", "image_token_index"):
        if isinstance(token := getattr(config, name, None), int):
            return token
    return None


def check_without(model: engine.Model, ids: Ids) -> None:
    """Raise for prompts with image tokens and no images."""
    token = image_token_of(model)
    row = None if token is None else next((n for n, one in enumerate(ids) if token in one), None)
    if row is not None and _takes_images(model):
        raise BadArgument(
            f"prompt {row} has {ids[row].count(token or 0)} tokens that stand for an image (id {token}), and no image "
            "is given",
            expected="what the processor makes of texts and images together",
            write="ns.capture(model, processor(text=texts, images=images, return_tensors='pt'), sites)",
        )


def spans_of_images(model: engine.Model, ids: Ids, images: Sequence[PromptImages]) -> dict[str, Any]:
    """The spans `"image"`, `"image 2"`, ... of image tokens, as far as all prompts have them.

    Some processors split an image into several runs of tokens (rows, tiles); a single image spans all of them.
    """
    token = image_token_of(model)
    each: list[list[tuple[int, int]]] = []
    for row, own in zip(ids, images, strict=True):
        runs = [(run[0], run[-1] + 1) for run in _runs(row, token)]
        number = _image_count(own.parts)
        if number == 1 and runs:
            runs = [(runs[0][0], runs[-1][1])]
        each.append(runs if len(runs) == (number or 1) else [])
    fewest = min(map(len, each), default=0)
    return {f"image {n + 1}" if n else "image": tuple(runs[n] for runs in each) for n in range(fewest)}


def moved(found: tuple[int, int], plain: Sequence[int], ids: Sequence[int]) -> tuple[int, int] | None:
    """Move a span of a text's own tokens to the processor's tokens, which have image tokens inserted.

    None if it is not certain: the span must lie before all inserted tokens, or after them.
    """
    start, stop = found
    prefix = _common_prefix(plain, ids)
    suffix_start = len(plain) - _common_prefix(plain[::-1], ids[::-1])
    if stop <= min(prefix, suffix_start):
        return found
    more = len(ids) - len(plain)
    return (start + more, stop + more) if start >= max(prefix, suffix_start) else None


def joined(images: Sequence[PromptImages], device: torch.device | None) -> dict[str, Tensor]:
    """The inputs of `forward` for these prompts.

    Raises:
        ShapeError: prompts with images of different shapes.
    """
    if len({one.shape for one in images}) > 1:
        raise ShapeError(
            "prompts with images of different shapes do not run in one pass", expected="images of one shape"
        )
    parts = {name: torch.cat([one.parts[name] for one in images]).to(device) for name in images[0].parts}
    return parts | {name: torch.stack([one.by_token[name] for one in images]).to(device) for name in images[0].by_token}


def shared_start(one: PromptImages | None, other: PromptImages | None) -> int:
    """The number of tokens before the first difference of two prompts' images."""
    both = [images for images in (one, other) if images is not None]
    if len(both) == 2 and both[0].digest == both[1].digest:
        return sys.maxsize
    if len(both) == 2 and both[0].form[1] != both[1].form[1]:
        return 0
    return min((images.columns[0] for images in both if images.columns), default=0)


def _common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """The length of the common prefix."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _takes_images(model: engine.Model) -> bool:
    """Whether the model's forward takes images."""
    return "pixel_values" in engine.signature_of(type(unwrap(model))).names


def _runs(row: Sequence[int], token: int | None) -> Iterator[list[int]]:
    for is_image, run in groupby(range(len(row)), key=lambda n: row[n] == token):
        if is_image:
            yield list(run)


def _image_count(parts: Mapping[str, Tensor]) -> int | None:
    """The number of images of a prompt; None if tiles cannot be assigned to images."""
    for name in ("image_grid_thw", "image_sizes"):
        if name in parts:
            return len(parts[name])
    pixels = parts.get("pixel_values")
    return len(pixels) if pixels is not None and pixels.dim() == 4 else None
