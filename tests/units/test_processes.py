"""Real questions in real processes: two workers, killed ones, and one process give the same bits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import nnsplice as ns
import sweep_functions
from nnsplice.errors import FileError
from nnsplice.work import RunFolder, merged, status_of
from nnsplice.work.driving import environment
from units import questions
from units.questions import CLEAN, CORRUPTED, LOAD, SOURCE

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _found_by_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT / "tests"), str(ROOT / "src"), *sys.path])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture(scope="module")
def model() -> Any:
    return sweep_functions.precise()


def _worker(folder: RunFolder) -> subprocess.Popen[bytes]:
    """A worker's process, as from a shell."""
    own = {**environment(), "NNSPLICE_PARENT": ""}
    with (folder.path / "workers" / "output.log").open("ab") as log:
        return subprocess.Popen([sys.executable, "-m", "nnsplice", "work", str(folder.path)], env=own, stdout=log,
                                stderr=log)  # fmt: skip


def _until(happened: Callable[[], Any], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


def _stopped_within_a_unit(folder: RunFolder, worker: subprocess.Popen[bytes]) -> bool:
    """Stop a worker, and let it go on where it is between two units."""
    worker.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, worker.pid, os.WSTOPPED)
    claimed = {int(path.name) for path in (folder.path / "claims").iterdir()}
    if claimed - folder.done():
        return True
    worker.send_signal(signal.SIGCONT)
    return False


def _alone(folder: RunFolder) -> Any:
    """All units in this process, from the last on."""
    threads = torch.get_num_threads()
    try:
        task = folder.task()
        for number in reversed(range(folder.units)):
            folder.keep(number, task.run(number), {})
    finally:
        torch.set_num_threads(threads)
    return merged(folder)


def _left(plan: Any, path: Path, **options: Any) -> RunFolder:
    with pytest.raises(FileError, match="no unit of"):
        ns.run(plan, LOAD, on="folder", out=path, progress=False, **options)
    return RunFolder.open(path)


@pytest.mark.filterwarnings("ignore:.*apart in the mean")
@pytest.mark.parametrize("name", ["steering", "faithfulness, own mean", "sweep_weights"])
def test_two_processes_give_the_bits_of_one(model: Any, tmp_path: Path, name: str) -> None:
    other = sweep_functions.precise_other()
    question, arguments, options = questions.asked(name, model, other)
    plan = ns.plan(question, *arguments, **options)
    given: dict[str, Any] = {"size": 1, "max_tokens": 64}
    given |= {"source": SOURCE} if question is ns.sweep_weights else {}
    found = ns.run(plan, LOAD, on="local:2", out=tmp_path / "run", progress=False, **given)
    assert questions.bits(found) == questions.bits(_alone(_left(plan, tmp_path / "alone", **given)))
    assert status_of(RunFolder.open(tmp_path / "run")).done == len(CLEAN)


def _slow(name: str, model: Any) -> tuple[Any, dict[str, Any]]:
    """A plan whose units take some tenths of a second, so that a process is in the middle of one when it is killed."""
    metric, pair = sweep_functions.slow, (model, CLEAN * 2, CORRUPTED * 2)
    if name == "sweep":
        return ns.plan_sweep(*pair, "layers[:].mlp", metric), {"size": 9, "max_tokens": 64}
    return ns.plan(ns.path_patch, *pair, "layers[:].mlp", "unembed", metric), {"size": 1, "max_tokens": 64}


@pytest.mark.parametrize("name", ["sweep", "path_patch"])
def test_a_worker_killed_in_the_middle_of_a_unit_and_the_rest_by_another(model: Any, tmp_path: Path, name: str) -> None:
    plan, options = _slow(name, model)
    folder = _left(plan, tmp_path / "run", **options)
    assert folder.units >= 8
    first = _worker(folder)
    _until(lambda: len(folder.done()) >= 2 and _stopped_within_a_unit(folder, first))
    first.kill()
    first.wait()
    there = folder.done()
    assert 2 <= len(there) < folder.units
    times = {number: (folder.path / folder.unit_file(number)).stat().st_mtime_ns for number in there}
    second = _worker(folder)
    assert second.wait(120) == 0
    assert {number: (folder.path / folder.unit_file(number)).stat().st_mtime_ns for number in there} == times
    found, alone = merged(folder), _alone(_left(plan, tmp_path / "alone", **options))
    assert questions.bits(found) == questions.bits(alone)
    assert questions.told(found) == questions.told(alone)


DRIVER = """
import sys
import nnsplice as ns, sweep_functions
from units import test_processes
plan, options = test_processes._slow("sweep", sweep_functions.precise())
ns.run(plan, "sweep_functions:precise", on="local:2", out=sys.argv[1], progress=False, **options)
"""


@pytest.mark.slow
def test_a_driver_and_its_workers_killed_in_a_sweep_and_the_same_call_again(model: Any, tmp_path: Path) -> None:
    own = environment()
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, str(tmp_path / "run")], env=own)
    _until((tmp_path / "run" / "run.json").exists)
    folder = RunFolder.open(tmp_path / "run")
    _until(lambda: len(folder.done()) >= 2)
    driver.kill()
    driver.wait()
    for one in status_of(folder).workers:
        if one["alive"]:
            os.kill(one["pid"], signal.SIGKILL)
    _until(lambda: not any(one["alive"] for one in status_of(folder).workers))
    there = folder.done()
    assert 2 <= len(there) < folder.units
    plan, options = _slow("sweep", model)
    found = ns.run(plan, LOAD, on="local:1", out=tmp_path / "run", progress=False, **options)
    assert found.is_complete
    assert questions.bits(found) == questions.bits(_alone(_left(plan, tmp_path / "alone", **options)))
