"""What it costs to give a plan to many processes: planning, cutting, and all that is done for a unit beside running it.

    python -m bench.scale                 1,000 pairs x 3,200 sites; 10,000 units that do nothing
    python -m bench.scale --units 1000 --pairs 100
    python -m bench.scale --only units --on ray             ... as tasks of Ray (extra ray)
    python -m bench.scale --only units --out s3://bucket/a  ... in an object store (extra cloud)
    python -m bench.scale --only cells --cells 10000000     results written and read (extra zarr)
    python -m bench.scale --only captures --prompts 1000000 captures of many prompts, written and streamed

Units that do nothing show what a unit costs beside its own work: the claim, the outcome's file, the log. CPU time is
that of this process: of the worker, or of the driver.
"""

from __future__ import annotations

import argparse
import random
import resource
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import transformers as hf

import nnsplice as ns
from nnsplice.results import Cell, Table
from nnsplice.work import RunFolder, Worker
from nnsplice.work.local import Local


class Nothing:
    """Units without any work."""

    def run(self, number: int) -> Mapping[str, np.ndarray]:
        """One number, and what this process has cost so far."""
        return {"values": np.array([float(number)]), "spent": np.array([time.process_time()])}


def opened(_folder: RunFolder) -> Nothing:
    """What the workers begin with."""
    return Nothing()


def planning(pairs: int, layers: int, tokens: int) -> None:
    """Pairs of all lengths up to `tokens`, each changed at a token of its own."""
    config = hf.GPT2Config(n_layer=layers, n_embd=16, n_head=2, vocab_size=128, bos_token_id=1, eos_token_id=1)
    model, chosen = ns.load(hf.GPT2LMHeadModel(config).eval()), random.Random(0)
    clean = [[chosen.randrange(1, 100) for _ in range(tokens - chosen.randrange(20))] for _ in range(pairs)]
    corrupted = [list(row) for row in clean]
    for row in corrupted:
        row[chosen.randrange(len(row) // 2)] += 1
    ns.plan_sweep(model, clean[:1], corrupted[:1], "layers[:].output[:]", ns.logit_diff(1, 2))  # the model is looked at
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    plan, seconds = _timed(lambda: ns.plan_sweep(model, clean, corrupted, "layers[:].output[:]", ns.logit_diff(1, 2)))
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3
    cells, sites = len(plan) + len(plan.known), len(plan.targets)
    print(f"plan of {pairs} pairs x {sites} sites, {cells} cells: {seconds:.2f} s of CPU, {peak:.0f} MB more")
    units, seconds = _timed(plan.units)
    print(f"cut into {len(units)} units: {seconds:.2f} s")
    some = units[:: max(len(units) // 50, 1)]
    _, seconds = _timed(lambda: [unit.plan for unit in some])
    print(f"a unit's own plan: {seconds / len(some) * 1e3:.2f} ms")


def units(count: int, workers: int, on: str, out: str | None) -> None:
    """Units that do nothing: by one worker in this process, then by processes with a driver."""
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder.create(f"{out or folder}/one", "bench.scale:opened", count, {}, lambda _: None)
        _, seconds = _timed(Worker(run).work)
        print(f"{count} units by one worker: {seconds / count * 1e3:.2f} ms of CPU each")
        run = RunFolder.create(f"{out or folder}/several", "bench.scale:opened", count, {}, lambda _: None)
        engine = Local(workers) if on == "local" else ns.on.ray(workers=workers)
        start = time.perf_counter()
        _, seconds = _timed(lambda: engine.run(run, False))
        wall = time.perf_counter() - start
        print(
            f"{count} units by {workers} processes ({on}): {wall / count * 1e3:.2f} ms each, "
            f"of the driver {seconds / count * 1e3:.3f} ms of CPU, of a worker {_worker_cost(run) * 1e3:.2f} ms of CPU"
        )


def _worker_cost(run: RunFolder) -> float:
    """CPU seconds of a unit in the workers: from the first to the last that each has done."""
    spent: dict[str, list[float]] = {}
    for number in run.done():
        arrays, about = run.outcome(number)
        spent.setdefault(about["worker"], []).append(float(arrays["spent"][0]))
    each = [(max(of) - min(of), len(of) - 1) for of in spent.values() if len(of) > 1]
    return sum(seconds for seconds, _ in each) / max(sum(count for _, count in each), 1)


def cells(count: int, sites: int) -> None:
    """A result of so many cells, as a file and as a Zarr store."""
    prompts = count // sites
    chosen = np.random.default_rng(0)
    table = Table(
        tuple(Cell(f"layers[{n // 100}].output[{n % 100}]", "layers[:].output", layer=n // 100, position=n % 100)
              for n in range(sites)),
        chosen.normal(size=(prompts, sites)), np.ones((prompts, sites), bool), np.ones((prompts, sites), bool),
        np.ones(prompts), np.zeros(prompts), asked={"metric": {"name": "logit_diff"}},
    )  # fmt: skip
    result = ns.SweepResult(table)
    with tempfile.TemporaryDirectory() as folder:
        for name, write, read in (
            ("file", result.to_file, ns.SweepResult.from_file),
            ("zarr", result.to_zarr, ns.SweepResult.from_zarr),
        ):
            path = f"{folder}/r.{name}"
            _, writing = _walled(lambda write=write, path=path: write(path))
            found, reading = _walled(lambda read=read, path=path: read(path))
            assert found == result
            print(f"{prompts * sites} cells, {name}: {writing:.2f} s to write, {reading:.2f} s to read")
        _, opening = _walled(
            lambda: ns.SweepResult.open_zarr(f"{folder}/r.zarr")["values"].sel(prompt=prompts // 2).values
        )
        print(f"one prompt of the store, opened and read: {opening:.2f} s")


def captures(count: int, width: int, tokens: int, chunk: int) -> None:
    """Captures of so many prompts, in a folder."""
    config = hf.GPT2Config(
        n_layer=2, n_embd=width, n_head=2, vocab_size=128, n_positions=64, bos_token_id=1, eos_token_id=1
    )
    model, chosen = ns.load(hf.GPT2LMHeadModel(config).eval()), random.Random(0)
    prompts = ([chosen.randrange(1, 100) for _ in range(tokens)] for _ in range(count))
    with tempfile.TemporaryDirectory() as folder:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        held, seconds = _walled(
            lambda: ns.capture_to(
                folder, model, prompts, ["layers[0].output[-1]", "layers[1].output[-1]"], chunk=chunk, progress=False
            )
        )
        peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3
        size = sum(path.stat().st_size for path in Path(folder).iterdir()) / 1e6
        print(f"{held.rows} prompts captured: {seconds:.0f} s, {seconds / count * 1e6:.0f} us each, {size:.0f} MB on "
              f"disk, {peak:.0f} MB more in memory")  # fmt: skip
        _, seconds = _walled(lambda: ns.SavedActivation.open(folder))
        print(f"opened: {seconds:.2f} s")
        seen, seconds = _walled(lambda: sum(len(batch) for batch in held.tokens("layers[1].output[-1]", 1024, seed=0)))
        print(f"{seen} streamed in batches, mixed: {seconds:.1f} s")


def _walled(work):
    start = time.perf_counter()
    found = work()
    return found, time.perf_counter() - start


def _timed(work):
    start = time.process_time()
    found = work()
    return found, time.process_time() - start


def main(arguments: Sequence[str] | None = None) -> None:
    """Print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--units", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--on", choices=["local", "ray"], default="local")
    parser.add_argument("--out", help="where run folders go, as s3://bucket/a; a temporary folder if left out")
    parser.add_argument("--cells", type=int, default=10_000_000)
    parser.add_argument("--prompts", type=int, default=100_000)
    parser.add_argument("--only", choices=["planning", "units", "cells", "captures"])
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    parts = {
        "planning": lambda: planning(given.pairs, given.layers, given.tokens),
        "units": lambda: units(given.units, given.workers, given.on, given.out),
        "cells": lambda: cells(given.cells, 3200),
        "captures": lambda: captures(given.prompts, 16, 8, 4096),
    }
    for part in [given.only] if given.only else ["planning", "units"]:
        parts[part]()


if __name__ == "__main__":
    main()
