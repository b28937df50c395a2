"""`nnsplice work`, `merge` and `status`: the units of a run folder, from a shell."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from nnsplice.cli.commands import app
from nnsplice.cli.options import RunFolderArgument
from nnsplice.cli.table import JsonOption, TableRow, say, tabulate
from nnsplice.errors import FileError
from nnsplice.shown import counted
from nnsplice.stores import store_of


@app.command()
def work(folder: RunFolderArgument) -> None:
    """Compute units of a run until none is left, on any number of machines that see the folder.

    \b
    srun --ntasks=64 --gpus-per-task=1 nnsplice work /shared/run

    On a signal (SIGTERM, SIGUSR2, Ctrl-C) it finishes its unit and exits. It may be killed at any time: another worker
    takes its unit over. The exit status is 3 if its model or its versions are not those of the run.
    """
    from nnsplice.work import RunFolder, Worker

    sys.path.insert(0, str(Path.cwd()))  # modules of the user's, as for `python -m`
    parent = os.environ.get("NNSPLICE_PARENT", "")
    worker = Worker(RunFolder.open(folder), parent=int(parent) if parent else None)
    code = worker.work()
    why = f"; {worker.record['reason']}" if "reason" in worker.record else ""
    say(f"{worker.record['state']}: {counted(worker.record['units'], 'unit')}{why}")
    if code:
        raise typer.Exit(code)


@app.command()
def merge(
    folder: RunFolderArgument,
    partial: Annotated[
        bool, typer.Option("--partial", help="Merge although units are missing; their cells have no value.")
    ] = False,
    out: Annotated[str | None, typer.Option("--out", metavar="FILE", help="Default: DIR/result.safetensors.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Put the units of a run together into one result file."""
    from nnsplice.results import SweepResult
    from nnsplice.work import RunFolder, merged

    target = store_of(folder).at("result.safetensors") if out is None else out
    result = merged(RunFolder.open(folder), partial=partial)
    result.to_file(target)
    row: dict[str, object] = {"file": str(target), "result": str(result).partition("\n")[0]}
    if isinstance(result, SweepResult):
        cells, prompts = int(result.table.done.sum()), len(result.clean)
        row["result"] = f"{counted(cells, 'cell')} of {counted(prompts, 'prompt')}"
        row |= {"cells": cells, "prompts": prompts}
    say(f"{row['result']}, in {target}")
    if as_json:
        tabulate("results", [], (), [row])


@app.command()
def status(folder: RunFolderArgument, as_json: JsonOption = False) -> None:
    """The status of a run: units done, workers, rate, and failures."""
    from nnsplice.work import RunFolder, status_of

    found = status_of(RunFolder.open(folder))
    alive = [one for one in found.workers if one["alive"]]
    left = found.units - found.done - len(found.failures)
    rate = f", {found.rate:.2g} units a second, {left / found.rate:.0f} s to go" if found.rate and left else ""
    say(
        f"{found.done} of {found.units} units done, {len(found.failures)} failed, {counted(len(alive), 'worker')}{rate}"
    )
    rows: list[TableRow] = [
        (one["worker"], one["state"] if one["alive"] or one["state"] not in ("loading", "running") else "dead",
         f"{one['units']}", one.get("reason", "").partition("\n")[0])
        for one in found.workers
    ]  # fmt: skip
    if rows:
        tabulate("workers", rows, ("worker", "state", "units", "why"))
    for number, reason in found.failures.items():
        say(f"unit {number} failed: {reason}")
    if found.failures:
        raise FileError(
            f"{counted(len(found.failures), 'unit')} failed",
            expected=f"their reasons mended; logs are in {store_of(folder).at('workers')}",
        )
