"""Pretrained models of packages, loaded once for all tests of a process; without the package a test is skipped."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest

import nnsplice as ns
from nnsplice.models import published


def pretrained(name: str, **options: Any) -> Any:
    """The model of this name."""
    pytest.importorskip("gguf")
    if published.installed(name) is None:
        model = published.published(name)
        pytest.skip(f"{model.title} is not installed: nnsplice fetch {name} ({model.megabytes} MB, {model.licence})")
    return _loaded(name, tuple(sorted(options.items())))


@cache
def _loaded(name: str, options: tuple[tuple[str, Any], ...]) -> Any:
    return ns.load(name, **dict(options))


def document(path: Path) -> Any:
    """A notebook or script as a test's parameter, with what it needs: those of a pretrained model run where it is."""
    asked = 'ns.load("smollm2"' in path.read_text(encoding="utf-8").replace("\\", "")
    missing = pytest.mark.skipif(published.installed("smollm2") is None, reason="no weights of SmolLM2: make real")
    return pytest.param(path, id=path.stem, marks=[pytest.mark.real, missing] if asked else [])
