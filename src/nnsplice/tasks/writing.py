"""Prompts from templates, for one tokenizer: words of one token each, answers that follow, spans in tokens."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from nnsplice import engine
from nnsplice.activations.offsets import covered
from nnsplice.errors import BadArgument, BadType, circumstances, named
from nnsplice.tasks.task import Record, Task

_SLOT = re.compile(r"\{(\w+)\}")
#: How often a record is tried anew, for each that is wanted, before a task is refused.
_PATIENCE = 60


@dataclass(frozen=True)
class Filled:
    """A template with words in its slots."""

    text: str
    #: Slot -> its characters.
    chars: Mapping[str, tuple[int, int]]


def filled(template: str, words: Mapping[str, str]) -> Filled:
    """Put words into the `{slots}` of a template.

    >>> from nnsplice.tasks.writing import filled
    >>> filled("The {thing} is red", {"thing": "box"})
    Filled(text='The box is red', chars={'thing': (4, 7)})
    """
    text, at, chars = "", 0, {}
    for slot in _SLOT.finditer(template):
        text += template[at : slot.start()]
        at = slot.end()
        chars[slot[1]] = (len(text), len(text) + len(words[slot[1]]))
        text += words[slot[1]]
    return Filled(text + template[at:], chars)


@dataclass(frozen=True)
class Writer:
    """What a tokenizer makes of words."""

    tokenizer: Any

    @classmethod
    def of(cls, model: Any) -> Writer:
        """The writer for a model's tokenizer, or for a tokenizer itself."""
        if isinstance(model, int):
            raise BadType(f"the model is {named(model)}", expected="a model first", write="ns.tasks.ioi(model, 20)")
        callable_itself = callable(getattr(model, "convert_ids_to_tokens", None))
        tokenizer = model if callable_itself else engine.tokenizer_of(engine.as_model(model))
        if not getattr(tokenizer, "is_fast", False):
            raise BadArgument(
                "a task is made for a tokenizer that tells where its tokens stand, and this model has none",
                expected="a model with a fast tokenizer",
                write="ns.load(module, tokenizer=tokenizer)",
            )
        return cls(tokenizer)

    def tokens(self, text: str) -> list[int]:
        """A prompt's token ids, as a run has them."""
        return list(self.tokenizer(text)["input_ids"])

    def behind(self, prompt: str, text: str) -> list[int] | None:
        """The tokens of a text that follows a prompt; None where it changes the prompt's own."""
        before, both = self.tokens(prompt), self.tokens(prompt + text)
        while before and before[-1] == both[-1] and before[-1] in self.tokenizer.all_special_ids:
            before, both = before[:-1], both[:-1]  # a mark of the end is no part of either
        return both[len(before) :] if both[: len(before)] == before else None

    def answer(self, prompt: str, word: str, *, space: bool = True) -> str | None:
        """A word as the one token that follows a prompt, in the form a metric takes; None where it is no one token."""
        text = f" {word}" if space else word
        found = self.behind(prompt, text)
        if found is None or len(found) != 1 or found[0] == self.tokenizer.unk_token_id:
            return None
        for form in (text, word):
            if list(self.tokenizer(form, add_special_tokens=False)["input_ids"]) == found:
                return form
        return None

    def words(self, words: Iterable[str]) -> list[str]:
        """Those that are one token in the middle of a text."""
        return list(_of_one_token(self, tuple(words)))

    def is_word(self, word: str) -> bool:
        """Whether a tokenizer of whole words has this one."""
        ids = list(self.tokenizer(word, add_special_tokens=False)["input_ids"])
        return len(ids) == 1 and ids[0] != self.tokenizer.unk_token_id and self.tokenizer.decode(ids) == word

    def spans(self, made: Filled) -> dict[str, tuple[int, int]]:
        """Slot -> its tokens."""
        offsets = self.tokenizer(made.text, return_offsets_mapping=True)["offset_mapping"]
        found = {name: covered(offsets, *chars) for name, chars in made.chars.items()}
        return {name: span for name, span in found.items() if span is not None}

    def record(
        self, clean: Filled, corrupted: Filled, answer: Any, wrong: Any, variables: Mapping[str, Any]
    ) -> Record | None:
        """The pair as a record; None where the answers are no single tokens or the prompts differ in length."""
        if not answer or not wrong:
            return None
        one, other = self.tokens(clean.text), self.tokens(corrupted.text)
        unknown = self.tokenizer.unk_token_id
        if len(one) != len(other) or (unknown is not None and unknown in (*one, *other)):
            return None
        spans = self.spans(clean), self.spans(corrupted)
        return Record(clean.text, corrupted.text, answer, wrong, *spans, dict(variables))


@lru_cache(maxsize=32)
def _of_one_token(writer: Writer, words: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(word for word in words if writer.answer("a", word) is not None or writer.is_word(word))


def drawn(
    name: str, model: Any, n: int, seed: int, make: Callable[[Writer, random.Random], Record | None], **about: Any
) -> Task:
    """A task of `n` different records.

    Args:
        make: one record by chance, or None where what chance gave does not fit the tokenizer.
        about: for the `Task`.
    """
    with circumstances(f"ns.tasks.{name}"):
        if isinstance(n, bool) or not isinstance(n, int):
            raise BadType(f"n is {named(n)}", expected="how many pairs", write=f"ns.tasks.{name}(model, 20)")
        if n < 1:
            raise BadArgument(f"n={n}", expected="at least one pair")
        writer, rng = Writer.of(model), random.Random(f"{name} {seed}")
        found: dict[str, Record] = {}
        for _ in range(_PATIENCE * n + _PATIENCE):
            record = make(writer, rng)
            if record is not None:
                found.setdefault(record.clean, record)
            if len(found) == n:
                return Task(name, tuple(found.values()), **about)
        if not found:
            raise BadArgument(
                "this tokenizer makes several tokens of the task's words, or knows them not",
                expected="a tokenizer of English text",
            )
        raise BadArgument(f"only {len(found)} different pairs were found, and n={n}", expected="fewer pairs")


def chosen(words: Sequence[str], rng: random.Random, k: int) -> list[str] | None:
    """`k` different words; None where there are fewer."""
    return rng.sample(words, k) if len(words) >= k else None
