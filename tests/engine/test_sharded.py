"""Models that are spread over processes: what would be of other columns than an address means is refused, by name."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "sharded_models.py"


@pytest.mark.parametrize("size", [1, 2])
def test_sharded_models_are_refused_by_name_and_plain_ones_are_not(size, tmp_path):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(size), str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads((tmp_path / "answers.json").read_text())
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
