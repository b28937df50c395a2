"""Multiple-choice questions: the letter of the right answer."""

from __future__ import annotations

import random
from typing import Any

from nnsplice.errors import BadArgument
from nnsplice.tasks.task import Record, Task
from nnsplice.tasks.templates import PromptWriter, documented, fill, made_task, sampled

_COLOURS = ("red", "blue", "green", "black", "white", "yellow", "brown", "orange", "pink", "grey")
_THINGS = ("box", "car", "door", "coat", "chair", "bird", "cup", "house", "ship", "flag", "lamp", "hat")
_LETTERS = "ABCDEFGH"


@documented
def mcqa(model: Any, n: int = 20, seed: int = 0, *, choices: int = 2) -> Task:
    """Multiple choice of a thing's colour, answered by letter; corrupted prompts have it at another letter.

    Spans: `colour`, in the statement; `right` and `other`, the two choices that are exchanged. Variables: `colour`, and
    `at`, the number of the right choice.

    >>> record = ns.tasks.mcqa(tokenizer, 1)[0]
    >>> record.clean.splitlines(), record.answer
    (['The chair is orange. Which colour is the chair?', 'A. blue', 'B. orange', 'Answer:'], ' B')

    Args:
        choices: the number of choices.
    """
    if not 2 <= choices <= len(_LETTERS):
        raise BadArgument(f"choices={choices}", expected=f"2 to {len(_LETTERS)}")
    return made_task("mcqa", model, n, seed, lambda writer, rng: _record(writer, rng, choices))


def _record(writer: PromptWriter, rng: random.Random, choices: int) -> Record | None:
    colours = sampled(writer.words(_COLOURS), rng, choices)
    if colours is None:
        return None
    thing, (at, other) = rng.choice(_THINGS), rng.sample(range(choices), 2)
    made = []
    for place, exchanged in ((at, other), (other, at)):
        slots = {n: "right" if n == place else "other" if n == exchanged else f"rest{n}" for n in range(choices)}
        rest = iter(colours[2:])
        words = {"right": colours[0], "other": colours[1]}
        words |= {slot: next(rest) for slot in slots.values() if slot not in words}
        listed = "\n".join(f"{_LETTERS[n]}. {{{slots[n]}}}" for n in range(choices))
        template = f"The {thing} is {{colour}}. Which colour is the {thing}?\n{listed}\nAnswer:"
        made.append(fill(template, {"colour": colours[0], **words}))
    clean, corrupted = made
    answer, wrong = (writer.answer(clean.text, _LETTERS[n]) for n in (at, other))
    return writer.record(clean, corrupted, answer, wrong, {"thing": thing, "colour": colours[0], "at": at})
