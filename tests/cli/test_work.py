"""`nnsplice work`, `merge`, `status`, and `trace --on`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import nnsplice as ns
import sweep_functions
from nnsplice.circuits import Faithfulness
from nnsplice.cli import app
from nnsplice.errors import FileError
from nnsplice.work import Worker
from units import questions
from work_payload import written

CLEAN, CORRUPTED = (f"The {name} is located in the city of" for name in ("Velmar Tower", "Ostrin Bridge"))
SITES = "layers[:].output"
ASKED = ["--clean", CLEAN, "--corrupted", CORRUPTED, "--sites", SITES, "--answer", "Athens", "--wrong", "Dublin"]


def _called(capsys: Any, *arguments: Any) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        app([str(one) for one in arguments])
    said = capsys.readouterr()
    return int(left.value.code or 0), said.out, said.err


def test_work_status_and_what_failed(tmp_path: Path, capsys: Any) -> None:
    folder = written(tmp_path / "run", 5, refuses=[3])
    code, out, _ = _called(capsys, "status", folder.path)
    assert (code, out.splitlines()[0]) == (0, "0 of 5 units done, 0 failed, 0 workers")
    code, out, _ = _called(capsys, "work", folder.path)
    assert (code, out.strip()) == (0, "done: 4 units")
    code, out, err = _called(capsys, "status", folder.path)
    assert code == 1
    assert "4 of 5 units done, 1 failed, 0 workers" in out
    assert "unit 3 failed: unit 3 asks for what is not there" in out
    assert "1 unit failed" in err


def test_a_folder_without_a_run_is_told(tmp_path: Path, capsys: Any) -> None:
    for command in ("work", "merge", "status"):
        code, _, err = _called(capsys, command, tmp_path)
        assert code == 1
        assert "holds no run" in err


def test_a_refused_worker_ends_with_3(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = written(tmp_path / "run", 2, digest="aaaa")
    monkeypatch.setenv("WORK_PAYLOAD_DIGEST", "bbbb")
    code, out, _ = _called(capsys, "work", folder.path)
    assert code == 3
    assert "refused: 0 units; other weights: bbbb here, aaaa there" in out


def test_trace_writes_a_folder_that_others_finish(tmp_path: Path, capsys: Any) -> None:
    toy = ns.load("toy")
    out = tmp_path / "velmar"
    code, _, err = _called(capsys, "trace", "--model", "toy", "--out", out, "--on", "folder", *ASKED)
    assert code == 1
    assert "no unit of" in err
    code, _, err = _called(capsys, "merge", out / "run")
    assert code == 1
    assert "units are missing" in err
    from nnsplice.work import RunFolder

    assert Worker(RunFolder.open(out / "run")).work() == 0
    code, said, _ = _called(capsys, "merge", out / "run")
    assert code == 0
    assert "cells of 1 prompt," in said
    code, said, err = _called(capsys, "merge", out / "run", "--json")
    (row,) = json.loads(said)
    assert (code, row["prompts"], row["file"]) == (0, 1, str(out / "run" / "result.safetensors"))
    assert f"{row['cells']} cells of 1 prompt" == row["result"]
    assert row["result"] in err
    found = ns.SweepResult.from_file(out / "run" / "result.safetensors")
    code, _, _ = _called(capsys, "trace", "--model", "toy", "--out", out, "--on", "folder", "--resume", *ASKED)
    assert code == 0
    assert ns.SweepResult.from_file(out / "result.safetensors") == found
    whole = ns.sweep(toy, CLEAN, CORRUPTED, SITES, ns.logit_diff("Athens", "Dublin"), progress=False)
    assert found.asked == whole.asked
    assert float(abs(found.table.values - whole.table.values).max()) < 1e-4


@pytest.mark.parametrize("where", ["s3://bucket/run", "gs://bucket/run"])
def test_an_object_store_is_no_folder(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = _called(capsys, "trace", "--model", "toy", "--out", where, *ASKED)
    assert code == 1
    assert "object store" in err
    assert list(tmp_path.iterdir()) == []


def test_estimates_run_here(tmp_path: Path, capsys: Any) -> None:
    code, _, err = _called(
        capsys, "trace", "--model", "toy", "--out", tmp_path / "a", "--on", "local:2", "--method", "atp", *ASKED
    )
    assert code == 2
    assert "exact sweeps" in err


READERS = {
    "steering": ns.steering.SteeringSweep, "path_patch": ns.SweepResult, "faithfulness": Faithfulness,
    "capture": ns.SavedActivation,
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*apart in the mean")
@pytest.mark.parametrize("name", READERS)
def test_questions_of_every_kind_are_run_told_and_merged(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    model = sweep_functions.precise()
    question, arguments, options = questions.asked(name, model, None)
    plan = ns.plan(question, *arguments, **options)
    with pytest.raises(FileError, match="no unit of"):
        ns.run(plan, questions.LOAD, on="folder", out=tmp_path / "run", size=1, max_tokens=64)
    code, _, err = _called(capsys, "merge", tmp_path / "run")
    assert code == 1
    assert "5 of 5 units are missing" in err
    code, out, _ = _called(capsys, "work", tmp_path / "run")
    assert (code, out.strip()) == (0, "done: 5 units")
    code, out, _ = _called(capsys, "status", tmp_path / "run")
    assert (code, out.splitlines()[0]) == (0, "5 of 5 units done, 0 failed, 0 workers")
    code, out, _ = _called(capsys, "merge", tmp_path / "run")
    assert code == 0
    assert "result.safetensors" in out
    found = READERS[name].from_file(tmp_path / "run" / "result.safetensors")
    here = ns.run(plan, model, size=1, max_tokens=64, progress=False)
    assert questions.bits(found) == questions.bits(here)
