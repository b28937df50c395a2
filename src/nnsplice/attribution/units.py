"""`ns.path_patch` and `ns.attribute` in units: some prompt pairs with all their cells."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from nnsplice import engine
from nnsplice.activations.prompts import PairSpanTexts
from nnsplice.attribution import edges, path_patching
from nnsplice.attribution.attribute import check_numbers, estimate_identity, method_named, planned
from nnsplice.attribution.methods import METHODS, Estimator, doubts, notes, steps_of
from nnsplice.attribution.packed_paths import PathExecution, path_execution
from nnsplice.attribution.selecting import AUTO
from nnsplice.errors import BadArgument, circumstances
from nnsplice.paths import Paths
from nnsplice.results import Run, SweepResult, Table
from nnsplice.sweeps.options import check_options, known_of
from nnsplice.sweeps.planning import plan_sweep
from nnsplice.sweeps.running import check_mode, measured_table
from nnsplice.sweeps.tables import arrays_of, plan_in, result_of, unit_plan
from nnsplice.units import Agree, Kind, Models, Outcomes, UnitPlan, packed_text, text_in
from nnsplice.work import Arrays

#: Passes of the model that a gradient takes, about.
PASSES = 4


# --- path_patch -------------------------------------------------------------------------------------------------------


def plan_paths(
    model: Any, clean: Any, corrupted: Any, senders: Paths, receivers: Paths, metric: Any, **options: Any
) -> UnitPlan[Any]:
    """The plan of path patches; the arguments are those of `ns.path_patch`."""
    check_options("ns.path_patch", options, known_of(path_patching.path_patch, plan_sweep, path_patching.SET_HERE))
    model = engine.as_model(model)
    with circumstances("ns.path_patch"):
        plan = path_patching.planned(model, clean, corrupted, senders, metric, **options)
        plan, paths = path_patching.routed(model, plan, [receivers] * len(plan.targets))
    listed = [str(path) for path in paths.receivers[0]]
    return unit_plan("nnsplice.attribution.units:PATHS", model, plan, plan.costs(), receivers=listed)


def _paths_ready(
    plan: UnitPlan[Any], models: Models, max_tokens: int, agree: Agree
) -> Callable[[Sequence[int]], Arrays]:
    model = models.model
    check_mode(model)
    engine.refuse_changed_logits(model)
    whole = plan_in(plan, model)
    paths = path_patching.ReceiversBySender.of(model, whole, [plan.question["receivers"]] * len(whole.targets))
    way = PathExecution(
        **agree("way", lambda: dataclasses.asdict(path_execution(whole, model, paths.executor, max_tokens)))
    )
    executor = paths.agreed(way)

    def unit(prompts: Sequence[int]) -> Arrays:
        with engine.locked(model):
            return arrays_of(measured_table(whole.take(prompts), model, executor, max_tokens))

    return unit


def _paths_joined(plan: UnitPlan[Any], outcomes: Outcomes) -> SweepResult:
    metric = plan.question["plan"]["metric"]
    return result_of(plan, outcomes, metrics=tuple(name for name, _ in metric.get("several", ())))


PATHS = Kind("ns.path_patch", _paths_ready, _paths_joined)


# --- attribute --------------------------------------------------------------------------------------------------------

#: Methods that look at all prompts first and cannot be cut into units: name -> the reason, and an alternative.
_OVER_ALL = {
    AUTO: ("takes the method that is best on a slice of all prompts", 'a method by name, such as method="ig"'),
    "exact": ("measures each edge by path patching, which has units of its own", "ns.plan(ns.path_patch, ...)"),
}


def plan_attribute(
    model: Any,
    clean: Any,
    corrupted: Any,
    sites: Paths,
    metric: Any,
    *,
    method: str = "atp",
    receivers: Paths | None = None,
    steps: int | None = None,
    verify: int = 0,
    spans: PairSpanTexts | None = None,
    align: str = "position",
    seed: int = 0,
) -> UnitPlan[Any]:
    """The plan of estimates; the arguments are those of `ns.attribute`."""
    model = engine.as_model(model)
    with circumstances("ns.attribute"):
        if method in _OVER_ALL:
            why, instead = _OVER_ALL[method]
            raise BadArgument(f'method="{method}" {why}, so it is not run in units', expected=instead)
        if verify:
            raise BadArgument(
                f"verify={verify} ranks the estimates of all prompts, so it is not run in units",
                expected="no verify",
                write="ns.sweep(...) of the cells that matter, or ns.attribute(..., verify=) in one process",
            )
        check_numbers(steps, verify)
        chosen = method_named(method, receivers, steps, verify)
        together = chosen.nodes is None
        plan = planned(model, clean, corrupted, sites, metric, spans=spans, align=align, seed=seed, together=together)
        graph = edges.EdgeGraph.of(model, plan, receivers) if together else None
        each = steps_of(chosen, steps)
        # Unsupported sites and pairs are refused here, not in the workers.
        estimator = Estimator(model, plan, method, chosen, graph, each, 1, progress=False)
        estimator.check()
        plan = replace(plan, asked=estimate_identity(plan, method, each, graph))
    depth = len(engine.expand(model, "layers[:].output"))
    costs = [PASSES * (each + 1) * depth * length for length in plan.corrupted.lengths("decoder")]
    return unit_plan(
        "nnsplice.attribution.units:ATTRIBUTE", model, plan, costs, method=method, steps=each,
        receivers=None if graph is None else list(graph.receivers), doubts=doubts(plan, method),
    )  # fmt: skip


def _attribute_ready(
    plan: UnitPlan[Any], models: Models, max_tokens: int, _agree: Agree
) -> Callable[[Sequence[int]], Arrays]:
    question, model = plan.question, models.model
    check_mode(model)
    engine.refuse_changed_logits(model)
    whole = plan_in(plan, model)
    name, receivers, steps = question["method"], question["receivers"], question["steps"]
    graph = None if receivers is None else edges.EdgeGraph.of(model, whole, receivers)

    def unit(prompts: Sequence[int]) -> Arrays:
        start, part = time.perf_counter(), whole.take(prompts)
        found = Estimator(model, part, name, METHODS[name], graph, steps, max_tokens, progress=False).whole()
        exists, spent = part.exists(), found.spent
        run = Run(name, time.perf_counter() - start, **spent.cost.as_dict(), known=len(part.known))
        table = Table(
            (), found.corrupted[:, None] + found.scores, exists, exists, found.clean, found.corrupted, run=run,
            edges=found.edges,
        )  # fmt: skip
        return {**arrays_of(table), "backwards": packed_text([spent.backwards, spent.notes])}

    return unit


def _attribute_joined(plan: UnitPlan[Any], outcomes: Outcomes) -> SweepResult:
    question = plan.question
    found = result_of(plan, outcomes, receivers=tuple(question["receivers"] or ()))
    each = [text_in(arrays["backwards"]) for _, arrays in outcomes]
    run, noted = found.run, [note for _, some in each for note in some]
    note = notes(run.forwards, sum(backwards for backwards, _ in each), noted, question["doubts"])
    return SweepResult(replace(found.table, run=replace(run, note=note)))


ATTRIBUTE = Kind("ns.attribute", _attribute_ready, _attribute_joined)
