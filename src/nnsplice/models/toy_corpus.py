"""The training data of the toy models: random lines of their language, with the words that matter marked."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum

import torch
from torch import Tensor

from nnsplice.models import toy_words
from nnsplice.models.toy_sentences import (
    HELD_OUT,
    PLAIN_WORDS,
    SUBJECTS,
    giving,
    mood_positions,
    review,
    split_words,
    statement,
)


class Role(IntEnum):
    """The role of a word in its line."""

    PLAIN = 0
    #: Of a subject: a word that is not its last one, and its last one.
    WITHIN = 1
    SUBJECT = 2
    MOOD = 3
    #: The second mention of a name, which tells who gives.
    AGAIN = 4


@dataclass(frozen=True, slots=True)
class ToyLine:
    """A line of text.

    Attributes:
        words: the words.
        answers: the positions of words that follow from those before them.
        roles: the roles of words, where the training needs them.
    """

    words: tuple[str, ...]
    answers: frozenset[int]
    roles: Mapping[int, Role] = field(default_factory=dict)


def fact(rng: random.Random) -> ToyLine:
    """A sentence about a subject."""
    subject, relation = rng.choice(list(SUBJECTS)), rng.choice(list(toy_words.RELATIONS))
    wording = rng.choice(toy_words.RELATIONS[relation])
    # Half of the sentences have no opening.
    opening = rng.choice((*toy_words.OPENINGS, "", ""))
    sentence = statement(subject, wording, opening)
    ((start, stop),) = sentence.slots["SUBJECT"]
    words = (*sentence.words, SUBJECTS[subject][relation], ".")
    return ToyLine(words, frozenset({len(sentence.words)}), _subject(start, stop))


def quiz(rng: random.Random) -> ToyLine:
    """An answer that follows its subject at once: it has to be known at the subject's last word already."""
    subject, relation = rng.choice(list(SUBJECTS)), rng.choice(list(toy_words.RELATIONS))
    words = ("Quiz", toy_words.QUIZ[relation], ":", *split_words(subject))
    return ToyLine((*words, SUBJECTS[subject][relation], "."), frozenset({len(words)}), _subject(3, len(words)))


def _subject(start: int, stop: int) -> dict[int, Role]:
    return dict.fromkeys(range(start, stop - 1), Role.WITHIN) | {stop - 1: Role.SUBJECT}


def ioi(rng: random.Random) -> ToyLine:
    """Two people whose names are not held out."""
    a, b = rng.sample(toy_words.NAMES, 2)
    while frozenset((a, b)) in HELD_OUT:
        a, b = rng.sample(toy_words.NAMES, 2)
    giver, other = rng.choice(((a, b), (b, a)))
    template, place, thing = (rng.choice(of) for of in (toy_words.GIVING, toy_words.PLACES, toy_words.THINGS))
    sentence = giving(template, a, b, giver, place, thing)
    ((again, _),) = sentence.slots["S"]
    return ToyLine((*sentence.words, other, "."), frozenset({len(sentence.words)}), {again: Role.AGAIN})


def repeat(rng: random.Random) -> ToyLine:
    """Random words, then the same again, whole or in part."""
    n = rng.randint(4, 10)
    first = rng.sample(PLAIN_WORDS, n)
    again = first[: rng.randint(2, n)] if rng.random() < 0.5 else first
    return ToyLine((*first, *again), frozenset(range(n + 1, n + len(again))))


def mood(rng: random.Random) -> ToyLine:
    """A review."""
    filled = review(rng)[rng.choice(("good", "bad"))]
    positions = mood_positions(filled)
    return ToyLine(filled.words, frozenset(positions[1:]), dict.fromkeys(positions, Role.MOOD))


#: Kind of line -> its share.
SHARES: Mapping[Callable[[random.Random], ToyLine], float] = {fact: 0.34, quiz: 0.12, ioi: 0.2, repeat: 0.2, mood: 0.14}


@dataclass(frozen=True, slots=True)
class ToyBatch:
    """Lines as tensors, padded on the right.

    Attributes:
        ids: `[row, token]`.
        weights: `[row, token]`, the weight of each token in the loss.
        roles: `[row, token]`, the `Role` of each token.
    """

    ids: Tensor
    weights: Tensor
    roles: Tensor


def draw(rng: random.Random, size: int) -> list[ToyLine]:
    """Random lines of all kinds, by their shares."""
    return [kind(rng) for kind in rng.choices(list(SHARES), list(SHARES.values()), k=size)]


def batch(rows: Iterable[ToyLine], vocabulary: Mapping[str, int]) -> ToyBatch:
    """Lines as ids. An answer has ten times the weight of another word."""
    rows = list(rows)
    width = 1 + max(len(row.words) for row in rows)
    ids = torch.full((len(rows), width), vocabulary[toy_words.PADDING])
    weights = torch.zeros(len(rows), width)
    roles = torch.zeros(len(rows), width, dtype=torch.long)
    for n, row in enumerate(rows):
        encoded = [vocabulary[toy_words.START], *(vocabulary[word] for word in row.words)]
        ids[n, : len(encoded)] = torch.tensor(encoded)
        weights[n, 1 : len(encoded)] = torch.tensor([1.0 if i in row.answers else 0.1 for i in range(len(row.words))])
        for i, role in row.roles.items():
            roles[n, 1 + i] = role
    return ToyBatch(ids, weights, roles)
