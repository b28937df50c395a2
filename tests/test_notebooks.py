"""Every notebook runs from top to bottom in a fresh kernel."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from real.pretrained import document

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


def test_there_are_notebooks():
    assert list(NOTEBOOKS.glob("*.ipynb")), f"no notebook in {NOTEBOOKS}, so none was tested"


def test_notebooks_of_pretrained_models_are_known_by_what_they_load():
    assert {case.id for case in map(document, NOTEBOOKS.glob("*.ipynb")) if case.marks} == {
        "alignment", "ioi", "lens", "rome", "steering_chat", "ten_minutes"
    }  # fmt: skip


@pytest.mark.parametrize("path", [document(path) for path in sorted(NOTEBOOKS.glob("*.ipynb"))])
def test_runs(path, tmp_path, monkeypatch):
    monkeypatch.delenv("MPLBACKEND", raising=False)  # figures go where they go for a reader: below the cell
    notebook = nbformat.read(path, as_version=4)
    # In an empty folder: a notebook that wants a file of this repository would not run for a reader.
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
