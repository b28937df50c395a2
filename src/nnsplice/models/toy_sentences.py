"""The sentences of the toy language: templates filled with words, and the facts that they state."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, combinations

from nnsplice.models.toy_words import (
    ANSWERS,
    FIRSTS,
    GIVING,
    GREAT,
    KINDS,
    MOODS,
    NAMES,
    OPENINGS,
    PARTS,
    QUIZ,
    RELATIONS,
    REVIEWS,
    SLOTS,
    TOPICS,
)

#: A range, `(start, stop)`.
Bounds = tuple[int, int]


def split_words(text: str) -> list[str]:
    """The words and marks of a text, cut as the toy models' tokenizer cuts them.

    >>> from nnsplice.models.toy_sentences import split_words
    >>> split_words("In fact, the Velmar Tower")
    ['In', 'fact', ',', 'the', 'Velmar', 'Tower']
    """
    return re.findall(r"\w+|[^\w\s]+", text)


def join_words(words: Iterable[str]) -> str:
    """The inverse of `split_words`."""
    return re.sub(r" ([,.:])", r"\1", " ".join(words))


@dataclass(frozen=True, slots=True)
class FilledSentence:
    """A template with its slots filled.

    Attributes:
        words: the words.
        slots: the ranges of words of each slot.
    """

    words: tuple[str, ...]
    slots: Mapping[str, tuple[Bounds, ...]]


def fill(template: str, slots: Mapping[str, Iterator[str] | str]) -> FilledSentence:
    """Put words into the slots of a template: always the same ones, or the next of an iterator."""
    words: list[str] = []
    ranges: dict[str, tuple[Bounds, ...]] = {}
    for word in split_words(template):
        filling = slots.get(word)
        if filling is None:
            words.append(word)
            continue
        new = split_words(filling) if isinstance(filling, str) else [next(filling)]
        ranges[word] = (*ranges.get(word, ()), (len(words), len(words) + len(new)))
        words += new
    return FilledSentence(tuple(words), ranges)


def _subjects() -> dict[str, dict[str, str]]:
    """Subject -> relation -> answer. Answers are distributed evenly and at random over the subjects."""
    two = [f"{first} {kind}" for first in FIRSTS for kind in KINDS]
    three = [f"{GREAT} {FIRSTS[i % 8]} {KINDS[(i * 3 + i // 8) % 8]}" for i in range(16)]
    names = two + three
    rng = random.Random(0)
    answers = {relation: [pool[i % len(pool)] for i in range(len(names))] for relation, pool in ANSWERS.items()}
    for dealt in answers.values():
        rng.shuffle(dealt)
    return {name: {relation: answers[relation][i] for relation in answers} for i, name in enumerate(names)}


#: Subject -> relation -> answer: all facts of the language.
SUBJECTS = _subjects()


def statement(subject: str, wording: str, opening: str = "") -> FilledSentence:
    """A sentence about a subject, up to its answer."""
    article = "the" if opening else "The"
    return fill(f"{opening} {article} SUBJECT {wording}", {"SUBJECT": subject})


def _held_out() -> frozenset[frozenset[str]]:
    rng = random.Random(1)
    return frozenset(frozenset(pair) for pair in combinations(NAMES, 2) if rng.random() < 0.2)


#: Pairs of names that are not in the training data.
HELD_OUT = _held_out()


def giving(template: str, a: str, b: str, giver: str, place: str, thing: str) -> FilledSentence:
    """A sentence in which the giver, who is `a` or `b`, gives something to the other."""
    return fill(template, {"A": a, "B": b, "S": giver, "PLACE": place, "THING": thing})


MOOD_WORDS: dict[str, tuple[str, ...]] = {mood: tuple(chain(*slots.values())) for mood, slots in MOODS.items()}


def review(rng: random.Random) -> dict[str, FilledSentence]:
    """One review in both moods, which differ in the words of mood only."""
    template = rng.choice(REVIEWS)
    topic, parts = rng.choice(TOPICS), rng.sample(PARTS, 2)
    # Drawn before the mood is known, so that both moods use the same numbers.
    draws = {slot: [rng.randrange(len(pool)) for _ in range(3)] for slot, pool in MOODS["good"].items()}
    return {
        mood: fill(
            template,
            {"TOPIC": topic, "PART": iter(parts)}
            | {slot: iter([pool[i] for i in draws[slot]]) for slot, pool in slots.items()},
        )
        for mood, slots in MOODS.items()
    }


def mood_positions(filled: FilledSentence) -> list[int]:
    """Where the words of mood stand."""
    return sorted(start for slot in MOODS["good"] for start, _ in filled.slots.get(slot, ()))


def _vocabulary() -> tuple[str, ...]:
    sentences = (*OPENINGS, *chain(*RELATIONS.values()), *GIVING, *REVIEWS, "The the Quiz : .")
    pools = (FIRSTS, KINDS, (GREAT,), *ANSWERS.values(), QUIZ.values(), NAMES, *SLOTS.values())
    slots = {"A", "B", "S", *SLOTS, *MOODS["good"]}
    plain = (word for sentence in sentences for word in split_words(sentence) if word not in slots)
    return tuple(dict.fromkeys(chain(plain, *pools, *MOOD_WORDS.values())))


#: Every word and mark of the language.
WORDS = _vocabulary()
#: Without the marks, which would run together where two of them meet.
PLAIN_WORDS = tuple(word for word in WORDS if word.isalpha())
