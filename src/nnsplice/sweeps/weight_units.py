"""`ns.sweep_weights` in units: each unit has some prompts, and swaps the weights of one site at a time."""

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
from nnsplice.sweeps.tables import arrays_of, joined_result
from nnsplice.sweeps.weights import measured_part, weight_request
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
    """The plan of `ns.sweep_weights` with these arguments."""
    if isinstance(tuned, Mapping):
        raise BadArgument(
            "the tuned weights are tensors of this process, and other processes load a model of their own",
            expected="the tuned model",
            write='tuned = ns.load("folder of the tuned model")',
        )
    base = engine.as_model(base)
    request = weight_request(base, tuned, prompts, sites, metric, batch_size=batch_size)
    given = request.runs.given
    question = {
        "weights": request.asked["weights"],
        "source_weights": engine.weights_digest(tuned),
        "prompts": plain_prompts(given),
        "cells": [dataclasses.astuple(cell) for cell in request.cells],
        "sites": [cell.path for cell in request.cells],
        "metric": plain_metric(request.runs.metric),
        "batch_size": batch_size,
        "asked": dict(request.asked),
        "tokens": [list(texts) for texts in request.runs.tokens],
    }
    depth = len(engine.expand(base, "layers[:].output"))
    costs = [length * depth * (len(request.cells) + 2) for length in given.lengths("decoder")]
    return UnitPlan.of("nnsplice.sweeps.weight_units:WEIGHTS", question, costs, {})


def _ready(plan: UnitPlan[Any], models: Models, max_tokens: int, _agree: Agree) -> Callable[[Sequence[int]], Arrays]:
    question, tuned = plan.question, models.source
    given, metric = prompts_of(question["prompts"], models.model), metric_of(question["metric"])
    assert isinstance(metric, Bound)  # a sweep of weights has one metric
    request = weight_request(models.model, tuned, given, question["sites"], metric, batch_size=question["batch_size"])

    def unit(prompts: Sequence[int]) -> Arrays:
        longest = max(given.length("decoder", prompt) for prompt in prompts)
        return arrays_of(measured_part(request, tuned, prompts, max(max_tokens // longest, 1)))

    return unit


def _joined(plan: UnitPlan[Any], outcomes: Outcomes) -> SweepResult:
    question = plan.question
    cells = tuple(Cell(*cell) for cell in question["cells"])
    exists = np.ones((len(plan), len(cells)), dtype=bool)
    return joined_result(plan, outcomes, cells, exists, question["asked"], question["tokens"], {})


WEIGHTS = Kind("ns.sweep_weights", _ready, _joined)
