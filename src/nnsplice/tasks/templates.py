"""Records from templates, for one tokenizer: words and answers of one token, and token spans."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from inspect import cleandoc
from typing import Any, TypeVar

from nnsplice import engine
from nnsplice.activations.offsets import covered
from nnsplice.errors import BadArgument, BadType, circumstances, named
from nnsplice.tasks.task import Record, Task

F = TypeVar("F", bound=Callable[..., Task])

_SLOT = re.compile(r"\{(\w+)\}")
#: The number of attempts for each record, before a task is refused.
_ATTEMPTS = 60


@dataclass(frozen=True)
class FilledTemplate:
    """A template with words in its slots."""

    text: str
    #: Slot -> its range of characters.
    chars: Mapping[str, tuple[int, int]]


def fill(template: str, words: Mapping[str, str]) -> FilledTemplate:
    """Put words into the `{slots}` of a template.

    >>> from nnsplice.tasks.templates import fill
    >>> fill("The {thing} is red", {"thing": "box"})
    FilledTemplate(text='The box is red', chars={'thing': (4, 7)})
    """
    text, at, chars = "", 0, {}
    for slot in _SLOT.finditer(template):
        text += template[at : slot.start()]
        at = slot.end()
        chars[slot[1]] = (len(text), len(text) + len(words[slot[1]]))
        text += words[slot[1]]
    return FilledTemplate(text + template[at:], chars)


@dataclass(frozen=True)
class PromptWriter:
    """Makes records for one tokenizer: token ids, answers of one token, spans."""

    tokenizer: Any

    @classmethod
    def of(cls, model: Any) -> PromptWriter:
        """The writer for a model's tokenizer, or for a tokenizer itself."""
        if isinstance(model, int):
            raise BadType(f"the model is {named(model)}", expected="a model first", write="ns.tasks.ioi(model, 20)")
        is_tokenizer = callable(getattr(model, "convert_ids_to_tokens", None))
        tokenizer = model if is_tokenizer else engine.tokenizer_of(engine.as_model(model))
        if not getattr(tokenizer, "is_fast", False):
            raise BadArgument(
                "a task needs a tokenizer with offsets, and this model has none",
                expected="a model with a fast tokenizer",
                write="ns.load(module, tokenizer=tokenizer)",
            )
        return cls(tokenizer)

    def tokens(self, text: str) -> list[int]:
        """The token ids of a prompt, with special tokens."""
        return list(self.tokenizer(text)["input_ids"])

    def continuation(self, prompt: str, text: str) -> list[int] | None:
        """The token ids of a text after a prompt; None if the text changes the tokens of the prompt."""
        before, both = self.tokens(prompt), self.tokens(prompt + text)
        while before and before[-1] == both[-1] and before[-1] in self.tokenizer.all_special_ids:
            before, both = before[:-1], both[:-1]  # an end-of-text token that the tokenizer appends to both
        return both[len(before) :] if both[: len(before)] == before else None

    def answer(self, prompt: str, word: str, *, space: bool = True) -> str | None:
        """The text of a word that is one token after a prompt, for a metric; None if it is several tokens."""
        text = f" {word}" if space else word
        ids = self.continuation(prompt, text)
        if ids is None or len(ids) != 1 or ids[0] == self.tokenizer.unk_token_id:
            return None
        for form in (text, word):
            if list(self.tokenizer(form, add_special_tokens=False)["input_ids"]) == ids:
                return form
        return None

    def words(self, words: Iterable[str]) -> list[str]:
        """Those of the words that are one token within a text."""
        return list(_of_one_token(self, tuple(words)))

    def is_word(self, word: str) -> bool:
        """Whether the word by itself is one token, as in word-level tokenizers."""
        ids = list(self.tokenizer(word, add_special_tokens=False)["input_ids"])
        return len(ids) == 1 and ids[0] != self.tokenizer.unk_token_id and self.tokenizer.decode(ids) == word

    def spans(self, filled: FilledTemplate) -> dict[str, tuple[int, int]]:
        """The token span of each slot."""
        offsets = self.tokenizer(filled.text, return_offsets_mapping=True)["offset_mapping"]
        found = {name: covered(offsets, *chars) for name, chars in filled.chars.items()}
        return {name: span for name, span in found.items() if span is not None}

    def record(
        self, clean: FilledTemplate, corrupted: FilledTemplate, answer: Any, wrong: Any, variables: Mapping[str, Any]
    ) -> Record | None:
        """A record; None if an answer is not one token, or the prompts differ in length or have unknown tokens."""
        if not answer or not wrong:
            return None
        ids, other = self.tokens(clean.text), self.tokens(corrupted.text)
        unknown = self.tokenizer.unk_token_id
        if len(ids) != len(other) or (unknown is not None and unknown in (*ids, *other)):
            return None
        spans = self.spans(clean), self.spans(corrupted)
        return Record(clean.text, corrupted.text, answer, wrong, *spans, dict(variables))


@lru_cache(maxsize=32)
def _of_one_token(writer: PromptWriter, words: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(word for word in words if writer.answer("a", word) is not None or writer.is_word(word))


def made_task(
    name: str,
    model: Any,
    n: int,
    seed: int,
    sample: Callable[[PromptWriter, random.Random], Record | None],
    **fields: Any,
) -> Task:
    """A task of `n` different records.

    Args:
        sample: makes a random record, or None where the random words do not fit the tokenizer.
        **fields: other fields of the `Task`.
    """
    with circumstances(f"ns.tasks.{name}"):
        if isinstance(n, bool) or not isinstance(n, int):
            raise BadType(f"n is {named(n)}", expected="how many pairs", write=f"ns.tasks.{name}(model, 20)")
        if n < 1:
            raise BadArgument(f"n={n}", expected="at least one pair")
        writer, rng = PromptWriter.of(model), random.Random(f"{name} {seed}")
        found: dict[str, Record] = {}
        for _ in range(_ATTEMPTS * (n + 1)):
            record = sample(writer, rng)
            if record is not None:
                found.setdefault(record.clean, record)
            if len(found) == n:
                return Task(name, tuple(found.values()), **fields)
        if not found:
            raise BadArgument(
                "this tokenizer splits the words of the task into several tokens, or does not have them",
                expected="a tokenizer of English text",
            )
        raise BadArgument(f"only {len(found)} different pairs were found, and n={n}", expected="fewer pairs")


def sampled(words: Sequence[str], rng: random.Random, k: int) -> list[str] | None:
    """`k` different words; None where there are fewer."""
    return rng.sample(words, k) if len(words) >= k else None


#: The sections of the docstrings of all tasks; `{own}` is the description of a task's own arguments.
_SECTIONS = """

Args:
    model: the model, or its tokenizer, which decides which words are one token.
    n: the number of pairs.
    seed: the seed of the pairs.{own}

Returns:
    The pairs, with answers, spans and variables.

Raises:
    BadArgument: an invalid argument, a model without a fast tokenizer, or a tokenizer in which the task has no pairs.
"""


def documented(task: F) -> F:
    """Add the shared sections to the docstring of a task, which describes only the task's own arguments."""
    if task.__doc__:  # `python -OO` removes docstrings
        text, _, own = cleandoc(task.__doc__).partition("\n\nArgs:")
        task.__doc__ = text + _SECTIONS.format(own=own)
    return task
