"""Sweeps whose values go to a Zarr store, `out="....zarr"`: a chunk for each prompt, which one unit writes.

The run folder of the store `x.zarr` is `x.zarr.run`, with the claims and the outcomes of units without the values.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any, TypeGuard

import numpy as np

from nnsplice.errors import BadArgument
from nnsplice.results import zarr_files
from nnsplice.stores import store_of
from nnsplice.sweeps.jobs import Jobs
from nnsplice.sweeps.plan import Plan, Unit
from nnsplice.work import Arrays, RunFolder, UnitTask

_RUN = ".run"


def is_store(path: str | os.PathLike[str] | None) -> TypeGuard[str | os.PathLike[str]]:
    """Whether a path is a Zarr store."""
    return path is not None and os.fspath(path).rstrip("/").endswith(".zarr")


def folder_of(path: str | os.PathLike[str]) -> str:
    """The run folder of a store."""
    return f"{store_of(path).address}{_RUN}"


def store_beside(folder: RunFolder) -> str:
    """The store of a run folder."""
    return folder.address.removesuffix(_RUN)


def check_units(units: tuple[Unit, ...], plan: Plan) -> None:
    """Raise if a prompt is cut into several units, which would write the same chunk.

    Raises:
        BadArgument: the size of units that fits.
        MissingPackage: zarr is not installed.
    """
    zarr_files.needed()
    if cut := sorted({unit.prompts[0] for unit in units if unit.piece.start or unit.piece.stop is not None}):
        raise BadArgument(
            f"prompt {cut[0]} is cut into several units, and a chunk of a Zarr store is written by one",
            expected="units of whole prompts",
            write=f"size={math.ceil(plan.costs_of_prompts().max())}, or out= without .zarr",
        )


class StoredUnits:
    """Units that write their values to the store, before they count as done."""

    def __init__(self, units: UnitTask, folder: RunFolder) -> None:
        """Open the store."""
        self._units, self._store = units, zarr_files.Growing(store_beside(folder))

    def run(self, number: int) -> Arrays:
        """The outcome of a unit without the values of cells, with a checksum of each prompt's values instead."""
        found: Mapping[str, Any] = self._units.run(number)
        prompts = found["prompts"]
        runs, targets = Jobs.of_ranges(found["ranges"].tolist()).columns()
        sums: list[str] = []
        for row, prompt in enumerate(prompts):
            own = runs == row
            values, done = self._store.empty()
            values[targets[own]], done[targets[own]] = found["values"][own], True
            sums.append(self._store.write(int(prompt), values, done))
        kept = {name: array for name, array in found.items() if name not in ("values", "ranges")}
        return {**kept, "sums": np.frombuffer("".join(sums).encode(), dtype=np.uint8).reshape(len(prompts), -1)}
