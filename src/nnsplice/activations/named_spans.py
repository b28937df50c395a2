"""Named spans of prompts: found by their texts, or given in tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from nnsplice import engine
from nnsplice.activations.images import Ids, moved
from nnsplice.activations.offsets import covered
from nnsplice.errors import BadType, SpanError


def bounds_of(
    model: engine.Model, name: str, given: Any, texts: tuple[str, ...] | None, ids: Ids
) -> Iterator[tuple[int, int]]:
    """The token span (start, stop) of each prompt, from texts or from numbers."""
    one_for_all = isinstance(given, str) or (isinstance(given, tuple) and all(isinstance(n, int) for n in given))
    if not one_for_all and not isinstance(given, Sequence):
        raise BadType(f'span "{name}" is {given!r}', expected="a text or (start, stop) in tokens, or a list of them")
    each = [given] * len(ids) if one_for_all else list(given)
    if len(each) != len(ids):
        raise SpanError(f'span "{name}" is given {len(each)} times for {len(ids)} prompts', expected="one per prompt")
    for row, span in enumerate(each):
        if isinstance(span, str):
            yield _of_text(model, name, span, row, texts, ids[row])
        elif isinstance(span, tuple | list) and len(span) == 2 and all(isinstance(n, int) for n in span):
            start, stop = span
            if not 0 <= start < stop <= len(ids[row]):
                raise SpanError(
                    f'span "{name}" of row {row} is tokens {start} to {stop}, and the prompt has {len(ids[row])}',
                    expected="0 <= start < stop <= number of tokens",
                )
            yield start, stop
        else:
            raise BadType(f'span "{name}" of row {row} is {span!r}', expected="a text, or (start, stop) in tokens")


def _of_text(
    model: engine.Model, name: str, span: str, row: int, texts: tuple[str, ...] | None, ids: Sequence[int]
) -> tuple[int, int]:
    if texts is None:
        raise SpanError(
            f'span "{name}" is a text, and the prompts are token ids',
            expected="(start, stop) in tokens, or text prompts",
        )
    text = texts[row]
    places = [start for start in range(len(text)) if span and text.startswith(span, start)]
    if len(places) != 1:
        found = "does not occur" if not places else f"occurs {len(places)} times"
        near = text[(start := text.lower().find(span.lower())) : start + len(span)]
        raise SpanError(
            f'span "{name}": {span!r} {found} in row {row}: {text!r}',
            expected="a text that occurs once",
            write=repr(near) if not places and span and near.lower() == span.lower() else None,
        )
    first, last = places[0], places[0] + len(span)
    tokenizer = engine.tokenizer_of(model)
    if not getattr(tokenizer, "is_fast", False):
        raise SpanError(
            f'span "{name}" cannot be found: this tokenizer does not say where its tokens stand in the text',
            expected="(start, stop) in tokens, or a fast tokenizer",
        )
    encoded = tokenizer(text, return_offsets_mapping=True)
    found = covered(encoded["offset_mapping"], first, last)
    if found is not None and list(ids) != list(encoded["input_ids"]):
        found = moved(found, encoded["input_ids"], ids)
        if found is None:
            raise SpanError(
                f'span "{name}": where {span!r} stands among the tokens of the images is not known',
                expected="(start, stop) in tokens",
            )
    if found is None:
        raise SpanError(f'span "{name}": no token of row {row} stands for {span!r}')
    return found
