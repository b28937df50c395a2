"""Checkpoints in folders, written and read whole, for the tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from nnsplice import checkpoints as ck

KB = 1 / 1024**2  # in the gigabytes of shard_size_gb


def read(folder: Path, mapper: ck.ModelStateMapper | None = None) -> dict[str, Tensor]:
    mapper = mapper or ck.Parallel([ck.Identity(name) for name in ck.Checkpoint.open(folder)])
    return dict(ck.read_model_state(folder, mapper, "cpu", show_progress=False))


def write(folder: Path, state: dict[str, Tensor], shard_size_gb: float = 4.0, **options) -> Path:
    mapper = ck.Parallel([ck.Identity(name) for name in state])
    ck.write_model_state_local(folder, mapper, state.items(), shard_size_gb, show_progress=False, **options)
    return folder


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def index(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "model.safetensors.index.json").read_text())
