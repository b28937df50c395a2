"""Facts: attributes of subjects."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache
from importlib.resources import files
from typing import Any

from nnsplice.errors import BadArgument
from nnsplice.tasks.task import Record, Task
from nnsplice.tasks.writing import Writer, drawn, filled

#: Relation, template, subject, answer.
_Fact = tuple[str, str, str, str]


def facts(model: Any, n: int = 20, seed: int = 0, *, relations: Sequence[str] | None = None) -> Task:
    """Known facts from ROME, up to their answer; the corrupted prompt has another subject with as many tokens.

    `filter(model)` keeps the facts that a model knows. Span: `subject`. Variables: `subject`, `other`, `relation` (by
    its Wikidata id: `"P36"` is the capital).

    >>> record = ns.tasks.facts(tokenizer, 1)[0]
    >>> record.clean, record.answer, record.wrong
    ('In Petrozavodsk, the language spoken is', ' Russian', ' Irish')

    Args:
        model: the model, or its tokenizer, which decides which answers are one token.
        n: the number of pairs.
        seed: the seed of the pairs.
        relations: only facts of these relations.

    Returns:
        The pairs, with answers, spans and variables.

    Raises:
        BadArgument: a relation that does not exist, or a model without a tokenizer that has offsets, or one in which
            the task has no pairs.
    """
    held = _read()
    if relations is not None:
        known = sorted({relation for relation, *_ in held})
        strange = sorted(set(relations) - set(known))
        if strange:
            raise BadArgument(f"no facts of the relation {strange[0]!r}", expected=", ".join(known))
        held = tuple(fact for fact in held if fact[0] in relations)
    alike: dict[str, list[_Fact]] = {}
    for fact in held:
        alike.setdefault(fact[1], []).append(fact)
    return drawn("facts", model, n, seed, lambda writer, rng: _record(writer, rng, held, alike))


def _record(writer: Writer, rng: random.Random, held: Sequence[_Fact], alike: dict[str, list[_Fact]]) -> Record | None:
    relation, template, subject, word = rng.choice(held)
    _, _, other, wrong_word = rng.choice(alike[template])
    if word == wrong_word:
        return None
    clean, corrupted = (filled(template, {"subject": one}) for one in (subject, other))
    answer, wrong = (writer.answer(clean.text, one) for one in (word, wrong_word))
    return writer.record(clean, corrupted, answer, wrong, {"subject": subject, "other": other, "relation": relation})


@lru_cache(maxsize=1)
def _read() -> tuple[_Fact, ...]:
    text = (files("nnsplice.tasks") / "data" / "facts.tsv").read_text(encoding="utf-8")
    rows = (line.split("\t") for line in text.splitlines()[1:])
    return tuple((relation, template, subject, answer) for relation, template, subject, answer in rows)
