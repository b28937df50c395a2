"""`run`: a plan in this process, or in units by other processes, with identical bits.

A unit's numbers depend on its plan, its executor and how many tokens run at once, and on nothing else: which worker
runs it, in which order, and how many died before is all the same. So the workers of a run agree on one executor, and
have its weights, its versions and its number of threads.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np
import torch

from nnsplice import engine
from nnsplice.digests import function_digest
from nnsplice.errors import BadArgument, BadType, FileError, KeyMismatch, named
from nnsplice.files import from_json, text_of
from nnsplice.results import PART, Run, StoredResult, SweepResult, Table, plain, taken, zarr_files
from nnsplice.sweeps import foreign, running
from nnsplice.sweeps.choosing import Chosen
from nnsplice.sweeps.executors import Executor
from nnsplice.sweeps.jobs import Jobs
from nnsplice.sweeps.plan import Plan, Unit
from nnsplice.sweeps.plan_files import PLAN, cells_of, read_plan, write_plan
from nnsplice.sweeps.stored import StoredUnits, check_units, folder_of, is_store, store_beside
from nnsplice.units import LOAD, LOAD_SOURCE, MAX_TOKENS, UnitPlan, finish, folder_for, load_of, loaded, write_load
from nnsplice.units import run as run_units
from nnsplice.work import Arrays, Engine, RunFolder

#: How far two runs of one prompt may lie apart, as a share of the largest number.
ROUNDING = 5e-2
R = TypeVar("R")


@overload
def run(
    plan: Plan,
    model: Any, *, executor: str | Executor = ..., max_tokens: int | None = ...,
    journal: str | PathLike[str] | None = ..., progress: bool = ..., source: Any = ..., on: str | Engine | None = ...,
    out: str | PathLike[str] | None = ..., size: float | None = ..., load_options: Mapping[str, Any] | None = ...,
    threads: int = ..., partial: bool = ...,
) -> SweepResult: ...  # fmt: skip
@overload
def run(
    plan: UnitPlan[R],
    model: Any, *, executor: str | Executor = ..., max_tokens: int | None = ...,
    journal: str | PathLike[str] | None = ..., progress: bool = ..., source: Any = ..., on: str | Engine | None = ...,
    out: str | PathLike[str] | None = ..., size: float | None = ..., load_options: Mapping[str, Any] | None = ...,
    threads: int = ..., partial: bool = ...,
) -> R: ...  # fmt: skip
def run(
    plan: Plan | UnitPlan[Any],
    model: Any,
    *,
    executor: str | Executor = "auto",
    max_tokens: int | None = None,
    journal: str | PathLike[str] | None = None,
    progress: bool = True,
    source: Any = None,
    on: str | Engine | None = None,
    out: str | PathLike[str] | None = None,
    size: float | None = None,
    load_options: Mapping[str, Any] | None = None,
    threads: int = 1,
    partial: bool = False,
) -> Any:
    """Run a plan and return the value of every cell: in this process, or with `on=` in others and on other machines.

    >>> metric = ns.logit_diff("w7", "w8")
    >>> plan = ns.plan_sweep(model, "w3 w4 w5", "w3 w6 w5", "layers[:].output[1]", metric)
    >>> halves = [ns.run(plan.shard(n, 2), model, progress=False) for n in range(2)]   # on two machines, say
    >>> ns.SweepResult.merge(halves).grid().dims
    ('prompt', 'layer', 'position')

    Args:
        plan: a plan from `ns.plan_sweep`, or a part of one; or one from `ns.plan`.
        model: the model that the plan was made with. For other processes how they load it: a name or a folder as for
            `ns.load`, or a function of a file as `module:function`, which returns a model.
        executor: `"packed"` batches the tokens that can differ, `"batched"` gives each cell a row of a batched trace,
            `"reference"` gives each cell a trace. `"auto"` takes the first of these that reproduces the values of a few
            cells run alone; `result.run` has its name and the reason. An `Executor` runs jobs of one's own.
        max_tokens: how many tokens run at once; chosen for the device if left out, and halved when memory runs out. In
            units it is 4096 if left out, on every machine alike.
        journal: a file that finished cells are appended to; the same call resumes from it after an interruption.
        progress: show a progress bar.
        source: the other model, of a plan that was made with one; for other processes how they load it, as `model`.
        on: `"local:8"` for so many processes here, `"folder"` to write a run folder and leave it to
            `nnsplice work DIR`, `ns.on.slurm(...)`, `ns.on.ray(...)`. All give the same bits, whatever dies.
        out: the run folder, in which every finished unit is kept; the same call resumes from it. It may be in an object
            store (`"s3://bucket/run"`, `"gs://..."`; extra `cloud`). Of a sweep it may be a Zarr store (`"sweep.zarr"`;
            extra `zarr`), which every unit writes its prompts' values to.
        size: how much work a unit is about, as for `plan.units`; a plan from `ns.plan` runs in units here too.
        load_options: for `ns.load` in the workers: `{"device_map": "cuda", "dtype": "bfloat16"}`.
        threads: the number of threads of each worker on a CPU; numbers are rounded otherwise with more.
        partial: return what there is when units fail; missing cells are not done.

    Returns:
        The values of all cells, with the metric of the clean and the corrupted run; of a plan from `ns.plan` what the
        function returns that was planned.

    Raises:
        BadArgument: the model has other weights than the plan was made with, or is in train mode, or something cannot
            be given to other processes.
        BadType: something other than a plan.
        RefusedExecutor: the executor named has no exact values for this plan.
        FileError: the journal or the folder is of another sweep, damaged, or in use.
        TeamError: units failed, or no worker could go on.
    """
    here = on is None and out is None
    elsewhere = {"load_options": load_options, "threads": threads != 1, "partial": partial}
    if isinstance(plan, UnitPlan):
        _check_idle({"executor": executor != "auto", "journal": journal}, f"a run of {plan.row.name} in units")
        _check_idle(elsewhere if here else {}, "a run in this process")
        if is_store(out):
            raise BadArgument(
                f"out={out!r} is a Zarr store, which the values of a sweep go to alone; this is {plan.row.name}",
                expected="the name of a run folder; the result has to_file, and to_zarr where it is a SweepResult",
                write=f"out={os.fspath(out).rstrip('/').removesuffix('.zarr')!r}",
            )
        return run_units(
            plan, model, max_tokens=max_tokens, progress=progress, source=source, on=on, out=out, size=size,
            load_options=load_options, threads=threads, partial=partial,
        )  # fmt: skip
    if here:
        _check_idle({"size": size, **elsewhere}, "a run in this process")
        return running.run(
            plan, model, executor=executor, max_tokens=max_tokens, journal=journal, progress=progress, source=source
        )
    if not isinstance(plan, Plan):
        raise BadType(f"{named(plan)} is no plan", expected="what ns.plan_sweep returns", write="ns.run(plan, model)")
    if plan.foreign != (source is not None):
        raise BadArgument(
            "the plan takes its values from the model itself, so a source would do nothing"
            if source is not None
            else "the plan takes its values from another model",
            expected="no source" if source is not None else "how other processes load that model too",
            write=None if source is not None else 'ns.run(plan, "base", source="tuned", on="local:2")',
        )
    if journal is not None:
        raise BadArgument("a journal beside a run folder, which keeps every finished unit itself", expected="out=")
    if not isinstance(executor, str):
        raise BadArgument("an executor of one's own cannot be given to other processes", expected="its name")
    told, told_source = load_of(model), None if source is None else load_of(source)
    with folder_for(on, out) as (chosen, path):
        folder = prepared(
            plan, path, executor=executor, max_tokens=MAX_TOKENS if max_tokens is None else max_tokens, size=size,
            threads=threads,
        )  # fmt: skip
        write_load(folder, told, told_source, load_options)
        finish(folder, chosen, progress, partial)
        return (finished if is_store(path) else merged)(folder.address, partial=partial or on == "folder")


def _check_idle(options: Mapping[str, Any], to: str) -> None:
    """Raise for options that are given and would do nothing.

    Args:
        options: their values, false where they are not given.
        to: what they would do nothing to.
    """
    idle = [name for name, value in options.items() if value]
    if idle:
        raise BadArgument(
            f"{', '.join(idle)} says nothing to {to}", write='on="local:2"' if "size" in options else None
        )


def prepared(
    plan: Plan, path: str | PathLike[str], *, executor: str, max_tokens: int, size: float | None, threads: int
) -> RunFolder:
    """A run folder with this plan, written or found there; beside a Zarr store where the path is one."""
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
        write_plan(plan, folder, size=size, exists=exists, metrics=_names(plan))
        if stored:
            told = from_json(text_of(folder / PLAN), folder / PLAN)
            mask = _exists(told["plan"], exists, len(plan.targets))
            zarr_files.Growing.begin(path, mask, len(_names(plan)), function_digest(identity))

    opener = f"{__name__}:{'opened_store' if stored else 'opened'}"
    return RunFolder.create(folder_of(path) if stored else path, opener, len(units), identity, write)


class Units:
    """A worker's side of a plan: its model, and the units as they are asked for."""

    def __init__(self, folder: RunFolder) -> None:
        """Load the model and the plan.

        Raises:
            BadArgument: the model has other weights than the plan was made with.
        """
        torch.set_num_threads(folder.identity("threads"))
        told = from_json(text_of(folder.path / PLAN), folder.path / PLAN)
        self.model: engine.Model = loaded(folder, LOAD, folder.identity("weights"))
        asked = told["plan"]["asked"]
        self.source: engine.Model | None = (
            loaded(folder, LOAD_SOURCE, asked["source"]["weights"]) if told["plan"]["foreign"] else None
        )
        engine.refuse_changed_logits(self.model)
        running.check_mode(self.model)
        plan = read_plan(told["plan"], folder.path, self.model)
        if self.source is not None:
            foreign.check_saes(plan, self.source)
        self.max_tokens: int = folder.identity("max_tokens")
        name = folder.identity("executor")
        agreed = folder.agree(
            "executor",
            lambda: dataclasses.asdict(running.chosen_for(plan, self.model, name, self.max_tokens, self.source)),
        )
        self.executor: Chosen = Chosen(**agreed)
        self.units: tuple[Unit, ...] = plan.units(told["size"], executor=name, max_tokens=self.max_tokens)

    def run(self, number: int) -> Arrays:
        """The values of a unit's cells, in the order of their ranges, and its two runs without an edit."""
        with engine.turn(self.model):
            table = running.measured_table(
                self.units[number].plan, self.model, self.executor, self.max_tokens, other=self.source
            )
        done = Jobs.of_mask(table.done)
        self.units[number].__dict__.pop("plan", None)  # made again where it is needed again
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


def opened(folder: RunFolder) -> Units:
    """What workers of a sweep begin with."""
    return Units(folder)


def opened_store(folder: RunFolder) -> StoredUnits:
    """... and of one whose values go to a Zarr store."""
    return StoredUnits(Units(folder), folder)


def merged(path: str | PathLike[str], *, partial: bool = False) -> SweepResult:
    """The result of a run folder; no model is needed.

    Args:
        path: the folder, or its address.
        partial: also when units are missing: their cells are not done, and prompts without any are left out.

    Raises:
        FileError: units are missing, or there is none at all.
    """
    folder, told, done = _done(path, partial)
    if folder.told["opener"].endswith(":opened_store"):
        return finished(path, partial=partial)
    plan, metrics = told["plan"], tuple(told["metrics"])
    prompts, cells = _prompts(plan), cells_of(plan)
    several = (len(metrics),) if metrics else ()
    values = np.full((prompts, len(cells), *several), np.nan)
    there = np.zeros((prompts, len(cells)), dtype=bool)
    about = _About(folder, prompts, several)
    for number in done:
        arrays = about.read(number)
        rows = arrays["prompts"]
        runs, targets = Jobs.of_ranges(arrays["ranges"].tolist()).columns()
        values[rows[runs], targets], there[rows[runs], targets] = arrays["values"], True
    mask = _exists(plan, told["exists"], len(cells))
    rows = np.flatnonzero(~np.isnan(about.clean.reshape(prompts, -1)).any(1))
    asked, tokens = plan["asked"], [tuple(each) for each in plan["tokens"]]
    if len(rows) < prompts:
        asked = taken(asked, rows.tolist(), asked[PART]["of"] if PART in asked else prompts)
    return SweepResult(
        Table(
            cells, values[rows], there[rows], mask[rows], about.clean[rows], about.corrupted[rows],
            tuple(tokens[row] for row in rows) if tokens else (), asked, about.cost(), metrics=metrics,
        )
    )  # fmt: skip


def finished(path: str | PathLike[str], *, partial: bool = False) -> SweepResult:
    """The result of a run whose values went to a Zarr store: the rest is written beside them, and no value is read.

    Raises:
        FileError: units are missing, or there is none at all.
    """
    folder, told, done = _done(path, partial)
    plan, metrics = told["plan"], tuple(told["metrics"])
    prompts, cells = _prompts(plan), cells_of(plan)
    several = (len(metrics),) if metrics else ()
    about, sums = _About(folder, prompts, several), [""] * prompts
    for number in done:
        arrays = about.read(number)
        for prompt, one in zip(arrays["prompts"], arrays["sums"], strict=True):
            sums[prompt] = one.tobytes().decode()
    shape = (prompts, len(cells))
    values, none = np.broadcast_to(np.nan, (*shape, *several)), np.broadcast_to(False, shape)
    tokens = tuple(tuple(each) for each in plan["tokens"])
    table = Table(
        cells, values, none, none, about.clean, about.corrupted, tokens, plan["asked"], about.cost(), metrics=metrics
    )
    store = store_beside(folder)
    zarr_files.Growing(store).finish(table, sums)
    return StoredResult(lambda: zarr_files.read(store))


def _done(path: str | PathLike[str], partial: bool) -> tuple[RunFolder, dict[str, Any], list[int]]:
    """A run folder, what its plan says, and the units that are done."""
    folder = RunFolder.open(path)
    done = folder.done()
    if len(done) < folder.units and not partial:
        raise FileError(
            f"{folder.units - len(done)} of {folder.units} units are missing in {folder.address}",
            expected="a run that is finished",
            write=f"nnsplice work {folder.address}, or merge with partial=True (--partial) for what there is",
        )
    if not done:
        raise FileError(f"no unit of {folder.address} is done yet", write=f"nnsplice status {folder.address}")
    return folder, from_json(text_of(folder.path / PLAN), folder.path / PLAN), sorted(done)


class _About:
    """What units say beside the values of cells, put together."""

    def __init__(self, folder: RunFolder, prompts: int, several: tuple[int, ...]) -> None:
        self.folder = folder
        self.clean, self.corrupted = (np.full((prompts, *several), np.nan) for _ in range(2))
        self._cost = np.zeros(len(_COSTS))

    def read(self, number: int) -> dict[str, np.ndarray]:
        """Read a unit, and keep what it says."""
        arrays, _ = self.folder.outcome(number)
        rows = arrays["prompts"]
        for name in ("clean", "corrupted"):
            whole = getattr(self, name)
            known = ~np.isnan(whole[rows])
            _check_same(number, whole[rows][known], arrays[name][known])
            whole[rows] = np.where(known, whole[rows], arrays[name])  # of a prompt in several units, the first one's
        self._cost += arrays["cost"]
        return arrays

    def cost(self) -> Run:
        """What all of them cost."""
        agreed = self.folder.agreed("executor")
        spent = dict(zip(_COSTS, self._cost.tolist(), strict=True))
        counts = {name: int(spent[name]) for name in ("forwards", "block_calls", "tokens", "known")}
        return Run(agreed["name"], spent["seconds"], flops=spent["flops"], note=agreed["note"], **counts)


def _prompts(plan: Mapping[str, Any]) -> int:
    return max(plan["owners"]) + 1 if plan["owners"] else len(plan["corrupted"]["ids"])


def _exists(plan: Mapping[str, Any], exists: list[list[int]], cells: int) -> np.ndarray:
    """`[prompt, cell]`, as of a table."""
    mask = np.zeros((len(plan["corrupted"]["ids"]), cells), dtype=bool)
    mask[Jobs.of_ranges(exists).columns()] = True
    if plan["owners"]:
        owners = np.array(plan["owners"])
        mask = np.stack([mask[owners == prompt].all(0) for prompt in range(_prompts(plan))])
    return mask


def _check_same(number: int, before: np.ndarray, now: np.ndarray) -> None:
    scale = ROUNDING * float(np.abs([before, now]).max(initial=0))
    if not np.isclose(before, now, rtol=ROUNDING, atol=scale).all():
        raise KeyMismatch(f"unit {number} has other unedited runs of its prompt than those before it")


def _names(plan: Plan) -> list[str]:
    return list(getattr(plan.metric, "names", ()))
