"""Indirect object identification (IOI): which of two people is given something."""

from __future__ import annotations

import random
from typing import Any

from nnsplice.models import toy_words
from nnsplice.tasks.task import Record, Task
from nnsplice.tasks.templates import PromptWriter, documented, fill, made_task, sampled

_TEMPLATES = tuple(
    sentence.replace("A and B", "{first} and {second}")
    .replace("PLACE", "{place}")
    .replace("THING", "{thing}")
    .replace(" S ", " {s2} ")
    for sentence in toy_words.GIVING
)


@documented
def ioi(model: Any, n: int = 20, seed: int = 0) -> Task:
    """Indirect object identification: one of two people gives something to the other; corrupted prompts swap the giver.

    The names are in either order. Spans: `io`, the receiver; `s1` and `s2`, the two mentions of the giver.

    >>> toy = ns.load("toy")
    >>> record = ns.tasks.ioi(toy, 1)[0]
    >>> record.clean, record.answer, record.wrong
    ('After Sarah and Helen got to the market, Sarah handed a ball to', ' Helen', ' Sarah')
    >>> record.spans["s2"], record.variables["order"]
    ((10, 11), 's first')
    """
    return made_task("ioi", model, n, seed, _record)


def _record(writer: PromptWriter, rng: random.Random) -> Record | None:
    names, places, things = (writer.words(words) for words in (toy_words.NAMES, toy_words.PLACES, toy_words.THINGS))
    picked, template = sampled(names, rng, 2), rng.choice(_TEMPLATES)
    order = rng.choice(("io first", "s first"))
    if picked is None or not places or not things:
        return None
    io, s = picked
    first, second = ("io", "s1") if order == "io first" else ("s1", "io")
    template = template.replace("first", first).replace("second", second)
    around = {"place": rng.choice(places), "thing": rng.choice(things)}
    clean = fill(template, {"io": io, "s1": s, "s2": s, **around})
    corrupted = fill(template, {"io": io, "s1": s, "s2": io, **around})
    answer, wrong = (writer.answer(clean.text, name) for name in (io, s))
    return writer.record(clean, corrupted, answer, wrong, {"io": io, "s": s, "order": order, **around})
