"""Prompts as token ids, in batches of one length, with their named spans found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from nnsplice import engine
from nnsplice.activations import images as image_values
from nnsplice.activations import sounds as sound_values
from nnsplice.activations.images import PromptImages
from nnsplice.activations.messages import Chat, Message
from nnsplice.activations.sounds import Sound
from nnsplice.errors import BadArgument, SpanError
from nnsplice.paths import Span
from nnsplice.tokens import Rows, Spans


@dataclass(frozen=True)
class Prompts:
    """The inputs of a run: token ids per prompt, or values for a module without tokens."""

    ids: tuple[tuple[int, ...], ...] = ()
    texts: tuple[str, ...] | None = None
    #: Decoder token ids per prompt, for models with two towers.
    decoder_ids: tuple[tuple[int, ...], ...] | None = None
    #: For a plain module, its first input: `[prompt, token, width]`, or `[prompt, width]` as one token each.
    values: Tensor | None = None
    spans: Mapping[str, tuple[tuple[int, int], ...]] | None = None
    #: The signature of the model's forward.
    signature: engine.Signature = field(default=engine.ANY_SIGNATURE, repr=False, compare=False)
    #: For a plain module with several inputs, these by name; `values` is the first.
    inputs_by_name: Mapping[str, Any] = field(default_factory=dict, repr=False)
    #: The images of each prompt.
    images: tuple[PromptImages, ...] | None = field(default=None, repr=False)
    #: The audio of each prompt; `ids` are then numbers that differ for different audio.
    sounds: tuple[Sound, ...] | None = field(default=None, repr=False)
    #: The dtype of audio inputs.
    dtype: torch.dtype = field(default=torch.float32, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.ids) if self.values is None else self.values.shape[0]

    def require_tokens(self, user: str) -> None:
        """Raise for prompts that are values.

        Args:
            user: the start of the message: "a sweep is over", "a metric reads".

        Raises:
            BadArgument: they have no token ids.
        """
        if self.values is not None:
            raise BadArgument(f"{user} tokens, and these prompts are values", expected="texts or token ids")

    def lengths(self, tower: str) -> list[int]:
        """The number of tokens of each prompt in this tower; the list is cached and must not be changed."""
        return self._encoder_lengths if tower == "encoder" else self._decoder_lengths

    def length(self, tower: str, row: int) -> int:
        """The number of tokens of one prompt in this tower."""
        return self.lengths(tower)[row]

    @cached_property
    def _encoder_lengths(self) -> list[int]:
        if self.values is not None:
            tokens = self.values.dim() > 2 or not self.values.is_floating_point()
            return [self.values.shape[1] if tokens and self.values.dim() > 1 else 1] * len(self)
        return [len(row) for row in self.ids]

    @cached_property
    def _decoder_lengths(self) -> list[int]:
        return self._encoder_lengths if self.decoder_ids is None else [len(row) for row in self.decoder_ids]

    def take(self, rows: Sequence[int]) -> Prompts:
        """Only these prompts, in this order."""
        return Prompts(
            tuple(self.ids[row] for row in rows) if self.values is None else (),
            None if self.texts is None else tuple(self.texts[row] for row in rows),
            None if self.decoder_ids is None else tuple(self.decoder_ids[row] for row in rows),
            None if self.values is None else self.values[list(rows)],
            None if self.spans is None else {n: tuple(bounds[row] for row in rows) for n, bounds in self.spans.items()},
            self.signature,
            self._named(rows),
            None if self.images is None else tuple(self.images[row] for row in rows),
            None if self.sounds is None else tuple(self.sounds[row] for row in rows),
            self.dtype,
        )

    def token_texts(self, model: engine.Model, tower: str) -> tuple[tuple[str, ...], ...]:
        """The tokens of one tower as text; numbers for audio."""
        if tower == "decoder" and self.decoder_ids is not None:
            return engine.token_texts(model, self.decoder_ids)
        return engine.token_texts(model, self.ids) if self.sounds is None else tuple(sound_values.names(self.sounds))

    def shared_start(self, other: Prompts, row: int) -> int:
        """The number of leading tokens in which a prompt agrees with the other's, for causal models."""
        ids, there = self.ids[row], other.ids[row]
        start = next((n for n, (a, b) in enumerate(zip(ids, there, strict=True)) if a != b), len(there))
        images = [None if one.images is None else one.images[row] for one in (self, other)]
        return start if images == [None, None] else min(start, image_values.shared_start(*images))

    def is_causal(self, model: engine.Model) -> bool:
        """Whether tokens depend only on those before them; some models attend to images in both directions."""
        if self.images is None or not engine.is_causal(model):
            return engine.is_causal(model)
        forms = {(len(ids), one.form): row for row, (ids, one) in enumerate(zip(self.ids, self.images, strict=True))}
        return all(
            engine.is_causal_for(model, form, lambda row=row: self.inputs([row], model.device), self.images[row].ends)
            for form, row in forms.items()
        )

    def identity(self, row: int) -> tuple[object, ...]:
        """Equal for prompts with the same run."""
        decoder = None if self.decoder_ids is None else self.decoder_ids[row]
        return self.ids[row], decoder, None if self.images is None else self.images[row].digest

    @property
    def digests(self) -> tuple[str | None, ...] | None:
        """A digest of the images or the sound of each prompt, None for one of text; None where all are of text."""
        if self.sounds is not None:
            return tuple(sound.digest for sound in self.sounds)
        found = tuple(one.digest if one.parts else None for one in self.images or ())
        return found if any(found) else None

    def _named(self, rows: Sequence[int]) -> dict[str, Any]:
        """The inputs by name of some rows; inputs without a row for each prompt are given whole."""
        return {
            name: value[list(rows)] if isinstance(value, Tensor) and value.shape[:1] == (len(self),) else value
            for name, value in self.inputs_by_name.items()
        }

    def padded(self, rows: Sequence[int]) -> Prompts:
        """These prompts, padded to the longest by repeating the last token."""
        chosen = self.take(rows)
        longest = max(map(len, chosen.ids), default=0)
        if all(len(ids) == longest for ids in chosen.ids):
            return chosen
        if self.sounds is not None:
            raise NotImplementedError("prompts that an encoder hears are not padded to one length")
        if self.images is not None:
            raise NotImplementedError("prompts with images are not padded to one length")
        return replace(chosen, ids=tuple(ids + ids[-1:] * (longest - len(ids)) for ids in chosen.ids), texts=None)

    def rows(self, tower: str) -> Rows:
        """All prompts as one batch padded on the right, to check positions against."""
        lengths = self.lengths(tower)
        if len(set(lengths)) == 1:
            return Rows(len(self), lengths[0])
        return Rows(len(self), max(lengths), (0,) * len(lengths), tuple(lengths))

    def shape(self, row: int) -> tuple[object, ...]:
        """Equal for prompts that can run in one pass: as many tokens, and images or audio of one shape."""
        shapes = (None if each is None else each[row].shape for each in (self.images, self.sounds))
        return (self.length("encoder", row), self.length("decoder", row), *shapes)

    def batches(self, *models: Any, size: int | None = None, at_most: int | None = None) -> list[list[int]]:
        """Row numbers in batches of prompts of one length, with images of one shape, so that none needs padding.

        Tokens run one prompt at a time where code of the user's may tell rows apart, unless a size is asked for.

        Args:
            models: what runs them, in nnsight or bare.
            size: how many the user wants to run at once.
            at_most: how many there is memory for.
        """
        if size is None and self.values is None and not self.inputs_by_name:
            size = 1 if any(map(engine.has_code_by_row, models)) else None
        size = min(size or len(self), at_most or len(self))
        groups: dict[object, list[int]] = {}
        for row in range(len(self)):
            groups.setdefault(self.shape(row), []).append(row)
        return [group[start : start + size] for group in groups.values() for start in range(0, len(group), size)]

    def inputs(self, rows: Sequence[int], device: torch.device | None) -> Mapping[str, Any] | Tensor:
        """The inputs of a forward pass over these rows."""
        if self.inputs_by_name:
            return self._named(rows)
        if self.values is not None:
            return self.values[list(rows)]
        if self.sounds is None:
            ids = torch.tensor([self.ids[row] for row in rows], device=device)
            given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        else:
            given = sound_values.joined([self.sounds[row] for row in rows], self.dtype, device)
        if self.decoder_ids is not None:
            given["decoder_input_ids"] = torch.tensor([self.decoder_ids[row] for row in rows], device=device)
        if self.images is not None:
            given |= image_values.joined([self.images[row] for row in rows], device)
        inputs: dict[str, Any] = engine.fitted_inputs(self.signature, given)
        # transformers' RWKV mixes up the caches of several prompts of one token.
        has_state = {"state", "use_cache"} <= set(self.signature.names)
        if has_state and len(rows) > 1 and self.length("decoder", rows[0]) == 1:
            inputs["use_cache"] = False
        return inputs

    def batch(self, rows: Sequence[int]) -> engine.Batch:
        """The positions of the tokens of these rows, which have one length, in the pass."""
        decoder, encoder = (self.length(tower, rows[0]) for tower in ("decoder", "encoder"))
        return engine.Batch(Rows(len(rows), decoder, new=decoder), Rows(len(rows), encoder, new=encoder))

    def check_span(self, position: object, tower: str) -> None:
        """Raise for a named span at a site of the decoder, as spans are of the encoder's tokens."""
        if isinstance(position, Span) and self.decoder_ids is not None and tower == "decoder":
            raise SpanError(
                f'the span "{position.name}" is a stretch of the encoder\'s prompts, and this site counts the '
                "decoder's tokens",
                expected="a position of the decoder's own tokens, or a site of the encoder",
                write="layers[3].output[0], or encoder.layers[3].output" + f"[{position}]",
            )

    def spans_of(self, rows: Sequence[int]) -> Spans | None:
        """The spans of these rows."""
        return None if self.spans is None else {name: [bounds[r] for r in rows] for name, bounds in self.spans.items()}


#: Prompts in any form: texts, chat messages, token ids, an encoding, texts with images, or values
#: `[prompt, token, width]` for a plain module.
PromptsLike = (
    Prompts
    | str
    | Sequence[str]
    | Sequence[int]
    | Sequence[Sequence[int]]
    | Tensor
    | Mapping[str, Any]
    | Chat
    | Sequence[Chat]
    | Sequence[Message]
    | Sequence[Sequence[Message]]
)
#: One span: a text or (start, stop), for all prompts or for each.
SpanText = str | tuple[int, int] | Sequence[str | tuple[int, int]]
#: The spans by name.
SpanTexts = Mapping[str, SpanText]
#: The same for a pair of runs; `{"clean": ..., "corrupted": ...}` where they differ.
PairSpanTexts = SpanTexts | Mapping[str, SpanTexts]
