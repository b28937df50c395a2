"""Answers of several tokens: a run for each answer token, with the earlier ones appended to the prompt.

The log probability of an answer is the sum over its tokens, each given the prompt and the tokens before it. So a prompt
with an answer of k tokens becomes k runs, for any executor, and its value is the sum of theirs.
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
    """The runs of prompts with answers of several tokens."""

    corrupted: Prompts
    clean: Prompts | None
    metric: Bound
    #: For each run: its prompt, and the number of answer tokens that are appended.
    owners: tuple[int, ...]
    appended: tuple[int, ...]
    #: The metric as plain data.
    identity: dict[str, Any]


def answer_runs(model: engine.Model, metric: Metric, edited: Prompts, source: Prompts | None, align: str) -> AnswerRuns:
    """The runs of a metric whose answer has several tokens.

    Raises:
        BadArgument: the model is not a causal decoder, or `align="role"`.
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
    with_answers = _with_answers(edited, answers, runs)
    bound = Bound(
        replace(metric, sequence=False), {"answer": tuple(answers[prompt][number] for prompt, number in runs)}
    )
    return AnswerRuns(
        with_answers,
        with_answers if source is edited else None if source is None else _with_answers(source, answers, runs),
        bound,
        tuple(prompt for prompt, _ in runs),
        tuple(number for _, number in runs),
        {"name": metric.name, "position": metric.position, "ids": {"answer": answers}},
    )


def _with_answers(prompts: Prompts, answers: Sequence[Sequence[int]], runs: Sequence[tuple[int, int]]) -> Prompts:
    each = prompts.take([prompt for prompt, _ in runs])
    ids = tuple(row + tuple(answers[p][:number]) for row, (p, number) in zip(each.ids, runs, strict=True))
    images = (
        None
        if each.images is None
        else tuple(one.longer(number) for one, (_, number) in zip(each.images, runs, strict=True))
    )
    return replace(each, ids=ids, texts=None, images=images)


def summed(table: Table, owners: Sequence[int], tokens: tuple[tuple[str, ...], ...]) -> Table:
    """The table of prompts: the sum over the runs of each."""
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
