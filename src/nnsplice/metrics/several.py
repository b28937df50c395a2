"""Several metrics of one run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nnsplice.errors import BadArgument, BadType, named
from nnsplice.metrics.answers import per_prompt
from nnsplice.metrics.metric import Bound, Metric, MetricLike

#: A metric, several of them, or several by name.
Metrics = MetricLike | Sequence[MetricLike] | Mapping[str, MetricLike]


@dataclass(frozen=True)
class Several:
    """Bound metrics by name, used like a `Bound` that returns a number for each metric."""

    parts: tuple[tuple[str, Bound], ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the metrics."""
        return tuple(name for name, _ in self.parts)

    @property
    def metric(self) -> Metric:
        """A metric with the requirements of all of them."""
        each = [bound.metric for _, bound in self.parts]
        return Metric(
            ", ".join(self.names), _none, {}, each[0].position,
            compares=any(one.compares for one in each), local=all(one.local for one in each),
        )  # fmt: skip

    def __call__(self, logits: Tensor, prompts: Sequence[int], reference: Tensor | None = None) -> Tensor:
        """`[row, metric]`."""
        found = [bound(logits, prompts, reference) for _, bound in self.parts]
        return torch.stack([one.double() for one in found], -1)

    def take(self, rows: Sequence[int]) -> Several:
        """The metrics for these prompts only."""
        return Several(tuple((name, bound.take(rows)) for name, bound in self.parts))

    def check_answers(self, logits: Tensor, prompts: Sequence[int]) -> None:
        """Warn of answers whose other spelling is far likelier in an unedited run."""
        for _, bound in self.parts:
            bound.check_answers(logits, prompts)

    def tokens(self, prompts: Sequence[int]) -> Tensor:
        """`[row, answer]`, the token ids of all answers, metric by metric."""
        return torch.cat([bound.tokens(prompts) for _, bound in self.parts], 1)

    def of_tokens(self, logits: Tensor, prompts: Sequence[int]) -> Tensor:
        """`[row, metric]` of local metrics, from the logits of just those tokens."""
        found: list[Tensor] = []
        at = 0
        for _, bound in self.parts:
            width = bound.tokens(prompts).shape[1]
            found.append(bound.of_tokens(logits[:, at : at + width], prompts).double())
            at += width
        return torch.stack(found, -1)

    @property
    def identity(self) -> dict[str, Any]:
        """Plain data that is equal for equal metrics."""
        return {"metrics": [{"called": name, **bound.identity} for name, bound in self.parts]}


def _none(logits: Tensor) -> Tensor:
    raise AssertionError("several metrics have no rule of their own")


def bound_of(given: Metrics, tokenizer: Any, prompts: int, texts: Sequence[str] | None = None) -> Bound | Several:
    """One metric or several, with their answers as token ids.

    Raises:
        BadArgument: two have one name, or they read at different positions.
    """
    if isinstance(given, Metric) or callable(given):
        return Metric.of(given).bind(tokenizer, prompts, texts)
    metrics = _named(given)
    parts = tuple((name, metric.bind(tokenizer, prompts, texts)) for name, metric in metrics)
    positions = {name: metric.position for name, metric in metrics}
    if len(set(positions.values())) > 1:
        raise BadArgument(
            "these metrics read at different positions: " + ", ".join(f"{n} [{at}]" for n, at in positions.items()),
            expected="metrics of one position in a sweep",
        )
    return Several(parts)


def repeated_metric(given: Metrics, prompts: int, times: int) -> Metrics:
    """One metric or several, for prompts that run several times each, one after the other.

    >>> from nnsplice.metrics import repeated_metric
    >>> repeated_metric(ns.probability(["w3", "w4"]), 2, 2).answers
    {'answer': ['w3', 'w3', 'w4', 'w4']}
    """

    def repeated(metric: Metric) -> Metric:
        answers = {
            name: [one for one in per_prompt(answer, prompts) for _ in range(times)]
            for name, answer in metric.answers.items()
        }
        return replace(metric, answers=answers)

    if isinstance(given, Metric) or callable(given):
        return repeated(Metric.of(given))
    return {name: repeated(metric) for name, metric in _named(given)}


def _named(given: Sequence[MetricLike] | Mapping[str, MetricLike]) -> list[tuple[str, Metric]]:
    if not isinstance(given, Mapping | Sequence) or isinstance(given, str):
        Metric.of(given)  # type: ignore[arg-type]  # says what is expected
        raise BadType(f"{named(given)} is no metric", expected="a metric, or several")
    if not given:
        raise BadType(f"{named(given)} of no metrics", expected="at least one metric")
    if isinstance(given, Mapping):
        return [(str(name), Metric.of(metric)) for name, metric in given.items()]
    found = [Metric.of(metric) for metric in given]
    names = [metric.name for metric in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise BadArgument(
            f"{names.count(twice)} of these metrics are called {twice}",
            expected="names of your own",
            write=f'metric={{"first {twice}": ..., "second {twice}": ...}}',
        )
    return list(zip(names, found, strict=True))
