"""Every example runs as a reader would run it, and has something to show."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from real.pretrained import document

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_there_are_examples():
    assert list(EXAMPLES.glob("*.py")), f"no example in {EXAMPLES}, so none was tested"


def test_examples_with_a_pretrained_model_are_known_by_what_they_load():
    assert {case.id for case in map(document, EXAMPLES.glob("*.py")) if case.marks} == {"02_causal_tracing"}


@pytest.mark.parametrize("path", [document(path) for path in sorted(EXAMPLES.glob("*.py"))])
def test_runs(path, tmp_path):
    # In an empty folder, where it may write what it likes.
    run = subprocess.run([sys.executable, str(path)], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, f"{path.name} failed\n{run.stdout}\n{run.stderr}"
    assert run.stdout.strip(), f"{path.name} printed nothing"


def test_the_demo_shows_its_table_without_matplotlib(tmp_path):
    demo = EXAMPLES / "demo.py"
    script = f"import runpy, sys; sys.modules['matplotlib'] = None; runpy.run_path({str(demo)!r}, run_name='__main__')"
    run = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert "Bridge" in run.stdout and 'pip install "nnsplice[plots]"' in run.stdout
    assert not list(tmp_path.iterdir())
