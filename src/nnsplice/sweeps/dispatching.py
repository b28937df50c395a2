"""`run`: run a plan in this process, or in units by other processes, with bit-identical results."""

from __future__ import annotations

import os
from collections.abc import Mapping
from os import PathLike
from typing import Any, TypeVar, cast

from nnsplice.errors import BadArgument, BadType, named
from nnsplice.sweeps import other_model, running
from nnsplice.sweeps.distributed import finished, merged, prepared
from nnsplice.sweeps.executors import Executor
from nnsplice.sweeps.plan import Plan
from nnsplice.sweeps.stored import is_store
from nnsplice.units import MAX_TOKENS, Planned, UnitPlan, finish, folder_for, load_of, write_load
from nnsplice.units import run as run_units
from nnsplice.work import Engine

R = TypeVar("R")


def run(
    plan: Planned[R],
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
) -> R:
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
        max_tokens: the number of tokens that run at once; chosen for the device if left out, and halved when memory
            runs out. In units it is 4096 if left out, on every machine alike.
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
    if not isinstance(plan, Plan):
        raise BadType(f"{named(plan)} is no plan", expected="what ns.plan_sweep returns", write="ns.run(plan, model)")
    if here:
        _check_idle({"size": size, **elsewhere}, "a run in this process")
        result = running.run(
            plan, model, executor=executor, max_tokens=max_tokens, journal=journal, progress=progress, source=source
        )
        return cast("R", result)
    other_model.check_given(plan, source, 'ns.run(plan, "base", source="tuned", on="local:2")')
    if journal is not None:
        raise BadArgument("a journal beside a run folder, which keeps every finished unit itself", expected="out=")
    if not isinstance(executor, str):
        raise BadArgument("an executor of one's own cannot be given to other processes", expected="its name")
    load, load_source = load_of(model), None if source is None else load_of(source)
    with folder_for(on, out) as (chosen, path):
        folder = prepared(
            plan, path, executor=executor, max_tokens=MAX_TOKENS if max_tokens is None else max_tokens, size=size,
            threads=threads,
        )  # fmt: skip
        write_load(folder, load, load_source, load_options)
        finish(folder, chosen, progress, partial)
        result = (finished if is_store(path) else merged)(folder.address, partial=partial or on == "folder")
    return cast("R", result)


def _check_idle(options: Mapping[str, Any], to: str) -> None:
    """Raise for options that are given and would have no effect.

    Args:
        options: their values, false if not given.
        to: the call on which they have no effect.
    """
    idle = [name for name, value in options.items() if value]
    if idle:
        raise BadArgument(
            f"{', '.join(idle)} says nothing to {to}", write='on="local:2"' if "size" in options else None
        )
