"""`ns.steering.sweep` in units: some prompts with all layers and coefficients."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from safetensors.torch import load, save

from nnsplice import engine
from nnsplice.activations import SavedActivation
from nnsplice.errors import BadArgument
from nnsplice.steering.cells import SteeringPlan, run_cells
from nnsplice.steering.result import SteeringSweep
from nnsplice.steering.rules import rules_of
from nnsplice.steering.sweep import check_fired, identity_of, planned, result_of, shown_of
from nnsplice.steering.where import Where
from nnsplice.units import (
    Agree,
    Kind,
    Models,
    Outcomes,
    UnitPlan,
    function_of,
    lists_of,
    metric_of,
    packed_text,
    plain_function,
    plain_metric,
    plain_prompts,
    prompts_in,
    prompts_of,
    rows_of,
)
from nnsplice.work import Arrays

VECTOR = "vector.safetensors"


def plan(model: Any, prompts: Any, vector: Any, *args: Any, operator: Any = "add", **options: Any) -> UnitPlan[Any]:
    """The plan of a sweep, whose arguments these are."""
    model = engine.as_model(model)
    if options.get("do_sample"):
        raise BadArgument(
            "do_sample=True draws what a text goes on with, which would be another one in each process",
            expected="greedy generation",
        )
    whole = planned(model, prompts, vector, *args, operator=operator, **options)
    generate = dict(whole.generate or {})
    wrong = [name for name, value in generate.items() if not isinstance(value, str | int | float | bool)]
    if wrong:
        raise BadArgument(f"{wrong[0]}= is no text and no number, and other processes cannot have it")
    identity = identity_of(model, whole, anew=False)
    question = {
        "weights": identity["weights"],
        "saes": identity.get("saes", {}),
        "prompts": plain_prompts(whole.prompts),
        "coefficients": list(whole.coefficients),
        "metric": plain_function(whole.metric, "metric") if whole.new_tokens else plain_metric(whole.metric),
        "operator": operator if isinstance(operator, str) else plain_function(operator, "operator"),
        "where": dataclasses.asdict(whole.where),
        "new_tokens": whole.new_tokens,
        "generate": generate,
        "guard": whole.guard,
        "shown": shown_of(whole, identity["model"]),
    }
    tensors = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in vector.items()}
    depth, cells = len(engine.expand(model, "layers[:].output")), len(whole.rules) * len(whole.coefficients) + 1
    costs = [(length + whole.new_tokens) * depth * cells for length in whole.prompts.lengths("decoder")]
    return UnitPlan.of("nnsplice.steering.units:SWEEP", question, costs, {VECTOR: save(tensors)})


def _ready(plan: UnitPlan[Any], models: Models, max_tokens: int, _agree: Agree) -> Callable[[Sequence[int]], Arrays]:
    question, model = plan.question, models.model
    if engine.in_training(model):
        raise BadArgument("the model is in train mode, so every run would be another one", write="model.eval()")
    engine.refuse_edits(model)
    engine.refuse_changed_logits(model, bare=True)
    operator, new = question["operator"], question["new_tokens"]
    operator = operator if isinstance(operator, str) else function_of(operator, "operator")
    where = _where_of(question["where"])
    vector = SavedActivation.from_pairs(*load(plan.file(VECTOR)).items())
    rules = rules_of(model, vector, 1.0, operator, where, None, None)
    metric = function_of(question["metric"], "metric") if new else metric_of(question["metric"])
    whole = SteeringPlan(
        prompts_of(question["prompts"], model), rules, tuple(question["coefficients"]), metric, new,
        question["generate"], question["guard"], rules[0].name, where, question["shown"]["metric"],
    )  # fmt: skip

    def unit(prompts: Sequence[int]) -> Arrays:
        found = run_cells(model, whole.take(prompts), max_tokens)
        return {
            "values": np.moveaxis(found.values, 0, 1),
            "texts": packed_text(found.texts),
            "fired": np.array(found.fired),
        }

    return unit


def _joined(plan: UnitPlan[Any], outcomes: Outcomes) -> SteeringSweep:
    shown = dict(plan.question["shown"])
    where = _where_of(plan.question["where"])
    check_fired(where, any(bool(arrays["fired"]) for _, arrays in outcomes))
    if shown["prompts"]:
        shown["prompts"] = [shown["prompts"][prompt] for prompt in prompts_in(outcomes)]
    return result_of(np.moveaxis(rows_of(outcomes, "values"), 1, 0), lists_of(outcomes, "texts"), shown)


def _where_of(data: Mapping[str, Any]) -> Where:
    start, stop = tuple(data["start"]), tuple(data["stop"])
    return Where(data["kind"], start, stop, tuple(tuple(row) for row in data["mask"]))


SWEEP = Kind("ns.steering.sweep", _ready, _joined)
