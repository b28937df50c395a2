"""A sweep that is killed goes on where it stopped, and ends with the same bits as one that was never stopped.

One process of its own plays all of it: it forks a child for every kill, and goes on itself after each.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import nnsplice as ns
from nnsplice.results import Journal, SweepResult
from nnsplice.sweeps import choosing, plan_sweep, run
from zoo import wrap

CLEAN = ["w3 w4 w5 w6 w7", "w13 w14 w15", "w3 w4 w8 w6 w7"]
CORRUPTED = ["w3 w9 w5 w6 w7", "w13 w24 w15", "w9 w4 w8 w6 w7"]
#: Appended lines before the kill, and whether it comes in the middle of writing the next.
KILLS = [(0, False), (0, True), (1, False), (2, True), (5, False), (9, True), (13, False)]
TIMED = 13


def _plan(model: Any) -> ns.Plan:
    sites = ["layers[:].output", "layers[:].mlp.output"]
    return plan_sweep(model, CLEAN, CORRUPTED, sites, ns.logit_diff("w7", "w8"))


def _run(model: Any, plan: ns.Plan, journal: Path | None) -> SweepResult:
    return run(plan, model, executor="batched", max_tokens=15, journal=journal, progress=False)


def _counted(model: Any, plan: ns.Plan, journal: Path) -> tuple[SweepResult, list[Any]]:
    """A run, and the jobs that it computed."""
    computed: list[Any] = []
    execute = choosing.EXECUTORS["batched"]

    def counts(work: Any, jobs: Sequence[Any]) -> Any:
        computed.extend(jobs)
        return execute(work, jobs)

    choosing.EXECUTORS["batched"] = replace(execute, run=counts)
    try:
        return _run(model, plan, journal), computed
    finally:
        choosing.EXECUTORS["batched"] = execute


def _die(model: Any, plan: ns.Plan, journal: Path, after: int, halfway: bool) -> None:
    """Run, and be killed when `after` lines have been written; then perhaps with a half of the next."""
    journals: Any = Journal
    append = journals.append
    written = 0

    def appends(self: Any, *chunk: Any) -> None:
        nonlocal written
        if written == after:
            if halfway:
                before = journal.stat().st_size
                append(self, *chunk)
                os.truncate(journal, before + (journal.stat().st_size - before) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        append(self, *chunk)
        written += 1

    journals.append = appends
    _run(model, plan, journal)


def _linger(model: Any, plan: ns.Plan, journal: Path) -> None:
    """Run, and take some time for every line, so that a kill from outside comes anywhere."""
    journals: Any = Journal
    append = journals.append

    def appends(self: Any, *chunk: Any) -> None:
        time.sleep(0.02)
        append(self, *chunk)

    journals.append = appends
    _run(model, plan, journal)


def _killed(child: Any, *args: Any, seconds: float | None = None) -> bool:
    """Have a forked child do it, and say whether it was killed."""
    number = os.fork()
    if number == 0:
        with contextlib.suppress(BaseException):
            child(*args)
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(number, signal.SIGKILL)
    _, status = os.waitpid(number, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def _play(folder: Path) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    model = wrap("gpt2")
    plan = _plan(model)
    whole = _run(model, plan, None)
    chosen = random.Random(0)
    story: list[dict[str, Any]] = [{"digest": whole.digest, "jobs": len(plan.jobs)}]
    cases: list[tuple[Any, tuple[Any, ...], float | None]] = [(_die, kill, None) for kill in KILLS]
    cases += [(_linger, (), chosen.uniform(0.05, 0.5)) for _ in range(TIMED)]
    for number, (child, args, seconds) in enumerate(cases):
        journal = folder / f"{number}.jsonl"
        killed = _killed(child, model, plan, journal, *args, seconds=seconds)
        lines = journal.read_bytes().split(b"\n")[1:-1] if journal.exists() else []
        there = [job for line in map(json.loads, lines) for job in zip(line["prompt"], line["cell"], strict=True)]
        locked = journal.with_name(f"{journal.name}.lock").exists()
        result, computed = _counted(model, plan, journal)
        again, nothing = _counted(model, plan, journal)
        story.append(
            {
                "killed": killed,
                "lines": len(lines),
                "locked": locked,
                "digest": result.digest,
                "again": again.digest,
                "rest": sorted([*there, *computed]) == sorted(plan.jobs),
                "computed": len(computed),
                "nothing": len(nothing),
                "timed": seconds is not None,
                "left": sorted(p.name for p in folder.glob(f"{number}.*")),
            }
        )
    # Killed twice on the way.
    journal = folder / "twice.jsonl"
    killed = [_killed(_die, model, plan, journal, *kill) for kill in ((2, True), (3, False))]
    lines = journal.read_bytes().count(b"\n") - 1
    story.append({"killed": all(killed), "lines": lines, "digest": _counted(model, plan, journal)[0].digest})
    return story


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_killed_sweep_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    tests = Path(__file__).resolve().parent.parent
    told = subprocess.run(
        [sys.executable, __file__, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(tests)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert told.returncode == 0, told.stderr
    whole, *stops, twice = json.loads((tmp_path / "story.json").read_text())
    assert len(stops) == len(KILLS) + TIMED
    for number, stop in enumerate(stops):
        assert (stop["digest"], stop["again"]) == (whole["digest"], whole["digest"])
        assert stop["rest"] and stop["nothing"] == 0  # only what was left is computed, and all of it
        assert stop["left"] == [f"{number}.jsonl"]
        if not stop["timed"]:
            assert stop["killed"] and stop["locked"]
            assert stop["lines"] == KILLS[number][0]
            assert 0 < stop["computed"] <= whole["jobs"]
    assert len({stop["computed"] for stop in stops}) >= 5
    assert any(stop["killed"] for stop in stops if stop["timed"])
    assert (twice["killed"], twice["lines"], twice["digest"]) == (True, 5, whole["digest"])


def test_the_journal_of_another_sweep_is_refused_before_anything_runs(tmp_path: Path) -> None:
    model = wrap("gpt2")
    journal = tmp_path / "run.jsonl"
    plan = _plan(model)
    _run(model, plan, journal)
    raw = journal.read_bytes()
    other = plan_sweep(model, CLEAN, CORRUPTED, "layers[:].output", ns.logit_diff("w7", "w8"))
    with pytest.raises(ns.errors.FileError, match=r"another sweep\n  sites: "):
        _run(model, other, journal)
    assert journal.read_bytes() == raw


def test_shards_with_journals_merge_to_the_whole(tmp_path: Path) -> None:
    model = wrap("gpt2")
    model._module.double()
    plan = _plan(model)
    whole = _run(model, plan, None)
    shards = [_run(model, plan.shard(i, 3), tmp_path / f"{i}.jsonl") for i in range(3)]
    assert not any(shard.is_complete for shard in shards)
    merged = SweepResult.merge(shards)
    assert merged.is_complete and merged.cells == whole.cells
    assert abs(merged.grid("layers[:].output") - whole.grid("layers[:].output")).max() < 1e-12
    # A shard again, from its journal alone.
    again, computed = _counted(model, plan.shard(1, 3), tmp_path / "1.jsonl")
    assert (again, computed) == (shards[1], [])


def test_neither_a_journal_nor_a_plan_serves_a_model_that_was_edited(tmp_path: Path) -> None:
    model = wrap("llama")
    plan = _plan(model)
    _run(model, plan, tmp_path / "j.jsonl")
    with torch.no_grad():
        model._module.model.layers[1].mlp.down_proj.weight[5:] = 0
    with pytest.raises(ValueError, match="other weights than this model has"):
        _run(model, plan, None)
    with pytest.raises(ns.errors.FileError, match="another sweep"):
        _run(model, _plan(model), tmp_path / "j.jsonl")


def test_shards_in_single_precision_merge_though_their_unedited_runs_round_otherwise() -> None:
    model = wrap("gpt2")
    sites = "layers[:].output"
    plan = plan_sweep(model, ["w3 w4 w5 w6", "w3 w4 w5"], ["w3 w9 w5 w6", "w3 w4 w9"], sites, ns.logit_diff("w7", "w8"))
    for n in (2, 5, 20):
        shards = [run(plan.shard(i, n), model, max_tokens=100 * (i % 2) + 4, progress=False) for i in range(n)]
        assert SweepResult.merge(shards).is_complete


if __name__ == "__main__":
    target = Path(sys.argv[1])
    (target / "story.json").write_text(json.dumps(_play(target)))
