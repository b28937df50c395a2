"""Answers of several tokens: a run for each token, with the earlier ones appended.

The logarithm of an answer's probability is the sum over its tokens, each read behind those before it. So a prompt with
an answer of k tokens is k runs of one more token each, which every executor can make, and the sum of what they measure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from nnsplice import engine
from nnsplice.activations.prompts import Prompts
from nnsplice.errors import BadArgument
from nnsplice.metrics import Bound, Metric, continuation
from nnsplice.results import Table


@dataclass(frozen=True)
class AnswerRuns:
    """Prompts as the runs that their answers need."""

    corrupted: Prompts
    clean: Prompts | None
    metric: Bound
    #: For each run: which prompt it is of, and how many tokens of the answer are appended to it.
    owners: tuple[int, ...]
    appended: tuple[int, ...]
    #: The metric as plain data.
    identity: dict[str, Any]


def spread(model: engine.Model, metric: Metric, edited: Prompts, source: Prompts | None, align: str) -> AnswerRuns:
    """The runs of a metric whose answer has several tokens.

    Raises:
        BadArgument: the model does not read forwards only.
    """
    if not edited.is_causal(model) or edited.decoder_ids is not None:
        raise BadArgument(
            f"{metric.name} appends the answer to the prompt, and this model does not read forwards only",
            expected="a causal decoder",
        )
    if align == "role":
        raise BadArgument(f'{metric.name} with align="role"', expected='align="position" or "end"')
    answers = continuation(metric.name, metric.answers["answer"], engine.tokenizer_of(model), edited.ids, edited.texts)
    runs = [(prompt, number) for prompt, answer in enumerate(answers) for number in range(len(answer))]
    longer = _with(edited, answers, runs)
    bound = Bound(
        replace(metric, sequence=False), {"answer": tuple(answers[prompt][number] for prompt, number in runs)}
    )
    return AnswerRuns(
        longer,
        longer if source is edited else None if source is None else _with(source, answers, runs),
        bound,
        tuple(prompt for prompt, _ in runs),
        tuple(number for _, number in runs),
        {"name": metric.name, "position": metric.position, "ids": {"answer": answers}},
    )


def _with(prompts: Prompts, answers: Sequence[Sequence[int]], runs: Sequence[tuple[int, int]]) -> Prompts:
    each = prompts.take([prompt for prompt, _ in runs])
    ids = tuple(row + tuple(answers[p][:number]) for row, (p, number) in zip(each.ids, runs, strict=True))
    images = (
        None
        if each.images is None
        else tuple(one.longer(number) for one, (_, number) in zip(each.images, runs, strict=True))
    )
    return replace(each, ids=ids, texts=None, images=images)


def summed(table: Table, owners: Sequence[int], tokens: tuple[tuple[str, ...], ...]) -> Table:
    """The table of prompts from that of their runs."""
    of = np.array(owners)
    rows = [np.flatnonzero(of == prompt) for prompt in range(max(owners) + 1)]

    def total(values: np.ndarray) -> np.ndarray:
        return np.stack([values[some].sum(0) for some in rows])

    return replace(
        table,
        values=total(table.values),
        done=np.stack([table.done[some].all(0) for some in rows]),
        exists=np.stack([table.exists[some].all(0) for some in rows]),
        clean=total(table.clean),
        corrupted=total(table.corrupted),
        tokens=tokens,
    )
