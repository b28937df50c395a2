"""Real Ray and real submitit on this machine; `make ray` installs both into an environment of their own."""

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
from nnsplice.errors import MissingPackage, TeamError
from nnsplice.work import RunFolder, status_of
from nnsplice.work.ray import Ray
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


def _killing(folder: RunFolder, kills: int) -> threading.Thread:
    """A thread that kills workers while they run."""

    def kill() -> None:
        killed: set[int] = set()
        deadline = time.monotonic() + 60
        while len(killed) < kills and time.monotonic() < deadline:
            for one in status_of(folder).workers:
                if one["alive"] and one["state"] == "running" and one["units"] and one["pid"] not in killed:
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

    from nnsplice.work.slurm import Attempt

    attempt = Attempt([sys.executable, "-c", "raise SystemExit(3)"], dict(os.environ))
    assert attempt() == 3
    again = attempt.checkpoint()
    assert isinstance(again, submitit.helpers.DelayedSubmission)
    assert again.function is attempt


@pytest.mark.parametrize(("engine", "extra"), [(Ray(), "ray"), (Slurm(), "slurm")])
def test_without_the_extra_it_is_named(
    engine: Any, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, {"ray": "ray", "slurm": "submitit"}[extra], None)
    with pytest.raises(MissingPackage, match=rf"nnsplice\[{extra}\]"):
        engine.run(written(tmp_path / "run", 1), False)
