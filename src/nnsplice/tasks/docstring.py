"""Docstring: the parameter that a docstring describes next."""

from __future__ import annotations

import random
from typing import Any

from nnsplice.tasks.task import Record, Task
from nnsplice.tasks.templates import PromptWriter, documented, fill, made_task, sampled

_NAMES = (
    "size", "name", "path", "mode", "line", "value", "index", "count", "width", "color", "table", "point", "level",
    "title", "limit", "total", "shape", "group", "label", "score", "token", "image", "model", "state",
)  # fmt: skip
_ABOUT = ("the old one", "used at the end", "left as it is", "read from disk", "kept for later", "set by the user")
_TEMPLATE = '''def {function}(self, {a}, {b}, {c}, {d}):
    """Work on the {thing}.

    :param {a2}: {about_a}
    :param {b2}: {about_b}
    :param'''


@documented
def docstring(model: Any, n: int = 20, seed: int = 0) -> Task:
    """A function whose docstring describes two of its four parameters, up to the name of the third.

    In the corrupted prompt the third and fourth parameter are exchanged in the definition. Spans: `a` to `d`, the
    parameters in the definition; `a2` and `b2`, in the docstring.

    >>> record = ns.tasks.docstring(tokenizer, 1)[0]
    >>> record.clean.splitlines()[0], record.answer, record.wrong
    ('def table(self, shape, line, limit, size):', ' limit', ' size')
    """
    return made_task("docstring", model, n, seed, _record)


def _record(writer: PromptWriter, rng: random.Random) -> Record | None:
    picked, about = sampled(_NAMES, rng, 6), sampled(_ABOUT, rng, 2)
    assert picked is not None and about is not None
    a, b, c, d, function, thing = picked
    words = {
        "function": function,
        "thing": thing,
        "a": a,
        "b": b,
        "a2": a,
        "b2": b,
        "about_a": about[0],
        "about_b": about[1],
    }
    clean, corrupted = (fill(_TEMPLATE, {**words, "c": third, "d": last}) for third, last in ((c, d), (d, c)))
    answer, wrong = (writer.answer(clean.text, word) for word in (c, d))
    return writer.record(clean, corrupted, answer, wrong, {"parameters": (a, b, c, d), "next": c})
