"""Runs whose processes die, at any moment and in any way, end with the bits of one process."""

from __future__ import annotations

import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import save_file

from nnsplice.errors import FileError, TeamError
from nnsplice.work import RunFolder, Worker, status_of
from nnsplice.work.driving import environment
from nnsplice.work.local import Local
from work_payload import alone, bits, written

ROOT = Path(__file__).parents[2]
DRIVER = "import sys; from nnsplice.work import RunFolder; from nnsplice.work.local import Local; " \
    "Local(int(sys.argv[2])).run(RunFolder.open(sys.argv[1]), False)"  # fmt: skip


@pytest.fixture(autouse=True)
def _found_by_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT / "tests"), str(ROOT / "src"), *sys.path])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def _started(*command: str, **more: str) -> subprocess.Popen[bytes]:
    own = {**environment(), "NNSPLICE_PARENT": "", **more}
    return subprocess.Popen([sys.executable, *command], env=own, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _worker(folder: RunFolder, **more: str) -> subprocess.Popen[bytes]:
    return _started("-m", "nnsplice", "work", str(folder.path), **more)


def _until(happened: Callable[[], Any], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def _pids(folder: RunFolder) -> list[int]:
    return [one["pid"] for one in status_of(folder).workers if one["alive"] and one["state"] == "running"]


def test_local_workers_run_all_units(tmp_path: Path) -> None:
    folder = written(tmp_path / "run", 30)
    Local(2).run(folder, False)
    assert bits(folder) == alone(30)
    found = status_of(folder)
    assert (found.done, found.failures, sum(one["units"] for one in found.workers)) == (30, {}, 30)
    assert {one["state"] for one in found.workers} == {"done"}
    assert not (folder.path / "driver.lock").exists()


def test_each_worker_killed_in_turn(tmp_path: Path) -> None:
    folder = written(tmp_path / "run", 40, seconds=0.03)
    driver = _started("-c", DRIVER, str(folder.path), "2")
    killed: set[int] = set()
    for _ in range(2):
        _until(lambda: set(_pids(folder)) - killed)
        victim = next(iter(set(_pids(folder)) - killed))
        os.kill(victim, signal.SIGKILL)
        killed.add(victim)
    assert driver.wait(60) == 0
    assert bits(folder) == alone(40)
    assert len(list(folder.workers())) >= 3  # those that were killed, and those that came for them


def test_the_driver_killed_and_called_again(tmp_path: Path) -> None:
    """Its workers leave after their unit; the next driver goes on from what is there."""
    folder = written(tmp_path / "run", 60, seconds=0.03)
    driver = _started("-c", DRIVER, str(folder.path), "1")
    _until(lambda: len(folder.done()) >= 2)
    driver.kill()
    driver.wait()
    _until(lambda: not _pids(folder))
    there = folder.done()
    assert 2 <= len(there) < 60
    times = {number: (folder.path / folder.unit_file(number)).stat().st_mtime_ns for number in there}
    Local(2).run(folder, False)
    assert bits(folder) == alone(60)
    assert {number: (folder.path / folder.unit_file(number)).stat().st_mtime_ns for number in there} == times


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2, signal.SIGINT])
def test_a_signal_lets_a_worker_leave_after_its_unit(tmp_path: Path, number: signal.Signals) -> None:
    folder = written(tmp_path / "run", 60, seconds=0.05)
    worker = _worker(folder)
    _until(lambda: folder.done())
    worker.send_signal(number)
    assert worker.wait(30) == 0
    (told,) = [told for _, told in folder.workers()]
    assert told["state"] == "left"
    assert told["units"] == len(folder.done()) < 60
    assert not list((folder.path / "strikes").iterdir())
    claimed = {int(path.name) for path in (folder.path / "claims").iterdir()}
    assert claimed == folder.done()  # nothing is held by a worker that has left
    assert Worker(folder).work() == 0
    assert bits(folder) == alone(60)


def test_a_unit_that_ends_its_workers_is_named_and_the_rest_goes_on(tmp_path: Path) -> None:
    folder = written(tmp_path / "run", 12, kills=[5])
    Local(2).run(folder, False)
    assert set(folder.failures()) == {5}
    assert "3 workers ended while they ran it" in folder.failures()[5]
    assert bits(folder) == {number: value for number, value in alone(12).items() if number != 5}


def test_an_error_of_a_unit_is_told_and_the_rest_goes_on(tmp_path: Path) -> None:
    folder = written(tmp_path / "run", 6, refuses=[2])
    assert Worker(folder).work() == 0
    assert folder.failures() == {2: "unit 2 asks for what is not there"}
    assert folder.done() == {0, 1, 3, 4, 5}


def test_an_error_of_a_device_is_tried_by_other_processes(tmp_path: Path) -> None:
    folder = written(tmp_path / "run", 3, breaks=[1])
    codes = [Worker(folder).work() for _ in range(4)]
    assert codes == [4, 4, 4, 0]
    assert "3 workers had an error at it" in folder.failures()[1]
    assert folder.done() == {0, 2}


def test_a_full_disk_is_nothing_about_the_unit(tmp_path: Path) -> None:
    folder = written(tmp_path / "run", 3, full=[1])
    with pytest.raises(TeamError, match=r"2 of 3 units were not run[\s\S]*No space left on device"):
        Local(1).run(folder, False)
    assert folder.failures() == {}
    assert not list((folder.path / "strikes").iterdir())


def test_an_outcome_that_the_disk_does_not_take_leaves_nothing(tmp_path: Path) -> None:
    """A real write that fails half way: files of this worker may have 64 kB, and the outcomes have 800."""
    folder = written(tmp_path / "run", 3, numbers=100_000)
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))  # noqa: E731  (a function for the child)
    worker = subprocess.Popen(
        [sys.executable, "-m", "nnsplice", "work", str(folder.path)], env={**environment(), "NNSPLICE_PARENT": ""},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=limit,
    )  # fmt: skip
    assert worker.wait(60) == 4
    (told,) = [told for _, told in folder.workers()]
    assert told["state"] == "broken"
    assert "File too large" in told["reason"]
    assert [list((folder.path / name).iterdir()) for name in ("units", "claims", "strikes", "failed")] == [[]] * 4
    assert Worker(folder).work() == 0
    assert folder.done() == {0, 1, 2}


@pytest.mark.parametrize("name", ["values", "unit"])
def test_numbers_that_changed_on_the_disk_are_found(tmp_path: Path, name: str) -> None:
    folder = written(tmp_path / "run", 2)
    assert Worker(folder).work() == 0
    path = folder.path / folder.unit_file(1)
    raw = bytearray(path.read_bytes())
    if name == "values":
        raw[-1] ^= 1  # a valid file with another number
    path.write_bytes(raw if name == "values" else (folder.path / folder.unit_file(0)).read_bytes())
    with pytest.raises(FileError, match="damaged: its numbers" if name == "values" else "holds unit 0"):
        folder.outcome(1)
    assert folder.outcome(0)[0]["values"].tobytes() == alone(2)[0]


def test_outcomes_that_were_written_without_a_checksum_are_read(tmp_path: Path) -> None:
    folder = written(tmp_path / "run", 1)
    assert Worker(folder).work() == 0
    values = folder.outcome(0)[0]["values"]
    save_file({"values": values}, folder.path / folder.unit_file(0), metadata={"unit": "0", "about": "{}"})
    assert folder.outcome(0)[0]["values"].tobytes() == values.tobytes()


def test_a_worker_with_other_weights_is_refused(tmp_path: Path) -> None:
    folder = written(tmp_path / "run", 3, digest="aaaa")
    worker = _worker(folder, WORK_PAYLOAD_DIGEST="bbbb")
    assert worker.wait(60) == 3
    (told,) = [told for _, told in folder.workers()]
    assert (told["state"], told["reason"]) == ("refused", "other weights: bbbb here, aaaa there")
    assert folder.done() == set()


def test_a_worker_of_other_versions_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = written(tmp_path / "run", 3)
    monkeypatch.setattr("nnsplice.work.run_folder.versions", lambda: {**folder.header["versions"], "torch": "9.9"})
    worker = Worker(folder)
    assert worker.work() == 3
    assert re.search(r"torch [\d.+a-z]+ there, 9.9 here", worker.record["reason"])


def test_two_drivers_are_refused(tmp_path: Path) -> None:
    folder = written(tmp_path / "run", 40, seconds=0.05)
    driver = _started("-c", DRIVER, str(folder.path), "1")
    _until(lambda: folder.done())
    with pytest.raises(FileError, match=rf"process {driver.pid}"):
        Local(1).run(folder, False)
    driver.terminate()
    driver.wait()


def test_a_worker_on_another_machine_is_dead_when_its_lease_is_over(tmp_path: Path) -> None:
    folder = written(tmp_path / "run", 2, lease=5.0)
    claim = folder.path / "claims" / "000000"
    claim.write_text('{"pid": 1, "host": "elsewhere", "began": "1", "worker": "far", "token": "t"}')
    worker = Worker(folder)
    assert not worker.claims.take_over(0)
    past = time.time() - 6
    os.utime(claim, (past, past))
    assert worker.claims.take_over(0)
    assert folder.strikes(0) == ["far ended"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 3}'])
def test_a_claim_that_was_cut_off_is_taken_over(tmp_path: Path, text: str) -> None:
    folder = written(tmp_path / "run", 2, lease=5.0)
    claim = folder.path / "claims" / "000001"
    claim.write_text(text)
    assert not Worker(folder).claims.take_over(1)
    past = time.time() - 6
    os.utime(claim, (past, past))
    assert Worker(folder).claims.take_over(1)


def test_random_kills_give_the_bits_of_one_process(tmp_path: Path) -> None:
    """Workers and drivers, at random moments, again and again."""
    folder, chosen, kills = written(tmp_path / "run", 150, seconds=0.02), random.Random(0), 0
    driver = _started("-c", DRIVER, str(folder.path), "2")
    while kills < 20 and len(folder.done()) < 150:
        time.sleep(chosen.uniform(0.02, 0.25))
        pids = _pids(folder)
        if driver.poll() is not None or (kills % 7 == 6 and pids):
            driver.kill()
            driver.wait()
            driver = _started("-c", DRIVER, str(folder.path), "2")
            kills += 1
        elif pids:
            os.kill(chosen.choice(pids), signal.SIGKILL)
            kills += 1
    driver.wait(120)
    _until(lambda: not _pids(folder))
    Local(1).run(folder, False)
    assert kills >= 10
    assert folder.failures() == {}
    assert bits(folder) == alone(150)
