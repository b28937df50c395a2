"""Arithmetic: sums of one digit."""

from __future__ import annotations

import random
from typing import Any

from nnsplice.errors import BadArgument
from nnsplice.tasks.task import Record, Task
from nnsplice.tasks.templates import PromptWriter, documented, fill, made_task


@documented
def arithmetic(model: Any, n: int = 20, seed: int = 0, *, shots: int = 3) -> Task:
    """Sums such as `3+4=` after a few solved ones; in the corrupted prompt the second number differs.

    Spans: `a` and `b`, the two numbers. Variables: `a`, `b` and `sum`.

    >>> record = ns.tasks.arithmetic(tokenizer, 1, shots=0)[0]
    >>> record.answer == str(record.variables["a"] + record.variables["b"])
    True

    Args:
        shots: the number of solved sums before.
    """
    if not isinstance(shots, int) or shots < 0:
        raise BadArgument(f"shots={shots!r}", expected="0 or more solved sums")
    return made_task("arithmetic", model, n, seed, lambda writer, rng: _record(writer, rng, shots))


def _sum(rng: random.Random) -> tuple[int, int]:
    a = rng.randint(0, 9)
    return a, rng.randint(0, 9 - a)


def _record(writer: PromptWriter, rng: random.Random, shots: int) -> Record | None:
    solved = "".join(f"{a}+{b}={a + b}\n" for a, b in (_sum(rng) for _ in range(shots)))
    (a, b), other = _sum(rng), rng.randint(0, 9)
    if other == b or a + other > 9:
        return None
    clean, corrupted = (fill(solved + "{a}+{b}=", {"a": str(a), "b": str(second)}) for second in (b, other))
    answer, wrong = (writer.answer(clean.text, str(a + second), space=False) for second in (b, other))
    return writer.record(clean, corrupted, answer, wrong, {"a": a, "b": b, "sum": a + b})
