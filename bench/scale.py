"""What it costs to give a plan to many processes: planning, cutting, and all that is done for a unit beside running it.

    python -m bench.scale                 1,000 pairs x 3,200 sites; 10,000 units that do nothing
    python -m bench.scale --units 1000 --pairs 100

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
from nnsplice.work import RunFolder, Worker
from nnsplice.work.local import Local


class Nothing:
    """Units without any work."""

    def run(self, number: int) -> Mapping[str, np.ndarray]:
        """One number."""
        return {"values": np.array([float(number)])}


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


def units(count: int, workers: int) -> None:
    """Units that do nothing: by one worker in this process, then by processes with a driver."""
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder.create(Path(folder) / "run", "bench.scale:opened", count, {}, lambda _: None)
        _, seconds = _timed(Worker(run).work)
        print(f"{count} units by one worker: {seconds / count * 1e3:.2f} ms of CPU each")
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder.create(Path(folder) / "run", "bench.scale:opened", count, {}, lambda _: None)
        start = time.perf_counter()
        _, seconds = _timed(lambda: Local(workers).run(run, False))
        wall = time.perf_counter() - start
        print(
            f"{count} units by {workers} processes: {wall / count * 1e3:.2f} ms each, "
            f"of the driver {seconds / count * 1e3:.3f} ms of CPU"
        )


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
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    planning(given.pairs, given.layers, given.tokens)
    units(given.units, given.workers)


if __name__ == "__main__":
    main()
