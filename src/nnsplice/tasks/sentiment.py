"""Sentiment: words that follow a good or a bad review."""

from __future__ import annotations

import random
from typing import Any

from nnsplice.models import toy_words
from nnsplice.tasks.task import Record, Task
from nnsplice.tasks.templates import PromptWriter, documented, fill, made_task, sampled

_WORDS = {
    "good": ("great", "wonderful", "excellent", "beautiful", "brilliant", "perfect", "fantastic", "lovely"),
    "bad": ("terrible", "awful", "horrible", "bad", "poor", "boring", "ugly", "stupid"),
}
_TEMPLATES = (
    "I thought the {topic} was {first}, and the {part} was {second}. All in all, it was",
    "The {topic} was {first} and the {part} was {second}. In short, the {topic2} was",
)


@documented
def sentiment(model: Any, n: int = 20, seed: int = 0) -> Task:
    """Reviews up to their last judgement; the corrupted prompt has adjectives of the opposite sentiment.

    Answers are all adjectives of the sentiment that are one token. Spans: `first` and `second`, the adjectives;
    `topic`.

    >>> record = ns.tasks.sentiment(tokenizer, 1)[0]
    >>> record.clean, record.answer[0], record.wrong[0]
    ('I thought the play was beautiful, and the staff was brilliant. All in all, it was', ' great', ' terrible')
    """
    return made_task("sentiment", model, n, seed, _record)


def _record(writer: PromptWriter, rng: random.Random) -> Record | None:
    moods = ["good", "bad"] if rng.random() < 0.5 else ["bad", "good"]
    topic, part, template = rng.choice(toy_words.TOPICS), rng.choice(toy_words.PARTS), rng.choice(_TEMPLATES)
    made = []
    for mood in moods:
        pair = sampled(writer.words(_WORDS[mood]), rng, 2)
        if pair is None:
            return None
        made.append(
            fill(
                template,
                dict(zip(("first", "second"), pair, strict=True)) | {"topic": topic, "topic2": topic, "part": part},
            )
        )
    clean, corrupted = made
    answer, wrong = (
        tuple(form for word in _WORDS[mood] if (form := writer.answer(clean.text, word)) is not None) for mood in moods
    )
    return writer.record(clean, corrupted, answer, wrong, {"mood": moods[0], "topic": topic, "part": part})
