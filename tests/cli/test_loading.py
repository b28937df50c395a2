"""Where a command runs its model, and with which numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import nnsplice as ns
from nnsplice.atlas import unwrap
from nnsplice.cli import app
from nnsplice.cli.loading import loaded
from nnsplice.errors import BadArgument

ASKED = ["--clean", "The Velmar Tower is located in", "--corrupted", "The Ostrin Bridge is located in"]
SITES = ["--sites", "layers[4:].output[-1]", "--answer", "Athens", "--wrong", "Dublin"]


def test_a_model_is_loaded_with_the_numbers_that_are_asked_for() -> None:
    model = loaded("toy", device="cpu", dtype="bf16")
    assert {p.dtype for p in unwrap(model).parameters()} == {torch.bfloat16}
    assert str(model.device) == "cpu"
    assert {p.dtype for p in unwrap(loaded("toy")).parameters()} == {torch.float32}


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a device that is not there")
@pytest.mark.parametrize("device", ["cuda", "cuda:1", "gpu"])
def test_a_device_that_is_not_there_is_an_error_that_says_what_is(device: str) -> None:
    with pytest.raises(BadArgument, match=rf"no device '{device}' on this machine(.|\n)*cpu, auto"):
        loaded("toy", device=device)


def test_a_sweep_takes_them_as_options_and_as_keys_of_its_file(tmp_path: Path) -> None:
    file = tmp_path / "sweep.toml"
    file.write_text('model = "toy"\ndevice = "cpu"\ndtype = "fp64"\n')
    ran = CliRunner().invoke(app, ["trace", str(file), *ASKED, *SITES, "--out", str(tmp_path / "out")])
    assert ran.exit_code == 0, ran.output
    exact = ns.SweepResult.from_file(tmp_path / "out" / "result.safetensors")
    model = ns.load("toy", dtype=torch.float64)
    metric = ns.logit_diff("Athens", "Dublin")
    expected = ns.sweep(model, ASKED[1], ASKED[3], SITES[1], metric, progress=False)
    assert exact.grid().values == pytest.approx(expected.grid().values, abs=1e-9)
    ran = CliRunner().invoke(app, ["trace", str(file), *ASKED, *SITES, "--plan-only", "--dtype", "int3"])
    assert ran.exit_code == 2 and "bf16, fp16, fp32, fp64" in ran.stderr


def test_every_command_that_runs_a_model_says_where_it_may_run() -> None:
    for words in (["check"], ["trace"], ["steer", "fit"], ["steer", "sweep"], ["steer", "generate"]):
        told = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": "200"}).stdout
        assert "--device NAME" in told and "--dtype NAME" in told, words
