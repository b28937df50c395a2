"""Greater than: the year in which something ends is later than the year in which it began."""

from __future__ import annotations

import random
from typing import Any

from nnsplice.tasks.task import Record, Task
from nnsplice.tasks.templates import PromptWriter, documented, fill, made_task

_EVENTS = (
    "war", "siege", "trial", "strike", "journey", "alliance", "reign", "project", "debate", "famine", "dispute",
    "mission",
)  # fmt: skip


@documented
def greater_than(model: Any, n: int = 20, seed: int = 0) -> Task:
    """Sentences up to the last digits of the year in which something ends, later than the year in which it began.

    Answers are all digits above the first year's, wrong answers all below. In the corrupted prompt it began in the
    first year of the century. Where a tokenizer splits years into single digits, the answer is the first of the two.
    Span: `year`, the digits that differ.

    >>> record = ns.tasks.greater_than(tokenizer, 1)[0]   # this one makes a token of every digit
    >>> record.clean, record.answer, record.wrong
    ('The war lasted from the year 1452 to the year 14', ('6', '7', '8', '9'), ('0', '1', '2', '3', '4'))
    """
    return made_task("greater_than", model, n, seed, _record, opposite=False)


def _record(writer: PromptWriter, rng: random.Random) -> Record | None:
    century, year, event = rng.randint(11, 17), rng.randint(12, 88), rng.choice(_EVENTS)
    template = f"The {event} lasted from the year {century}{{year}} to the year {century}"
    clean, corrupted = (fill(template, {"year": digits}) for digits in (f"{year:02d}", "01"))
    two = [writer.answer(clean.text, f"{other:02d}", space=False) for other in range(2, 99)]
    if all(two):
        first, last = [w for w in two[: year - 2] if w], [w for w in two[year - 1 :] if w]
    else:
        one = [writer.answer(clean.text, str(digit), space=False) for digit in range(10)]
        first, last = [w for w in one[: year // 10] if w], [w for w in one[year // 10 + 1 :] if w]
        if not all(one):
            return None
    variables = {"century": century, "year": year, "event": event, "asked": "year" if all(two) else "decade"}
    return writer.record(clean, corrupted, tuple(last), tuple(first), variables)
