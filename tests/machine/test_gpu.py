"""The same checks on a real GPU, where there is one (`make gpu`), and that its table can be printed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from machine import placed
from machine.test_split import ASKED, CLEAN, CORRUPTED, METRIC, SITES, numbers
from nnsplice import digests, engine
from nnsplice.sweeps import plan_sweep, run

ROOT = Path(__file__).parents[2]
NEEDS_ONE = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
NEEDS_TWO = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two GPUs")
#: Kernels of a GPU add in another order, so its numbers are near those of the CPU, not the same.
NEAR = 1e-9


@pytest.mark.gpu
@pytest.mark.parametrize("place", [pytest.param("one", marks=NEEDS_ONE), pytest.param("split", marks=NEEDS_TWO)])
@pytest.mark.parametrize("asked", ASKED)
def test_the_numbers_are_those_of_the_cpu(asked, place):
    expected, found = (ASKED[asked](placed.model("llama", where)) for where in ("cpu", place))
    assert (found.run.executor, found.run.note) == (expected.run.executor, expected.run.note)
    for one, other in zip(numbers(found), numbers(expected), strict=True):
        assert np.nanmax(np.abs(one - other)) < NEAR


@pytest.mark.gpu
@NEEDS_ONE
def test_a_digest_is_the_one_of_the_cpu():
    assert engine.weights_digest(placed.model("llama", "one")) == engine.weights_digest(placed.model("llama", "cpu"))
    numbers = torch.arange((1 << 18) * 70 + 3)
    assert digests.checksum(numbers.cuda()) == digests.checksum(numbers)


@pytest.mark.gpu
@NEEDS_ONE
def test_little_memory_changes_no_value():
    model = placed.model("llama", "one")
    plan = plan_sweep(model, CLEAN, CORRUPTED, SITES, METRIC)
    expected = run(plan, model, progress=False)
    found = run(plan, model, progress=False, max_tokens=8)
    assert np.nanmax(np.abs(found.table.values - expected.table.values)) < NEAR


@pytest.mark.gpu
@NEEDS_ONE
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_says_how_small_an_effect_may_be_rounding(dtype):
    model = placed.model("llama", "one")
    model._module.to(dtype)
    plan = plan_sweep(model, CLEAN, CORRUPTED, SITES, METRIC)
    packed, alone = (run(plan, model, executor=how, progress=False) for how in ("packed", "reference"))
    size = np.nanmax(np.abs(alone.table.values)) + 1
    assert np.nanmax(np.abs(packed.table.values - alone.table.values)) < 16 * torch.finfo(dtype).eps * size
    assert "may be rounding" in packed.run.note


def test_the_table_is_printed_and_a_machine_without_a_gpu_is_refused():
    command = [sys.executable, "-m", "bench.gpu", "--shapes", "tiny", "--tokens", "5", "--rounds", "1", "--sample", "2"]
    done = subprocess.run([*command, "--device", "cpu"], cwd=ROOT, capture_output=True, text=True, check=True)
    rows = [line for line in done.stdout.splitlines() if line[36:46].strip().replace(".", "").isdigit()]
    assert len(rows) == 7 and all(float(row[36:46]) > 0 for row in rows)
    assert "ns.sweep, packed" in done.stdout and "%" in rows[3]
    if not torch.cuda.is_available():
        refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert refused.returncode == 1 and "there is no GPU here" in refused.stderr
