"""`ns.sweep_weights` in units: some prompts with the weights of every site swapped, one site at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from nnsplice import engine
from nnsplice.activations.prompts import PromptsLike
from nnsplice.errors import BadArgument
from nnsplice.metrics import Bound, MetricLike
from nnsplice.paths import Paths
from nnsplice.results import Cell, SweepResult
from nnsplice.sweeps.tables import arrays_of, joined
from nnsplice.sweeps.weights import asked_of, measured_part
from nnsplice.units import (
    Agree,
    Kind,
    Models,
    Outcomes,
    UnitPlan,
    metric_of,
    plain_metric,
    plain_prompts,
    prompts_of,
)
from nnsplice.work import Arrays


def plan(
    base: Any, tuned: Any, prompts: PromptsLike, sites: Paths, metric: MetricLike, *, batch_size: int | None = None
) -> UnitPlan[Any]:
    """The plan of a sweep of weights, whose arguments these are."""
    if isinstance(tuned, Mapping):
        raise BadArgument(
            "the tuned weights are tensors of this process, and other processes load a model of their own",
            expected="the tuned model",
            write='tuned = ns.load("folder of the tuned model")',
        )
    base = engine.as_model(base)
    asking = asked_of(base, tuned, prompts, sites, metric, batch_size=batch_size)
    given = asking.runs.given
    told = {
        "weights": asking.asked["weights"],
        "source_weights": engine.weights_digest(tuned),
        "prompts": plain_prompts(given),
        "cells": [dataclasses.astuple(cell) for cell in asking.cells],
        "sites": [cell.path for cell in asking.cells],
        "metric": plain_metric(asking.runs.metric),
        "batch_size": batch_size,
        "asked": dict(asking.asked),
        "tokens": [list(texts) for texts in asking.runs.tokens],
    }
    depth = len(engine.expand(base, "layers[:].output"))
    costs = [length * depth * (len(asking.cells) + 2) for length in given.lengths("decoder")]
    return UnitPlan.of("nnsplice.sweeps.weight_units:WEIGHTS", told, costs, {})


def _ready(plan: UnitPlan[Any], models: Models, max_tokens: int, _agree: Agree) -> Callable[[Sequence[int]], Arrays]:
    told, tuned = plan.told, models.source
    given, metric = prompts_of(told["prompts"], models.model), metric_of(told["metric"])
    assert isinstance(metric, Bound)  # as this sweep has one
    asking = asked_of(models.model, tuned, given, told["sites"], metric, batch_size=told["batch_size"])

    def unit(prompts: Sequence[int]) -> Arrays:
        longest = max(given.length("decoder", prompt) for prompt in prompts)
        return arrays_of(measured_part(asking, tuned, prompts, max(max_tokens // longest, 1)))

    return unit


def _joined(plan: UnitPlan[Any], outcomes: Outcomes) -> SweepResult:
    told = plan.told
    cells = tuple(Cell(*cell) for cell in told["cells"])
    exists = np.ones((len(plan), len(cells)), dtype=bool)
    return joined(plan, outcomes, cells, exists, told["asked"], told["tokens"], {})


WEIGHTS = Kind("ns.sweep_weights", _ready, _joined)
