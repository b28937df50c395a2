"""The language of the toy models: sentences as frozen records, the same in every process.

toy_prompts()   facts, IOI sentences, reviews and repeats, ready for a capture or a sweep
WORDS           the vocabulary of the toy models
tokens, text    a text as words, and words as a text
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, combinations

from nnsplice.models import words as w

#: A range, `(start, stop)`.
Bounds = tuple[int, int]

# -------------------------------------------------------------------------------------------------------------- records


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


# -------------------------------------------------------------------------------------------------- words and templates


def tokens(text: str) -> list[str]:
    """The words and marks of a text, cut as the toy models' tokenizer cuts them.

    >>> from nnsplice.models.language import tokens
    >>> tokens("In fact, the Velmar Tower")
    ['In', 'fact', ',', 'the', 'Velmar', 'Tower']
    """
    return re.findall(r"\w+|[^\w\s]+", text)


def text(words: Iterable[str]) -> str:
    """Words and marks as a text that `tokens` cuts into them again."""
    return re.sub(r" ([,.:])", r"\1", " ".join(words))


@dataclass(frozen=True, slots=True)
class Filled:
    """A template with its slots filled.

    Attributes:
        words: the words.
        where: the ranges of words of each slot.
    """

    words: tuple[str, ...]
    where: Mapping[str, tuple[Bounds, ...]]


def fill(template: str, slots: Mapping[str, Iterator[str] | str]) -> Filled:
    """Put words into the slots of a template: always the same ones, or the next of an iterator."""
    words: list[str] = []
    where: dict[str, tuple[Bounds, ...]] = {}
    for word in tokens(template):
        filling = slots.get(word)
        if filling is None:
            words.append(word)
            continue
        new = tokens(filling) if isinstance(filling, str) else [next(filling)]
        where[word] = (*where.get(word, ()), (len(words), len(words) + len(new)))
        words += new
    return Filled(tuple(words), where)


# ---------------------------------------------------------------------------------------------------------------- facts


def _subjects() -> dict[str, dict[str, str]]:
    """Subject -> relation -> answer. Answers are distributed evenly and at random over the subjects."""
    two = [f"{first} {kind}" for first in w.FIRSTS for kind in w.KINDS]
    three = [f"{w.GREAT} {w.FIRSTS[i % 8]} {w.KINDS[(i * 3 + i // 8) % 8]}" for i in range(16)]
    names = two + three
    rng = random.Random(0)
    answers = {relation: [pool[i % len(pool)] for i in range(len(names))] for relation, pool in w.ANSWERS.items()}
    for dealt in answers.values():
        rng.shuffle(dealt)
    return {name: {relation: answers[relation][i] for relation in answers} for i, name in enumerate(names)}


#: Subject -> relation -> answer: all facts of the language.
SUBJECTS = _subjects()


def statement(subject: str, wording: str, opening: str = "") -> Filled:
    """A sentence about a subject, up to its answer."""
    article = "the" if opening else "The"
    return fill(f"{opening} {article} SUBJECT {wording}", {"SUBJECT": subject})


def _facts() -> Iterator[Fact]:
    for opening in ("", "In fact,"):
        for relation, wordings in w.RELATIONS.items():
            for wording in wordings:
                for subject, known in SUBJECTS.items():
                    yield _fact(subject, relation, wording, opening, known[relation])


def _fact(subject: str, relation: str, wording: str, opening: str, answer: str) -> Fact:
    sentence = statement(subject, wording, opening)
    prompt = text(sentence.words)
    ((start, stop),) = sentence.where["SUBJECT"]
    first = prompt.index(subject)
    other = _other(subject, relation)
    return Fact(
        prompt,
        subject,
        (start + 1, stop + 1),  # the model counts the start token too
        (first, first + len(subject)),
        relation,
        answer,
        text(statement(other, wording, opening).words),
        SUBJECTS[other][relation],
    )


def _other(subject: str, relation: str) -> str:
    """The next subject of as many words that shares none of the last two, nor the answer."""
    names = list(SUBJECTS)
    at = names.index(subject)
    here = tokens(subject)
    for name in names[at + 1 :] + names[:at]:
        there = tokens(name)
        apart = len(there) == len(here) and not set(there[-2:]) & set(here[-2:])
        if apart and SUBJECTS[name][relation] != SUBJECTS[subject][relation]:
            return name
    raise AssertionError(f"the grid of subjects is too small for {subject}")


# ----------------------------------------------------------------------------------------------------------- two people


def _held_out() -> frozenset[frozenset[str]]:
    rng = random.Random(1)
    return frozenset(frozenset(pair) for pair in combinations(w.NAMES, 2) if rng.random() < 0.2)


#: Pairs of names that are not in the training data.
HELD_OUT = _held_out()


def giving(template: str, a: str, b: str, giver: str, place: str, thing: str) -> Filled:
    """A sentence in which the giver, who is `a` or `b`, gives something to the other."""
    return fill(template, {"A": a, "B": b, "S": giver, "PLACE": place, "THING": thing})


def _ioi() -> Iterator[IOIPair]:
    """Every pair of names four times, once in each wording, with order and giver varied."""
    for n, (a, b) in enumerate(combinations(w.NAMES, 2)):
        for k, template in enumerate(w.GIVING):
            first, second = (a, b) if (n + k // 2) % 2 == 0 else (b, a)
            giver, other = (second, first) if k % 2 == 0 else (first, second)
            setting = w.PLACES[(n + k) % len(w.PLACES)], w.THINGS[(n // 8 + k) % len(w.THINGS)]
            clean = text(giving(template, first, second, giver, *setting).words)
            corrupted = text(giving(template, first, second, other, *setting).words)
            yield IOIPair(clean, corrupted, other, giver, frozenset((a, b)) not in HELD_OUT)


# -------------------------------------------------------------------------------------------------------------- reviews

MOOD_WORDS: dict[str, tuple[str, ...]] = {mood: tuple(chain(*slots.values())) for mood, slots in w.MOODS.items()}


def review(rng: random.Random) -> dict[str, Filled]:
    """One review in both moods, which differ in the words of mood only."""
    template = rng.choice(w.REVIEWS)
    topic, parts = rng.choice(w.TOPICS), rng.sample(w.PARTS, 2)
    # Drawn before the mood is known, so that both moods use the same numbers.
    draws = {slot: [rng.randrange(len(pool)) for _ in range(3)] for slot, pool in w.MOODS["good"].items()}
    return {
        mood: fill(
            template,
            {"TOPIC": topic, "PART": iter(parts)}
            | {slot: iter([pool[i] for i in draws[slot]]) for slot, pool in slots.items()},
        )
        for mood, slots in w.MOODS.items()
    }


def mood_places(filled: Filled) -> list[int]:
    """Where the words of mood stand."""
    return sorted(start for slot in w.MOODS["good"] for start, _ in filled.where.get(slot, ()))


def _reviews() -> Iterator[Review]:
    rng = random.Random(2)
    for n in range(400):
        both = review(rng)
        # Before the second word of mood or a later one: by then the mood can be known.
        stop = rng.choice(mood_places(both["good"])[1:])
        mood, opposite = ("good", "bad") if n % 2 == 0 else ("bad", "good")
        yield Review(text(both[mood].words[:stop]), text(both[opposite].words[:stop]), mood)


# -------------------------------------------------------------------------------------------------------------- repeats


def _vocabulary() -> tuple[str, ...]:
    sentences = (*w.OPENINGS, *chain(*w.RELATIONS.values()), *w.GIVING, *w.REVIEWS, "The the Quiz : .")
    pools = (w.FIRSTS, w.KINDS, (w.GREAT,), *w.ANSWERS.values(), w.QUIZ.values(), w.NAMES, *w.SLOTS.values())
    slots = {"A", "B", "S", *w.SLOTS, *w.MOODS["good"]}
    plain = (word for sentence in sentences for word in tokens(sentence) if word not in slots)
    return tuple(dict.fromkeys(chain(plain, *pools, *MOOD_WORDS.values())))


#: Every word and mark of the language.
WORDS = _vocabulary()
#: Without the marks, which would run together where two of them meet.
PLAIN_WORDS = tuple(word for word in WORDS if word.isalpha())


def _repeats() -> Iterator[Repeat]:
    rng = random.Random(3)
    for _ in range(300):
        first = rng.sample(PLAIN_WORDS, rng.randint(5, 10))
        again = rng.randint(2, len(first) - 1)
        yield Repeat(text(first + first[:again]), first[again])
