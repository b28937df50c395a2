"""Questions of every kind in an object store: the bits of one process, and nothing beside it on this machine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import nnsplice as ns
import sweep_functions
from buckets import bucket, server  # noqa: F401  (fixtures)
from nnsplice.cli import app
from nnsplice.errors import FileError
from nnsplice.kinds import KINDS
from nnsplice.stores import store_of
from nnsplice.work import RunFolder, Worker, merged
from units import questions
from units.questions import CLEAN, CORRUPTED, LOAD, METRIC, SOURCE

ROOT = Path(__file__).parents[2]
#: One of each kind, those with tensors of their own beside the plan among them.
NAMES = (
    "steering, spans and an operator", "path_patch, subspace", "attribute, eap-ig", "faithfulness, saved",
    "sweep_weights", "capture",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _found_by_workers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT / "tests"), str(ROOT / "src"), *sys.path])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def model() -> Any:
    return sweep_functions.precise()


@pytest.fixture(scope="module")
def other() -> Any:
    return sweep_functions.precise_other()


def _called(capsys: Any, *arguments: str) -> str:
    with pytest.raises(SystemExit, match=r"^0$"):
        app(list(arguments))
    return capsys.readouterr().out


def test_all_kinds_are_tried_here(model: Any, other: Any) -> None:
    assert len({questions.asked(name, model, other)[0] for name in NAMES}) == len(KINDS)


@pytest.mark.parametrize("name", NAMES)
def test_questions_are_written_worked_at_told_and_merged(
    model: Any,
    other: Any,
    bucket: str,  # noqa: F811
    tmp_path: Path,
    capsys: Any,
    name: str,
) -> None:
    question, arguments, options = questions.asked(name, model, other)
    plan = ns.plan(question, *arguments, **options)
    given: dict[str, Any] = {"size": 1, "max_tokens": 64, "progress": False}
    source: dict[str, Any] = {"source": SOURCE} if question is ns.sweep_weights else {}
    run = f"{bucket}/runs/a"
    with pytest.raises(FileError, match="no unit of s3://"):
        ns.run(plan, LOAD, on="folder", out=run, **given, **source)
    assert _called(capsys, "status", run).startswith("0 of 5 units done, 0 failed, 0 workers")
    assert _called(capsys, "work", run) == "done: 5 units\n"
    assert _called(capsys, "status", run).startswith("5 of 5 units done, 0 failed, 0 workers")
    assert f"{run}/result.safetensors" in _called(capsys, "merge", run)
    here = ns.run(plan, model, **given, **({"source": other} if source else {}))
    there = type(here).from_file(f"{run}/result.safetensors")
    assert questions.bits(there) == questions.bits(here)
    again = ns.run(plan, LOAD, on="folder", out=run, **given, **source)
    assert questions.bits(again) == questions.bits(here)
    assert list(tmp_path.iterdir()) == []


def test_two_processes_give_the_bits_of_one(model: Any, bucket: str) -> None:  # noqa: F811
    question, arguments, options = questions.asked("attribute", model, None)
    plan = ns.plan(question, *arguments, **options)
    given: dict[str, Any] = {"size": 1, "max_tokens": 64, "progress": False}
    there = ns.run(plan, LOAD, on="local:2", out=f"{bucket}/run", **given)
    assert questions.bits(there) == questions.bits(ns.run(plan, model, **given))
    with pytest.raises(FileError, match="another run"):
        ns.run(plan, LOAD, on="local:2", out=f"{bucket}/run", **{**given, "size": 2})


@pytest.mark.parametrize("what", ["source", "subspace"])
def test_sweeps_of_a_source_and_of_a_subspace(
    model: Any,
    other: Any,
    bucket: str,  # noqa: F811
    tmp_path: Path,
    what: str,
) -> None:
    """Beside the sweep without it: a source or a subspace that was lost on the way would give those numbers."""
    part = ns.Subspace.of("layers[1].output", torch.eye(16, dtype=torch.float64)[:3])
    more: dict[str, Any] = {"source": other} if what == "source" else {"subspace": part}
    sites = "layers[1].output[:]"
    plan = ns.plan_sweep(model, CLEAN, CORRUPTED if what == "subspace" else None, sites, METRIC, **more)
    source: dict[str, Any] = {"source": SOURCE} if what == "source" else {}
    found: list[Any] = []
    for out in (f"{bucket}/run", tmp_path / "run"):
        with pytest.raises(FileError, match="no unit of"):
            ns.run(plan, LOAD, on="folder", out=out, size=20, **source)
        assert Worker(RunFolder.open(out)).work() == 0
        found.append(merged(RunFolder.open(out)))
    there, here = found
    assert there.is_complete
    assert questions.bits(there) == questions.bits(here)
    lost = ns.sweep(model, CLEAN, CORRUPTED, sites, METRIC, progress=False)
    assert np.nanmax(abs(there.table.values - lost.table.values)) > 1e-3


def test_a_run_that_was_not_written_to_its_end_is_told(model: Any, bucket: str, capsys: Any) -> None:  # noqa: F811
    plan = ns.plan(ns.capture, model, CLEAN, "layers[:].output[-1]")
    with pytest.raises(FileError, match="no unit of"):
        ns.run(plan, LOAD, on="folder", out=f"{bucket}/run")
    store_of(f"{bucket}/run").remove("load.json")
    with pytest.raises(SystemExit, match=r"^3$"):
        app(["work", f"{bucket}/run"])
    assert f"{bucket}/run does not say how the model is loaded" in capsys.readouterr().out
