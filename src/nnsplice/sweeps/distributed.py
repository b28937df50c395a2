"""The run folder of a sweep: its workers' side, and its result.

The numbers of a unit depend only on its plan, its executor and the number of tokens that run at once, and not on the
worker that runs it or on the order of units. So all workers of a run use one executor and one number of threads, and
have the same weights and package versions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnsplice import engine
from nnsplice.digests import function_digest
from nnsplice.errors import KeyMismatch
from nnsplice.files import from_json, text_of
from nnsplice.results import PART, Run, StoredResult, SweepResult, Table, plain, taken, zarr_files
from nnsplice.results.merging import agree
from nnsplice.sweeps import other_model, running
from nnsplice.sweeps.choosing import ChosenExecutor
from nnsplice.sweeps.jobs import Jobs
from nnsplice.sweeps.plan import Plan, Unit
from nnsplice.sweeps.plan_files import PLAN, cells_of, read_plan, write_plan
from nnsplice.sweeps.stored import StoredUnits, check_units, folder_of, is_store, store_beside
from nnsplice.units import LOAD, LOAD_SOURCE, loaded
from nnsplice.work import Arrays, RunFolder


def prepared(
    plan: Plan, path: str | PathLike[str], *, executor: str, max_tokens: int, size: float | None, threads: int
) -> RunFolder:
    """The run folder of this plan, created or resumed; beside the Zarr store if the path is one."""
    units = plan.units(size, executor=executor, max_tokens=max_tokens)
    cut = [[list(unit.piece.prompts), unit.piece.start, unit.piece.stop] for unit in units]
    exists = Jobs.of_mask(plan.exists()).ranges
    identity = {
        "asked": function_digest(plain(plan.asked)), "weights": plan.asked["weights"], "units": function_digest(cut),
        "jobs": function_digest([plan.jobs.ranges, plan.known.ranges]), "executor": executor,
        "max_tokens": max_tokens, "threads": threads,
    }  # fmt: skip

    stored = is_store(path)
    if stored:
        check_units(units, plan)

    def write(folder: Path) -> None:
        write_plan(plan, folder, size=size, exists=exists, metrics=_metric_names(plan))
        if stored:
            record = from_json(text_of(folder / PLAN), folder / PLAN)
            mask = _exists(record["plan"], exists, len(plan.targets))
            zarr_files.Growing.begin(path, mask, len(_metric_names(plan)), function_digest(identity))

    opener = f"{__name__}:{'opened_store' if stored else 'opened'}"
    return RunFolder.create(folder_of(path) if stored else path, opener, len(units), identity, write)


class SweepUnits:
    """A plan in a worker: loads the model, then runs units."""

    def __init__(self, folder: RunFolder) -> None:
        """Load the model and the plan.

        Raises:
            BadArgument: the model has other weights than the plan was made with.
        """
        torch.set_num_threads(folder.identity("threads"))
        record = from_json(text_of(folder.path / PLAN), folder.path / PLAN)
        self.model: engine.Model = loaded(folder, LOAD, folder.identity("weights"))
        asked = record["plan"]["asked"]
        self.source: engine.Model | None = (
            loaded(folder, LOAD_SOURCE, asked["source"]["weights"]) if record["plan"]["foreign"] else None
        )
        engine.refuse_changed_logits(self.model)
        running.check_mode(self.model)
        plan = read_plan(record["plan"], folder.path, self.model)
        if self.source is not None:
            other_model.check_saes(plan, self.source)
        self.max_tokens: int = folder.identity("max_tokens")
        name = folder.identity("executor")
        agreed = folder.agree(
            "executor",
            lambda: dataclasses.asdict(running.chosen_for(plan, self.model, name, self.max_tokens, self.source)),
        )
        self.executor: ChosenExecutor = ChosenExecutor(**agreed)
        self.units: tuple[Unit, ...] = plan.units(record["size"], executor=name, max_tokens=self.max_tokens)

    def run(self, number: int) -> Arrays:
        """The values of a unit's cells, in the order of `ranges`, and the metric of its clean and corrupted runs."""
        with engine.locked(self.model):
            table = running.measured_table(
                self.units[number].plan, self.model, self.executor, self.max_tokens, other=self.source
            )
        done = Jobs.of_mask(table.done)
        self.units[number].__dict__.pop("plan", None)  # a cached property: frees the memory
        cost = {name: getattr(table.run, name) for name in _COSTS}
        return {
            "prompts": np.array(self.units[number].prompts),
            "ranges": np.array(done.ranges, dtype=np.int64).reshape(-1, 3),
            "values": table.values[done.columns()],
            "clean": table.clean,
            "corrupted": table.corrupted,
            "cost": np.array([float(value) for value in cost.values()]),
        }


_COSTS = ("seconds", "forwards", "block_calls", "tokens", "flops", "known")


def opened(folder: RunFolder) -> SweepUnits:
    """The units of a sweep for a worker."""
    return SweepUnits(folder)


def opened_store(folder: RunFolder) -> StoredUnits:
    """The units of a sweep whose values go to a Zarr store, for a worker."""
    return StoredUnits(SweepUnits(folder), folder)


def merged(path: str | PathLike[str], *, partial: bool = False) -> SweepResult:
    """The result of a run folder; no model is needed.

    Args:
        path: the folder, or its address.
        partial: allow missing units: their cells are not done, and prompts without any unit are left out.

    Raises:
        FileError: units are missing, or there is none at all.
    """
    folder, record, done = _opened_run(path, partial)
    if folder.header["opener"].endswith(":opened_store"):
        return finished(path, partial=partial)
    plan, metrics = record["plan"], tuple(record["metrics"])
    prompts, cells = _prompt_count(plan), cells_of(plan)
    several = (len(metrics),) if metrics else ()
    values = np.full((prompts, len(cells), *several), np.nan)
    there = np.zeros((prompts, len(cells)), dtype=bool)
    totals = _OutcomeTotals(folder, prompts, several)
    for number in done:
        arrays = totals.read(number)
        rows = arrays["prompts"]
        runs, targets = Jobs.of_ranges(arrays["ranges"].tolist()).columns()
        values[rows[runs], targets], there[rows[runs], targets] = arrays["values"], True
    mask = _exists(plan, record["exists"], len(cells))
    rows = np.flatnonzero(~np.isnan(totals.clean.reshape(prompts, -1)).any(1))
    asked, tokens = plan["asked"], [tuple(each) for each in plan["tokens"]]
    if len(rows) < prompts:
        asked = taken(asked, rows.tolist(), asked[PART]["of"] if PART in asked else prompts)
    return SweepResult(
        Table(
            cells, values[rows], there[rows], mask[rows], totals.clean[rows], totals.corrupted[rows],
            tuple(tokens[row] for row in rows) if tokens else (), asked, totals.cost(), metrics=metrics,
        )
    )  # fmt: skip


def finished(path: str | PathLike[str], *, partial: bool = False) -> SweepResult:
    """The result of a run whose values are in a Zarr store: adds the other arrays to the store, and reads no value.

    Raises:
        FileError: units are missing, or there is none at all.
    """
    folder, record, done = _opened_run(path, partial)
    plan, metrics = record["plan"], tuple(record["metrics"])
    prompts, cells = _prompt_count(plan), cells_of(plan)
    several = (len(metrics),) if metrics else ()
    totals, sums = _OutcomeTotals(folder, prompts, several), [""] * prompts
    for number in done:
        arrays = totals.read(number)
        for prompt, one in zip(arrays["prompts"], arrays["sums"], strict=True):
            sums[prompt] = one.tobytes().decode()
    shape = (prompts, len(cells))
    values, none = np.broadcast_to(np.nan, (*shape, *several)), np.broadcast_to(False, shape)
    tokens = tuple(tuple(each) for each in plan["tokens"])
    table = Table(
        cells, values, none, none, totals.clean, totals.corrupted, tokens, plan["asked"], totals.cost(), metrics=metrics
    )
    store = store_beside(folder)
    zarr_files.Growing(store).finish(table, sums)
    return StoredResult(lambda: zarr_files.read(store))


def _opened_run(path: str | PathLike[str], partial: bool) -> tuple[RunFolder, dict[str, Any], list[int]]:
    """A run folder, its plan as plain data, and the units that are done."""
    folder = RunFolder.open(path)
    return folder, from_json(text_of(folder.path / PLAN), folder.path / PLAN), folder.finished(partial=partial)


class _OutcomeTotals:
    """The metric of the clean and corrupted runs, and the total cost, over all units."""

    def __init__(self, folder: RunFolder, prompts: int, several: tuple[int, ...]) -> None:
        self.folder = folder
        self.clean, self.corrupted = (np.full((prompts, *several), np.nan) for _ in range(2))
        self._cost = np.zeros(len(_COSTS))

    def read(self, number: int) -> dict[str, np.ndarray]:
        """Read the outcome of a unit, and add it to the totals."""
        arrays, _ = self.folder.outcome(number)
        rows = arrays["prompts"]
        for name in ("clean", "corrupted"):
            whole = getattr(self, name)
            known = ~np.isnan(whole[rows])
            _check_unedited(number, whole[rows][known], arrays[name][known])
            whole[rows] = np.where(known, whole[rows], arrays[name])  # a prompt in several units has the first one's
        self._cost += arrays["cost"]
        return arrays

    def cost(self) -> Run:
        """The cost of all units."""
        agreed = self.folder.agreed("executor")
        costs = dict(zip(_COSTS, self._cost.tolist(), strict=True))
        counts = {name: int(costs[name]) for name in ("forwards", "block_calls", "tokens", "known")}
        return Run(agreed["name"], costs["seconds"], flops=costs["flops"], note=agreed["note"], **counts)


def _prompt_count(plan: Mapping[str, Any]) -> int:
    return max(plan["owners"]) + 1 if plan["owners"] else len(plan["corrupted"]["ids"])


def _exists(plan: Mapping[str, Any], exists: list[list[int]], cells: int) -> np.ndarray:
    """Whether each cell exists, `[prompt, cell]`, with the runs of one prompt (answers of several tokens) merged."""
    mask = np.zeros((len(plan["corrupted"]["ids"]), cells), dtype=bool)
    mask[Jobs.of_ranges(exists).columns()] = True
    if plan["owners"]:
        owners = np.array(plan["owners"])
        mask = np.stack([mask[owners == prompt].all(0) for prompt in range(_prompt_count(plan))])
    return mask


def _check_unedited(number: int, before: np.ndarray, now: np.ndarray) -> None:
    if not agree(before, now):
        raise KeyMismatch(f"unit {number} has other unedited runs of its prompt than those before it")


def _metric_names(plan: Plan) -> list[str]:
    return list(getattr(plan.metric, "names", ()))
