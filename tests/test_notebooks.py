"""Every notebook runs from top to bottom in a fresh kernel."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


def test_there_are_notebooks():
    assert list(NOTEBOOKS.glob("*.ipynb")), f"no notebook in {NOTEBOOKS}, so none was tested"


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_runs(path, tmp_path, monkeypatch):
    monkeypatch.delenv("MPLBACKEND", raising=False)  # figures go where they go for a reader: below the cell
    notebook = nbformat.read(path, as_version=4)
    # In an empty folder: a notebook that wants a file of this repository would not run for a reader.
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
