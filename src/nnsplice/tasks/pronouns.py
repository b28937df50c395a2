"""Gendered pronoun: he or she, depending on a name."""

from __future__ import annotations

import random
from typing import Any

from nnsplice.models import toy_words
from nnsplice.tasks.task import Record, Task
from nnsplice.tasks.templates import PromptWriter, documented, fill, made_task

_WOMEN = ("Mary", "Alice", "Sarah", "Emma", "Anna", "Laura", "Kate", "Susan", "Lucy", "Helen")
_MEN = tuple(name for name in toy_words.NAMES if name not in _WOMEN)
_TEMPLATES = (
    "So {name} is a very good {role}, isn't",
    "{name} has been a {role} for years, and",
    "We met {name}, the {role}, and liked what",
)
_ROLES = ("friend", "teacher", "student", "doctor", "writer", "player", "driver", "artist")


@documented
def gendered_pronoun(model: Any, n: int = 20, seed: int = 0) -> Task:
    """Sentences about a man or a woman, up to the pronoun; the corrupted prompt has a name of the other gender.

    Span: `name`.

    >>> record = ns.tasks.gendered_pronoun(tokenizer, 1)[0]
    >>> record.clean, record.answer, record.wrong
    ("So Paul is a very good writer, isn't", ' he', ' she')
    """
    return made_task("gendered_pronoun", model, n, seed, _record)


def _record(writer: PromptWriter, rng: random.Random) -> Record | None:
    names = [rng.choice(_MEN), rng.choice(_WOMEN)]
    pronouns = ["he", "she"]
    if rng.random() < 0.5:
        names, pronouns = names[::-1], pronouns[::-1]
    template, role = rng.choice(_TEMPLATES), rng.choice(_ROLES)
    clean, corrupted = (fill(template, {"name": name, "role": role}) for name in names)
    answer, wrong = (writer.answer(clean.text, pronoun) for pronoun in pronouns)
    return writer.record(clean, corrupted, answer, wrong, {"name": names[0], "pronoun": pronouns[0], "role": role})
