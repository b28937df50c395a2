"""Prompts of audio: input features for the encoder, and the decoder's tokens."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from nnsplice import engine
from nnsplice.atlas import unwrap
from nnsplice.digests import digest_of
from nnsplice.errors import BadArgument, ShapeError

#: The entries that may come with the features.
_DECODER_INPUTS = ("decoder_input_ids", "decoder_attention_mask")


@dataclass(frozen=True, eq=False)
class Sound:
    """The audio of one prompt."""

    #: The argument of the forward, and `[channel, frame]` or `[sample]`.
    name: str
    values: Tensor
    #: The number of tokens that the encoder makes of it.
    tokens: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Sounds of one shape run in one pass."""
        return tuple(self.values.shape)

    @property
    def ids(self) -> tuple[int, ...]:
        """A number for each token of the encoder, equal only for equal audio; no ids of a vocabulary."""
        return (int(self.digest[:15], 16), *range(1, self.tokens))

    @cached_property
    def digest(self) -> str:
        """A digest of the audio."""
        return digest_of({self.name: self.values})


def audio_argument(model: engine.Model) -> str | None:
    """The forward argument of audio features; None for models that read tokens."""
    name = getattr(unwrap(model), "main_input_name", "input_ids")
    return name if engine.is_encoder_decoder(model) and name != "input_ids" else None


def sounds_of(model: engine.Model, prompts: Any) -> tuple[Sound, ...] | None:
    """The audio of each prompt; None for prompts of another kind.

    Raises:
        BadArgument: an entry besides the features that would be left out.
        ShapeError: the features have no row for each prompt.
    """
    name = audio_argument(model)
    if name is None:
        return None
    if _are_several(name, prompts):
        return tuple(sound for one in prompts for sound in sounds_of(model, one) or ())
    if not isinstance(prompts, Mapping) or name not in prompts:
        return None
    if left := [other for other in prompts if other not in (name, *_DECODER_INPUTS)]:
        raise BadArgument(
            f"{left[0]} stands beside {name}, and would be left out",
            expected=f"{name} and decoder_input_ids alone",
        )
    values = torch.as_tensor(prompts[name])
    if not values.is_floating_point() or values.dim() < 2 or not len(values):
        raise ShapeError(
            f"{name} of shape {list(values.shape)} and {values.dtype}", expected="numbers with a row for each prompt"
        )
    tokens = _tokens_of(unwrap(model), values[:1])
    return tuple(Sound(name, row.detach().cpu(), tokens) for row in values)


def _are_several(name: str, prompts: Any) -> bool:
    """Whether this is a list of what `sounds_of` takes."""
    listed = isinstance(prompts, Sequence) and not isinstance(prompts, str) and len(prompts) > 0
    return listed and all(isinstance(one, Mapping) and name in one for one in prompts)


def joined(sounds: Sequence[Sound], dtype: torch.dtype, device: torch.device | None) -> dict[str, Tensor]:
    """The inputs of `forward` for several sounds of one shape."""
    return {sounds[0].name: torch.stack([one.values for one in sounds]).to(device, dtype)}


def dtype_of(model: engine.Model) -> torch.dtype:
    """The dtype of the encoder's weights, in which features are given."""
    return next(p.dtype for p in _encoder(unwrap(model)).parameters() if p.is_floating_point())


#: Module -> shape of the features -> tokens.
_lengths: weakref.WeakKeyDictionary[nn.Module, dict[tuple[int, ...], int]] = weakref.WeakKeyDictionary()


def _encoder(root: Any) -> nn.Module:
    return root.get_encoder()


def _tokens_of(root: nn.Module, values: Tensor) -> int:
    """The number of tokens that the encoder makes of features of this shape, counted in a run."""
    known = _lengths.setdefault(root, {})
    shape = tuple(values.shape)
    if shape not in known:
        encoder = _encoder(root)
        parameter = next(p for p in encoder.parameters() if p.is_floating_point())
        with engine.undisturbed(root):
            try:
                known[shape] = int(encoder(values.to(parameter)).last_hidden_state.shape[1])
            except (ValueError, RuntimeError) as error:  # Whisper takes features of one length only
                raise ShapeError(
                    f"the encoder takes no features of shape {list(shape[1:])}: {str(error).partition(chr(10))[0]}",
                    expected="what the model's own processor gives",
                ) from None
    return known[shape]


def names(sounds: Sequence[Sound]) -> Iterator[tuple[str, ...]]:
    """The names of an encoder's tokens: their numbers."""
    return (tuple(map(str, range(one.tokens))) for one in sounds)
