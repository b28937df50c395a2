"""The files of a plan: plain data and tensors, written and read back in another process. Nothing is unpickled."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import Any

from nnsplice import engine
from nnsplice.activations import features
from nnsplice.activations.saved_activation import SavedActivation
from nnsplice.errors import BadArgument
from nnsplice.paths import Path, Slice, Span
from nnsplice.results import Cell
from nnsplice.subspaces import Subspace
from nnsplice.sweeps.corruption import Corruption
from nnsplice.sweeps.jobs import Jobs
from nnsplice.sweeps.operations import NAMES, operation_of
from nnsplice.sweeps.plan import Plan
from nnsplice.sweeps.targets import At, Target, TargetPart
from nnsplice.units import changed, function_of, metric_of, plain_function, plain_metric, plain_prompts, prompts_of
from nnsplice.work import write_json

PLAN, REFERENCE, CORRUPTION = "plan.json", "reference.safetensors", "corruption.safetensors"
SUBSPACE = "subspace.safetensors"
#: The fields of a plan that are written. A plan with other fields set is refused.
_WRITTEN = {
    "corrupted", "clean", "targets", "metric", "operation", "reference", "align", "seed", "jobs", "known", "asked",
    "corruption", "tokens", "owners", "appended", "numbers", "of", "foreign",
}  # fmt: skip


def plain_plan(plan: Plan) -> dict[str, Any]:
    """A plan as plain data, without its tensors.

    Raises:
        BadArgument: its metric or its operation is a function that other processes cannot find.
    """
    for field in dataclasses.fields(plan):
        if field.name not in _WRITTEN and getattr(plan, field.name) not in (None, (), 0, ""):
            raise BadArgument(f"a plan with {field.name}= cannot be given to other processes", expected="one without")
    corruption = plan.corruption
    return {
        "corrupted": plain_prompts(plan.corrupted),
        "clean": "corrupted"
        if plan.clean is plan.corrupted
        else None
        if plan.clean is None
        else plain_prompts(plan.clean),
        "targets": [_target(target) for target in plan.targets],
        "metric": plain_metric(plan.metric),
        "operation": plan.operation.name
        if plan.operation.name in NAMES
        else plain_function(plan.operation.compute, "operation"),
        "subspace": plan.operation.subspace is not None,
        "reference": plan.reference is not None,
        "align": plan.align,
        "seed": plan.seed,
        "jobs": plan.jobs.ranges,
        "known": plan.known.ranges,
        "asked": dict(plan.asked),
        "corruption": None
        if corruption is None
        else {
            "place": str(corruption.place),
            "positions": [list(each) for each in corruption.positions],
            "overwrites": corruption.overwrites,
        },
        "tokens": [list(each) for each in plan.tokens],
        "owners": list(plan.owners),
        "appended": list(plan.appended),
        "numbers": list(plan.numbers),
        "of": plan.of,
        "foreign": plan.foreign,
    }


def write_tensors(plan: Plan, folder: FilePath) -> None:
    """Write the tensors of a plan: reference, subspace, corruption."""
    from safetensors.torch import save_file

    if plan.reference is not None:
        plan.reference.to_file(folder / REFERENCE)
    if plan.operation.subspace is not None:
        plan.operation.subspace.to_file(folder / SUBSPACE)
    if plan.corruption is not None:
        values = {str(row): value.contiguous().clone() for row, value in enumerate(plan.corruption.values)}
        save_file(values, folder / CORRUPTION)


def write_plan(plan: Plan, folder: FilePath, **more: Any) -> None:
    """Write a plan, with more plain data in the same file."""
    record = plain_plan(plan)
    write_tensors(plan, folder)
    write_json(folder / PLAN, {"plan": record, **more})


def read_plan(record: Mapping[str, Any], folder: str | os.PathLike[str], model: engine.Model) -> Plan:
    """The plan from plain data and the tensors beside it, for this model.

    Raises:
        BadArgument: the metric or the operation is a function with other code here.
    """
    from safetensors.torch import load_file

    edited = prompts_of(record["corrupted"], model)
    clean = record["clean"]
    source = edited if clean == "corrupted" else None if clean is None else prompts_of(clean, model)
    corruption = record["corruption"]
    if corruption is not None:
        values = load_file(FilePath(folder) / CORRUPTION)
        (place,) = engine.expand(model, corruption["place"])
        positions = tuple(tuple(each) for each in corruption["positions"])
        each = tuple(values[str(row)] for row in range(len(positions)))
        corruption = Corruption(place, positions, each, corruption["overwrites"])
    reference = SavedActivation.from_file(FilePath(folder) / REFERENCE)._located(model) if record["reference"] else None
    subspace = Subspace.from_file(FilePath(folder) / SUBSPACE) if record["subspace"] else None
    operation = record["operation"]
    operation = operation if isinstance(operation, str) else function_of(operation, "operation")
    plan = Plan(
        corrupted=edited, clean=source, targets=_targets(record["targets"], model), metric=metric_of(record["metric"]),
        operation=operation_of(operation, subspace), reference=reference, align=record["align"],
        seed=record["seed"], jobs=Jobs.of_ranges(record["jobs"]), known=Jobs.of_ranges(record["known"]),
        asked=record["asked"], corruption=corruption, tokens=tuple(tuple(each) for each in record["tokens"]),
        owners=tuple(record["owners"]), appended=tuple(record["appended"]), numbers=tuple(record["numbers"]),
        of=record["of"], foreign=record["foreign"],
    )  # fmt: skip
    features.check_identities(model, plan.asked.get("saes", {}), "the plan")
    # Compared as a whole, so that an option that is not written is refused instead of dropped.
    here = {"operation": plan.operation.identity, "metric": _sources(plan.metric.identity)}
    there = {"operation": record["asked"]["operation"], "metric": _sources(record["asked"]["metric"])}
    for name in here:
        if json.dumps(here[name], sort_keys=True) != json.dumps(there[name], sort_keys=True):
            raise changed(name)
    return plan


def cells_of(record: Mapping[str, Any]) -> tuple[Cell, ...]:
    """The cells of a plan as plain data, without its model."""
    return tuple(Cell(*target["cell"]) for target in record["targets"])


# --- targets ----------------------------------------------------------------------------------------------------------


def _target(target: Target) -> dict[str, Any]:
    parts = [
        {
            "cell": dataclasses.astuple(part.cell),
            "places": [str(place) for place in part.places],
            "position": _at(part.position),
            "key": _at(part.key),
        }
        for part in target.parts
    ]
    return {"cell": dataclasses.astuple(target.cell), "parts": parts}


def _targets(record: list[dict[str, Any]], model: engine.Model) -> tuple[Target, ...]:
    texts = dict.fromkeys(text for target in record for part in target["parts"] for text in part["places"])
    places: dict[str, Path] = {}
    for text in texts:
        (places[text],) = engine.expand(model, text)
    return tuple(
        Target(
            Cell(*target["cell"]),
            tuple(
                TargetPart(
                    Cell(*part["cell"]), tuple(places[text] for text in part["places"]), _at_of(part["position"]),
                    _at_of(part["key"]),
                )
                for part in target["parts"]
            ),
        )
        for target in record
    )  # fmt: skip


def _at(at: At) -> Any:
    if isinstance(at, Span):
        return {"span": at.name, "token": at.token}
    if isinstance(at, Slice):
        return {"slice": [at.start, at.stop, at.step]}
    return at


def _at_of(record: Any) -> At:
    if isinstance(record, dict):
        return Span(record["span"], record["token"]) if "span" in record else Slice(*record["slice"])
    return record


def _sources(identity: Any) -> Any:
    """The digests of users' functions, in the identity of a metric or an operation."""
    if not isinstance(identity, Mapping):
        return identity
    if "metrics" in identity:
        return [_sources(one) for one in identity["metrics"]]
    return identity.get("source")
