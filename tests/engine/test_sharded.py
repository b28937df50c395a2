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
    return json.loads((folder / "answers.json").read_text())


@pytest.mark.parametrize("size", [2, 4])
def test_captures_of_several_processes_are_those_of_one_or_refused(size, tmp_path):
    found = asked(size, tmp_path, "apart")
    refused = {name: found.pop(name) for name in list(found) if not found[name][0].isdigit()}
    assert len(found) == 13 and all(float(apart) < 1e-12 for apart in found.values()), found
    # Queries are measured before they are read, and that way goes past what is gathered.
    assert list(refused) == ["tensor layers[1].heads[2].q[-1]"] and refused.popitem()[1].startswith("RefusedPlace")


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
