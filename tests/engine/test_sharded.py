"""Models that are spread over processes: what would be of other columns than an address means is refused, by name."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "sharded_models.py"


def asked(size: int, folder: Path, kind: str) -> dict[str, str]:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(size), str(folder), kind], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    answers = folder / "answers.json"
    return json.loads(answers.read_text()) if answers.exists() else {}


@pytest.mark.parametrize("size", [2, 4])
def test_captures_of_several_processes_are_those_of_one_or_refused(size, tmp_path):
    found = asked(size, tmp_path, "apart")
    refused = {name: found.pop(name) for name in list(found) if not found[name][0].isdigit()}
    assert len(found) == 13 and all(float(apart) < 1e-12 for apart in found.values()), found
    # Queries are measured before they are read, and that way goes past what is gathered.
    assert list(refused) == ["tensor layers[1].heads[2].q[-1]"] and refused.popitem()[1].startswith("RefusedPlace")


@pytest.mark.parametrize("size", [2, 4])
def test_sweeps_of_several_processes_are_those_of_one_or_refused(size, tmp_path):
    found = asked(size, tmp_path, "swept")
    assert found.pop("note").startswith(f"not packed: this model is spread over {size} processes")
    assert found.pop("packed").startswith("RefusedExecutor")
    assert found.pop("tensor knockout").startswith("RefusedPlace")  # heads are numbered within each process there
    # The header, and chunks of at most 16 tokens; what is done is not written again.
    assert int(found.pop("lines")) > 3
    assert (found.pop("same"), found.pop("edited")) == ("True", "True")
    assert len(found) == 18 and all(float(apart) < 1e-10 for apart in found.values()), found


def test_processes_that_go_different_ways_are_told_and_none_waits_for_ever(tmp_path):
    asked(2, tmp_path, "failing")
    first, second = (json.loads((tmp_path / f"answers-{rank}.json").read_text()) for rank in range(2))
    for found in (first, second):
        assert found["prompts"].startswith("BadArgument: the sweep of process 1 is another than that of process 0")
        assert found["tokens"].startswith("BadArgument: the sweep of process 1")
        assert found["all well"] == "done"
    assert first["journal"].startswith("FileNotFoundError: there is no folder")
    assert second["journal"].startswith("TeamError: opening the journal failed in process 0: FileNotFoundError")
    assert second["memory"].startswith("OutOfMemoryError") and "max_tokens=" in second["memory"]
    assert first["memory"].startswith("RuntimeError")  # gloo's: the other did not come in time


@pytest.mark.parametrize("size", [1, 2])
def test_sharded_models_are_refused_by_name_and_plain_ones_are_not(size, tmp_path):
    found = asked(size, tmp_path, "refused")
    right = {"plain ablate": "entered", "plain capture": "1", "rest untouched": "entered", "gathered": "0.0"}
    assert {name: found.pop(name) for name in right} == right
    assert "flat parameter of FullyShardedDataParallel" in found.pop("flat")
    value = found.pop("value")
    assert f"a DTensor over {size} process" in value and "full_tensor()" in value
    for name, said in found.items():
        assert said.startswith("BadArgument: "), (name, said)
        assert f"is a DTensor over {size} process" in said and "placed" in said, (name, said)
        assert "expected: a plain model with the whole tensors" in said and "full_tensor()" in said, (name, said)
        assert "layers." in said or "embed_tokens" in said, (name, said)  # the parameter's name
