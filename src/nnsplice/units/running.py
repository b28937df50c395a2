"""Units of a plan, run in this process or by others, and their results joined."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from nnsplice import engine
from nnsplice.activations import features
from nnsplice.errors import BadArgument, TeamError
from nnsplice.progress import bar
from nnsplice.units.loading import LOAD, LOAD_SOURCE, load_of, loaded, write_load
from nnsplice.units.plan import MAX_TOKENS, Models, UnitPlan
from nnsplice.work import Arrays, Engine, RunFolder, engine_of


def run(
    plan: UnitPlan[Any],
    model: Any,
    *,
    max_tokens: int | None,
    progress: bool,
    source: Any,
    on: str | Engine | None,
    out: str | PathLike[str] | None,
    size: float | None,
    load_options: Mapping[str, Any] | None,
    threads: int,
    partial: bool,
) -> Any:
    """`ns.run` of a `UnitPlan`; without `on` and `out` all units run in this process."""
    if (source is None) != (plan.question.get("source_weights") is None):
        raise BadArgument(
            f"{plan.row.name} is about {'one model, so source= would do nothing' if source is not None else 'two'}",
            expected="no source" if source is not None else "the other model",
            write="ns.run(plan, model)" if source is not None else "ns.run(plan, model, source=other)",
        )
    at_once = MAX_TOKENS if max_tokens is None else max_tokens
    if on is None and out is None:
        return _here(plan, _models_of(plan, model, source), at_once, size, progress)
    spec, source_spec = load_of(model), None if source is None else load_of(source)
    with folder_for(on, out) as (chosen, path):
        folder = _prepared(plan, path, max_tokens=at_once, size=size, threads=threads)
        write_load(folder, spec, source_spec, load_options)
        finish(folder, chosen, progress, partial)
        return merged(folder.address, partial=partial or on == "folder")


@contextmanager
def folder_for(
    on: str | Engine | None, out: str | PathLike[str] | None
) -> Iterator[tuple[Engine, str | PathLike[str]]]:
    """The engine of a run and its folder; a temporary folder if `out` is None."""
    chosen = engine_of("local" if on is None else on)
    if out is None and on == "folder":
        raise BadArgument('on="folder" writes a folder, and none is named', write="out=DIR")
    with tempfile.TemporaryDirectory() as temporary:
        yield chosen, Path(temporary) / "run" if out is None else out


def finish(folder: RunFolder, chosen: Engine, progress: bool, partial: bool) -> None:
    """Run all units.

    Raises:
        TeamError: units failed and `partial` is False, or no worker could go on.
    """
    chosen.run(folder, progress)
    failures = folder.failures()
    if failures and not partial:
        lines = [f"  unit {number}: {reason}" for number, reason in list(failures.items())[:5]]
        raise TeamError(
            "\n".join([f"{len(failures)} of {folder.units} units failed", *lines]),
            expected=f"their reasons mended; the same call tries them again, and {folder.address} keeps the others",
            write="partial=True for what there is",
        )


def _here(plan: UnitPlan[Any], models: Models, max_tokens: int, size: float | None, progress: bool) -> Any:
    """All units in this process, one after the other."""
    run_unit = plan.row.ready(plan, models, max_tokens, lambda _, compute: compute())
    units = plan.units(size)
    with bar("units", len(units), "unit", progress) as shown:
        outcomes: list[tuple[Sequence[int], Arrays]] = []
        for unit in units:
            outcomes.append((unit, run_unit(unit)))
            shown.update(1)
    return plan.row.joined(plan, outcomes)


def _models_of(plan: UnitPlan[Any], model: Any, source: Any) -> Models:
    """The models of this process, checked against the plan.

    Raises:
        BadArgument: a model has other weights than the plan was made with.
    """
    models = Models(engine.as_model(model), source)
    for one, what, key in ((models.model, "model", "weights"), (models.source, "source", "source_weights")):
        if one is not None and engine.weights_digest(one) != plan.question[key]:
            raise BadArgument(
                f"the {what} has other weights than the one that the plan was made with",
                expected="the model that the plan was made with",
            )
    features.check_identities(models.model, plan.question.get("saes", {}), "the plan")
    return models


# --- in a folder ------------------------------------------------------------------------------------------------------


def _prepared(
    plan: UnitPlan[Any], path: str | PathLike[str], *, max_tokens: int, size: float | None, threads: int
) -> RunFolder:
    """A run folder with this plan, written or found there."""
    units = plan.units(size)
    identity = {
        "question": plan.row.name, "asked": plan.digest, "weights": plan.question["weights"],
        "source": plan.question.get("source_weights"), "units": [len(units), size], "max_tokens": max_tokens,
        "threads": threads,
    }  # fmt: skip
    return RunFolder.create(
        path, "nnsplice.units.running:opened", len(units), identity, lambda folder: plan.write(folder, size=size)
    )


class _PlanTask:
    """A plan in a worker: loads the models, then runs units by number."""

    def __init__(self, folder: RunFolder) -> None:
        """Load the models, and get ready."""
        torch.set_num_threads(folder.identity("threads"))
        plan, contents = UnitPlan.read(folder.path)
        model = loaded(folder, LOAD, folder.identity("weights"))
        there = folder.identity("source")
        features.check_identities(model, plan.question.get("saes", {}), "the plan")
        models = Models(model, None if there is None else loaded(folder, LOAD_SOURCE, there))
        self.model: engine.Model = model
        self.units: tuple[tuple[int, ...], ...] = plan.units(contents["size"])
        self.unit: Callable[[Sequence[int]], Arrays] = plan.row.ready(
            plan, models, folder.identity("max_tokens"), folder.agree
        )

    def run(self, number: int) -> Arrays:
        """The outcome of a unit."""
        return self.unit(self.units[number])


def opened(folder: RunFolder) -> _PlanTask:
    """The task of a run folder, in a worker."""
    return _PlanTask(folder)


def merged(path: str | PathLike[str], *, partial: bool = False) -> Any:
    """The result of a run folder; no model is needed.

    Args:
        partial: allow missing units; their prompts are left out.

    Raises:
        FileError: units are missing, or no unit is done.
    """
    folder = RunFolder.open(path)
    plan, contents = UnitPlan.read(folder.path)
    done = folder.finished(partial=partial)
    units = plan.units(contents["size"])
    return plan.row.joined(plan, [(units[number], folder.outcome(number)[0]) for number in done])
