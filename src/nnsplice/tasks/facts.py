"""Facts: attributes of subjects."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache
from importlib.resources import files
from typing import Any

from nnsplice.errors import BadArgument
from nnsplice.tasks.task import Record, Task
from nnsplice.tasks.templates import PromptWriter, documented, fill, made_task

#: Relation, template, subject, answer.
_Fact = tuple[str, str, str, str]


@documented
def facts(model: Any, n: int = 20, seed: int = 0, *, relations: Sequence[str] | None = None) -> Task:
    """Known facts from ROME, up to their answer; the corrupted prompt has another subject with as many tokens.

    `filter(model)` keeps the facts that a model knows. Span: `subject`. Variables: `subject`, `other`, `relation` (by
    its Wikidata id: `"P36"` is the capital).

    >>> record = ns.tasks.facts(tokenizer, 1)[0]
    >>> record.clean, record.answer, record.wrong
    ('In Petrozavodsk, the language spoken is', ' Russian', ' Irish')

    Args:
        relations: only facts of these relations.
    """
    known_facts = _all_facts()
    if relations is not None:
        known = sorted({relation for relation, *_ in known_facts})
        unknown = sorted(set(relations) - set(known))
        if unknown:
            raise BadArgument(f"no facts of the relation {unknown[0]!r}", expected=", ".join(known))
        known_facts = tuple(fact for fact in known_facts if fact[0] in relations)
    by_template: dict[str, list[_Fact]] = {}
    for fact in known_facts:
        by_template.setdefault(fact[1], []).append(fact)
    return made_task("facts", model, n, seed, lambda writer, rng: _record(writer, rng, known_facts, by_template))


def _record(
    writer: PromptWriter, rng: random.Random, known_facts: Sequence[_Fact], by_template: dict[str, list[_Fact]]
) -> Record | None:
    relation, template, subject, word = rng.choice(known_facts)
    _, _, other, wrong_word = rng.choice(by_template[template])
    if word == wrong_word:
        return None
    clean, corrupted = (fill(template, {"subject": one}) for one in (subject, other))
    answer, wrong = (writer.answer(clean.text, one) for one in (word, wrong_word))
    return writer.record(clean, corrupted, answer, wrong, {"subject": subject, "other": other, "relation": relation})


@lru_cache(maxsize=1)
def _all_facts() -> tuple[_Fact, ...]:
    text = (files("nnsplice.tasks") / "data" / "facts.tsv").read_text(encoding="utf-8")
    rows = (line.split("\t") for line in text.splitlines()[1:])
    return tuple((relation, template, subject, answer) for relation, template, subject, answer in rows)
