"""Real Ray, submitit and an S3 server, on this machine; `make ray` installs them into an environment of their own."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import nnsplice as ns
import sweep_functions
from buckets import bucket, server  # noqa: F401  (fixtures)
from nnsplice.cli import app
from nnsplice.errors import BadArgument, FileError, MissingPackage, TeamError
from nnsplice.work import RunFolder, Worker, status_of
from nnsplice.work.local import Local
from nnsplice.work.ray import _ENVIRONMENT, Ray
from nnsplice.work.slurm import Slurm
from work_payload import alone, bits, written

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _found_by_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT / "tests"), str(ROOT / "src"), *sys.path])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture(scope="module")
def cluster() -> Any:
    ray = pytest.importorskip("ray", reason="Ray is an extra, and large: `make ray` runs this")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, ignore_reinit_error=True)
    yield ray
    ray.shutdown()


@pytest.fixture
def local_slurm(tmp_path: Path) -> Slurm:
    pytest.importorskip("submitit", reason="submitit is an extra: `make ray` runs this")
    return Slurm(2, {"timeout_min": 5}, cluster="local")


def _killing(folder: RunFolder, kills: int, units: int = 1) -> threading.Thread:
    """A thread that kills workers while they run, when they have told of so many units."""

    def kill() -> None:
        killed: set[int] = set()
        deadline = time.monotonic() + 60
        while len(killed) < kills and time.monotonic() < deadline:
            for one in status_of(folder).workers:
                if one["alive"] and one["state"] == "running" and one["units"] >= units and one["pid"] not in killed:
                    os.kill(one["pid"], signal.SIGKILL)
                    killed.add(one["pid"])
                    break
            time.sleep(0.05)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    return thread


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_ray_runs_all_units_whatever_dies(cluster: Any, tmp_path: Path) -> None:
    folder = written(tmp_path / "run", 60, seconds=0.05)
    thread = _killing(folder, 2)
    Ray(workers=2).run(folder, False)
    thread.join()
    assert bits(folder) == alone(60)
    assert len(list(folder.workers())) >= 4


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_ray_waits_for_no_worker_that_has_no_room(cluster: Any, tmp_path: Path) -> None:
    folder = written(tmp_path / "run", 10)
    Ray(workers=9).run(folder, False)
    assert bits(folder) == alone(10)


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_unit_that_ends_its_workers_is_left_out_on_ray(cluster: Any, tmp_path: Path) -> None:
    folder = written(tmp_path / "run", 6, kills=[1])
    Ray(workers=2).run(folder, False)
    assert set(folder.failures()) == {1}
    assert folder.done() == {0, 2, 3, 4, 5}


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_sweep_on_ray_has_the_bits_of_one_process(cluster: Any, tmp_path: Path) -> None:
    model = sweep_functions.tiny()
    plan = ns.plan_sweep(model, ["w3 w4 w5"] * 4, ["w3 w9 w5"] * 4, "layers[:].output[:]", ns.logit_diff("w7", "w8"))
    options: dict[str, Any] = {"size": 20, "progress": False}
    found = ns.run(plan, sweep_functions.tiny, on=ns.on.ray(workers=2), out=tmp_path / "run", **options)
    with pytest.raises(TeamError, match="weights"):
        ns.run(plan, sweep_functions.other, on=ns.on.ray(workers=1), out=tmp_path / "other", **options)
    here = ns.run(plan, sweep_functions.tiny, on="local:1", out=tmp_path / "here", **options)
    assert found == here


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")
def test_submitit_runs_all_units_whatever_dies(local_slurm: Slurm, tmp_path: Path) -> None:
    folder = written(tmp_path / "run", 60, seconds=0.05)
    thread = _killing(folder, 1)
    local_slurm.run(folder, False)
    thread.join()
    assert bits(folder) == alone(60)


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")
def test_a_preempted_task_asks_for_itself_again(local_slurm: Slurm, tmp_path: Path) -> None:
    import submitit.helpers  # pyright: ignore[reportMissingImports]

    from nnsplice.work.slurm import SlurmTask

    task = SlurmTask([sys.executable, "-c", "raise SystemExit(3)"], dict(os.environ))
    assert task() == 3
    again = task.checkpoint()
    assert isinstance(again, submitit.helpers.DelayedSubmission)
    assert again.function is task


# --- runs in an object store


def test_a_run_in_an_object_store_whatever_dies(bucket: str) -> None:  # noqa: F811
    folder = written(f"{bucket}/runs/a", 60, seconds=0.05)
    thread = _killing(folder, 2, units=0)  # a worker tells of its units every two seconds
    Local(2).run(folder, False)
    thread.join()
    assert bits(folder) == alone(60)
    found = status_of(RunFolder.open(f"{bucket}/runs/a"))
    assert (found.done, found.failures) == (60, {})
    assert len(found.workers) >= 3
    names = folder.store.names("workers")
    assert {f"{one['worker']}.log" for one in found.workers if one["state"] == "done"} <= set(names)
    assert not folder.store.has("driver.lock")


def test_a_unit_that_ends_its_workers_is_left_out_in_an_object_store(bucket: str) -> None:  # noqa: F811
    folder = written(f"{bucket}/run", 6, kills=[1])
    Local(2).run(folder, False)
    assert set(folder.failures()) == {1}
    assert folder.done() == {0, 2, 3, 4, 5}
    folder.forgive()
    assert folder.failures() == {}


def test_workers_of_an_object_store_take_each_unit_once(bucket: str) -> None:  # noqa: F811
    folder = written(f"{bucket}/run", 40)
    workers = [Worker(RunFolder.open(f"{bucket}/run"), name=f"w{number}") for number in range(4)]
    threads = [threading.Thread(target=worker.work) for worker in workers]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert bits(folder) == alone(40)
    assert sum(worker.record["units"] for worker in workers) == 40


def test_a_worker_elsewhere_is_dead_when_its_lease_is_over_in_an_object_store(bucket: str) -> None:  # noqa: F811
    folder = written(f"{bucket}/run", 2, lease=3.0)
    folder.store.write("claims/000000", b'{"pid": 1, "host": "elsewhere", "began": "1", "worker": "far", "token": "t"}')
    worker = Worker(folder)
    assert not worker.claims.take_over(0)
    time.sleep(5)
    assert worker.claims.take_over(0)
    assert folder.strikes(0) == ["far ended"]


def test_two_drivers_of_an_object_store_are_refused(bucket: str) -> None:  # noqa: F811
    folder = written(f"{bucket}/run", 2)
    lock = folder.store.lock("driver")
    with pytest.raises(FileError, match="is being written by process"):
        Local(1).run(folder, False)
    lock.release()


def test_another_run_in_the_same_place_is_refused(bucket: str) -> None:  # noqa: F811
    written(f"{bucket}/run", 2)
    with pytest.raises(FileError, match="holds another run"):
        written(f"{bucket}/run", 3)
    RunFolder.open(f"{bucket}/run").store.remove("run.json")
    with pytest.raises(FileError, match="and no run"):
        written(f"{bucket}/run", 2)


def test_a_sweep_in_an_object_store_has_the_bits_of_one_process(
    bucket: str,  # noqa: F811
    tmp_path: Path,
    capsys: Any,
) -> None:
    model = sweep_functions.tiny()
    reference = ns.capture(model, "w9 w8 w7", "layers[:].output[:]")
    plan = ns.plan_sweep(
        model, ["w3 w4 w5"] * 3, None, "layers[:].output[:]", ns.logit_diff("w7", "w8"), operation="mean",
        reference=reference,
    )  # fmt: skip
    options: dict[str, Any] = {"size": 20, "progress": False}
    with pytest.raises(FileError, match="no unit of s3://"):
        ns.run(plan, sweep_functions.tiny, on="folder", out=f"{bucket}/run", **options)
    for command in ("work", "status", "merge"):
        with pytest.raises(SystemExit, match=r"^0$"):
            app([command, f"{bucket}/run"])
    assert "units done, 0 failed" in capsys.readouterr().out
    found = ns.run(plan, sweep_functions.tiny, on="local:1", out=f"{bucket}/run", **options)
    here = ns.run(plan, sweep_functions.tiny, on="local:1", out=tmp_path / "here", **options)
    assert found == here == ns.SweepResult.from_file(f"{bucket}/run/result.safetensors")


def test_submitit_needs_a_file_system(bucket: str, local_slurm: Slurm) -> None:  # noqa: F811
    with pytest.raises(BadArgument, match=r"srun nnsplice work s3://"):
        local_slurm.run(written(f"{bucket}/run", 1), False)


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_ray_runs_what_is_in_an_object_store(
    cluster: Any,
    bucket: str,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Here the machine has the credentials in its environment, which Ray's own processes began without."""
    monkeypatch.setattr("nnsplice.work.ray._ENVIRONMENT", (*_ENVIRONMENT, "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"))
    folder = written(f"{bucket}/run", 10)
    Ray(workers=2).run(folder, False)
    assert bits(folder) == alone(10)


@pytest.mark.parametrize(("engine", "extra"), [(Ray(), "ray"), (Slurm(), "slurm")])
def test_without_the_extra_it_is_named(
    engine: Any, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, {"ray": "ray", "slurm": "submitit"}[extra], None)
    with pytest.raises(MissingPackage, match=rf"nnsplice\[{extra}\]"):
        engine.run(written(tmp_path / "run", 1), False)
