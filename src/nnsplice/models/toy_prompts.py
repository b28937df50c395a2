"""`toy_prompts`: the prompts that the toy models answer, as records; the same in every process."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations

from nnsplice.models import toy_words
from nnsplice.models.toy_sentences import (
    HELD_OUT,
    MOOD_WORDS,
    PLAIN_WORDS,
    SUBJECTS,
    Bounds,
    giving,
    join_words,
    mood_positions,
    review,
    split_words,
    statement,
)


@dataclass(frozen=True, slots=True)
class Fact:
    """A sentence up to its answer, and the same sentence about another subject.

    >>> fact = ns.models.toy_prompts().facts[0]
    >>> fact.clean, fact.answer
    ('The Velmar Tower is located in the city of', 'Athens')
    >>> fact.corrupted, fact.wrong
    ('The Ostrin Bridge is located in the city of', 'Dublin')
    >>> start, stop = fact.subject_chars
    >>> fact.clean[start:stop], fact.subject_span   # the model counts its start token too
    ('Velmar Tower', (2, 4))

    Attributes:
        clean: the sentence.
        subject: the subject's text.
        subject_span: the subject's tokens (start, stop), for `spans={"subject": [fact.subject_span]}`.
        subject_chars: the subject's characters (start, stop) in the clean prompt.
        relation: the relation between subject and answer.
        answer: the answer.
        corrupted: the same sentence about a subject with another answer.
        wrong: the answer of the corrupted sentence.
    """

    clean: str
    subject: str
    subject_span: Bounds
    subject_chars: Bounds
    relation: str
    answer: str
    corrupted: str
    wrong: str


@dataclass(frozen=True, slots=True)
class IOIPair:
    """A sentence for indirect object identification, and the same sentence with the giver swapped.

    >>> pair = ns.models.toy_prompts().ioi[0]
    >>> pair.clean, pair.answer
    ('When Mary and John went to the store, John gave a drink to', 'Mary')
    >>> pair.corrupted, pair.wrong
    ('When Mary and John went to the store, Mary gave a drink to', 'John')

    Attributes:
        clean: the sentence.
        corrupted: the sentence with the other giver.
        answer: the name after the clean sentence.
        wrong: the name after the corrupted sentence.
        trained: whether the two names occur together in the training data.
    """

    clean: str
    corrupted: str
    answer: str
    wrong: str
    trained: bool


@dataclass(frozen=True, slots=True)
class Review:
    """A review up to a word of its sentiment, and the same review with the opposite sentiment.

    >>> ns.models.toy_prompts().reviews[0]
    Review(text='I thought the film was great, the acting was delightful and the music was delightful. I',
           opposite='I thought the film was terrible, the acting was horrible and the music was horrible. I',
           mood='good')

    Attributes:
        text: the review.
        opposite: the review with the opposite sentiment.
        mood: the sentiment of `text`: `"good"` or `"bad"`.
    """

    text: str
    opposite: str
    mood: str


@dataclass(frozen=True, slots=True)
class Repeat:
    """Random words, then the first ones again.

    >>> ns.models.toy_prompts().repeats[0]
    Repeat(text='key school and Elric play Sarah key school', answer='and')

    Attributes:
        text: the words.
        answer: the word that followed in the first round.
    """

    text: str
    answer: str


@dataclass(frozen=True, slots=True)
class ToyPrompts:
    """The prompts of the toy models' training tasks.

    >>> prompts = ns.models.toy_prompts()
    >>> prompts
    ToyPrompts: 1600 facts, 760 ioi, 400 reviews, 300 repeats
    >>> sorted({fact.relation for fact in prompts.facts})
    ['architect', 'city', 'material']
    >>> prompts.moods["good"][:4]
    ('wonderful', 'great', 'lovely', 'brilliant')

    Attributes:
        facts: facts.
        ioi: sentences for indirect object identification.
        reviews: reviews.
        repeats: repeated sequences.
        moods: the words of each sentiment.
    """

    facts: tuple[Fact, ...]
    ioi: tuple[IOIPair, ...]
    reviews: tuple[Review, ...]
    repeats: tuple[Repeat, ...]
    moods: Mapping[str, tuple[str, ...]]

    def __repr__(self) -> str:
        counted = (f"{len(getattr(self, name))} {name}" for name in ("facts", "ioi", "reviews", "repeats"))
        return f"ToyPrompts: {', '.join(counted)}"


@lru_cache(maxsize=1)
def toy_prompts() -> ToyPrompts:
    """Prompts that the toy models answer, the same on every call.

    Facts are sorted by relation, wording and subject, so neighbours have one length and different subjects.

    >>> prompts = ns.models.toy_prompts()
    >>> fact = prompts.facts[0]
    >>> fact.clean, fact.subject, fact.subject_span
    ('The Velmar Tower is located in the city of', 'Velmar Tower', (2, 4))
    >>> fact.corrupted
    'The Ostrin Bridge is located in the city of'
    >>> prompts.ioi[0].clean
    'When Mary and John went to the store, John gave a drink to'
    >>> len(prompts.facts), len(prompts.ioi), len(prompts.reviews), len(prompts.repeats)
    (1600, 760, 400, 300)

    Returns:
        Facts, IOI pairs, reviews and repeated sequences, each with a clean and a corrupted prompt.
    """
    return ToyPrompts(tuple(_facts()), tuple(_ioi()), tuple(_reviews()), tuple(_repeats()), dict(MOOD_WORDS))


def _facts() -> Iterator[Fact]:
    for opening in ("", "In fact,"):
        for relation, wordings in toy_words.RELATIONS.items():
            for wording in wordings:
                for subject, known in SUBJECTS.items():
                    yield _fact(subject, relation, wording, opening, known[relation])


def _fact(subject: str, relation: str, wording: str, opening: str, answer: str) -> Fact:
    sentence = statement(subject, wording, opening)
    prompt = join_words(sentence.words)
    ((start, stop),) = sentence.slots["SUBJECT"]
    first = prompt.index(subject)
    other = _other(subject, relation)
    return Fact(
        prompt,
        subject,
        (start + 1, stop + 1),  # the model counts the start token too
        (first, first + len(subject)),
        relation,
        answer,
        join_words(statement(other, wording, opening).words),
        SUBJECTS[other][relation],
    )


def _other(subject: str, relation: str) -> str:
    """The next subject of as many words that shares none of the last two, nor the answer."""
    names = list(SUBJECTS)
    at = names.index(subject)
    here = split_words(subject)
    for name in names[at + 1 :] + names[:at]:
        there = split_words(name)
        apart = len(there) == len(here) and not set(there[-2:]) & set(here[-2:])
        if apart and SUBJECTS[name][relation] != SUBJECTS[subject][relation]:
            return name
    raise AssertionError(f"the grid of subjects is too small for {subject}")


def _ioi() -> Iterator[IOIPair]:
    """Every pair of names four times, once in each wording, with order and giver varied."""
    places, things = toy_words.PLACES, toy_words.THINGS
    for n, (a, b) in enumerate(combinations(toy_words.NAMES, 2)):
        for k, template in enumerate(toy_words.GIVING):
            first, second = (a, b) if (n + k // 2) % 2 == 0 else (b, a)
            giver, other = (second, first) if k % 2 == 0 else (first, second)
            setting = places[(n + k) % len(places)], things[(n // 8 + k) % len(things)]
            clean = join_words(giving(template, first, second, giver, *setting).words)
            corrupted = join_words(giving(template, first, second, other, *setting).words)
            yield IOIPair(clean, corrupted, other, giver, frozenset((a, b)) not in HELD_OUT)


def _reviews() -> Iterator[Review]:
    rng = random.Random(2)
    for n in range(400):
        both = review(rng)
        # Before the second word of mood or a later one: by then the mood can be known.
        stop = rng.choice(mood_positions(both["good"])[1:])
        mood, opposite = ("good", "bad") if n % 2 == 0 else ("bad", "good")
        yield Review(join_words(both[mood].words[:stop]), join_words(both[opposite].words[:stop]), mood)


def _repeats() -> Iterator[Repeat]:
    rng = random.Random(3)
    for _ in range(300):
        first = rng.sample(PLAIN_WORDS, rng.randint(5, 10))
        again = rng.randint(2, len(first) - 1)
        yield Repeat(join_words(first + first[:again]), first[again])
