"""The ranges in pyproject.toml can be tried at both ends."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import versions


def test_every_dependency_has_a_lowest_version_and_torch_stays() -> None:
    lowest = versions.constraints("lowest")
    assert {line.split("==")[0] for line in lowest} == {versions.name_of(line) for line in versions.REQUIREMENTS}
    assert versions.constraints("newest") == [versions.pin()]
    assert versions.pin() in lowest


@pytest.mark.parametrize(
    ("requirement", "lowest"), [("lark>=1.3", "lark==1.3"), ("nnsight>=0.8.1,<0.9", "nnsight==0.8.1")]
)
def test_the_lowest_is_read_off_the_range(requirement: str, lowest: str) -> None:
    assert versions.lowest_of(requirement) == lowest


@pytest.mark.parametrize("requirement", ["lark", "lark<2"])
def test_a_range_without_a_lower_end_says_what_to_write(requirement: str) -> None:
    with pytest.raises(SystemExit, match=r"no lowest version to test; write 'lark>=\.\.\.'"):
        versions.lowest_of(requirement)


@pytest.mark.parametrize("fails", ["--upgrade pip>=25.1", "--group tests"])
@pytest.mark.skipif(shutil.which("make") is None, reason="no make on this machine")
def test_a_machine_without_the_newest_versions_fails_and_says_so(tmp_path: Path, fails: str) -> None:
    """Not passed by leaving the tests out: a make with a pip that cannot install."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "tests/versions.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(versions.ROOT / name, tmp_path / name)
    python = tmp_path / ".venv-newest" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(
        f"#!/bin/sh\ncase \"$*\" in *'{fails}'*) echo 'pip: no such version' >&2; exit 1;; *pytest*) touch tested;; "
        f'*versions.py*) exec {sys.executable} "$@";; esac\n'
    )
    python.chmod(0o755)
    done = subprocess.run(["make", "test-newest"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and not (tmp_path / "tested").exists()
    assert "pip: no such version" in done.stderr and "nothing was tested with" in done.stdout
