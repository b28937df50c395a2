"""Induction: a repeated sequence of random words."""

from __future__ import annotations

import random
from typing import Any

from nnsplice.errors import BadArgument
from nnsplice.models import toy_words
from nnsplice.tasks.task import Record, Task
from nnsplice.tasks.templates import PromptWriter, documented, fill, made_task, sampled

_WORDS = (*toy_words.NAMES, *toy_words.PLACES, *toy_words.THINGS, *toy_words.TOPICS, *toy_words.PARTS)


@documented
def induction(model: Any, n: int = 20, seed: int = 0, *, length: int = 8) -> Task:
    """Random words, then the first ones again; in the corrupted prompt the answer is replaced by another word.

    Spans: `answer`, the answer in the first round; `before`, the word before it; `again`, that word in the second
    round, which is the last token.

    >>> ns.tasks.induction(ns.load("toy"), 1, length=4)[0].clean
    'concert key Emma Tom concert'

    Args:
        length: the number of words in the first round, 3 to 30.
    """
    if not isinstance(length, int) or not 3 <= length <= 30:
        raise BadArgument(f"length={length!r}", expected="3 to 30 words")
    return made_task("induction", model, n, seed, lambda writer, rng: _record(writer, rng, length))


def _record(writer: PromptWriter, rng: random.Random, length: int) -> Record | None:
    picked = sampled(writer.words(_WORDS), rng, length + 1)
    if picked is None:
        return None
    *words, other = picked
    at = rng.randint(1, length - 1)
    slots = [f"w{number}" for number in range(length)]
    slots[at - 1], slots[at] = "before", "answer"
    template = " ".join(f"{{{slot}}}" for slot in slots)
    again = " ".join([*words[: at - 1], "{again}"])
    values = {**dict(zip(slots, words, strict=True)), "again": words[at - 1]}
    clean, corrupted = (fill(f"{template} {again}", {**values, "answer": word}) for word in (words[at], other))
    answer, wrong = (writer.answer(clean.text, word) for word in (words[at], other))
    return writer.record(clean, corrupted, answer, wrong, {"answer": words[at], "at": at})
