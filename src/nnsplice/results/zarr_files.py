"""Results as Zarr stores, for many millions of cells; the only file that imports zarr.

A store (Zarr v3) has the arrays of a table, a chunk for each prompt, so that one prompt is read without the others. All
that is text stands as JSON in its attributes. It is written under another name and renamed when it is whole.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from typing import TYPE_CHECKING, Any

import numpy as np

from nnsplice.errors import FileError, MissingPackage
from nnsplice.files import from_json, local_folder
from nnsplice.results import files
from nnsplice.results.table import AXES, NAMED, Cell, Run, Table, settled

if TYPE_CHECKING:
    import xarray as xr

KIND, FORMAT = "SweepResult", 1
_DIMS = {
    "values": ("prompt", "cell"), "done": ("prompt", "cell"), "exists": ("prompt", "cell"), "clean": ("prompt",),
    "corrupted": ("prompt",), "counts": ("prompt", "cell"),
}  # fmt: skip


def write(path: str | os.PathLike[str], table: Table) -> None:
    """Write a table; the store takes its place when it is whole.

    Raises:
        FileError: there is something of that name, or the result has edges, which fit into one file.
    """
    zarr = _zarr()
    target = local_folder(path)
    if target.exists():
        raise FileError(f"{target} exists", expected="a new name")
    if table.edges is not None or table.exact is not None:
        raise FileError("estimates of edges, and what was checked of them, go to a file", write="result.to_file(path)")
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.part")
    try:
        group = zarr.create_group(temporary, zarr_format=3)
        for name, dims in _DIMS.items():
            array = getattr(table, name)
            if array is None:
                continue
            several = ("metric",) if array.ndim > len(dims) else ()
            chunks = (1, *array.shape[1:]) if len(dims) > 1 else array.shape
            new = group.create_array(
                name,
                shape=array.shape,
                dtype=array.dtype,
                chunks=tuple(max(n, 1) for n in chunks),
                fill_value=np.nan if array.dtype.kind == "f" else False,  # what is lost is no number
                dimension_names=(*dims, *several),
            )
            new[...] = array
        told = {
            "kind": KIND, "format": FORMAT, "digest": files.digest(table), "run": files.told_of_run(table),
            **files.texts(table),
        }  # fmt: skip
        group.attrs["nnsplice"] = files.canonical(told)
        temporary.rename(target)
    finally:
        if temporary.exists():
            shutil.rmtree(temporary)


def read(path: str | os.PathLike[str]) -> Table:
    """Read a whole table.

    Raises:
        FileError: no store of a result, or a damaged one.
    """
    group, told = _opened(path)
    try:
        arrays: dict[str, Any] = {name: np.asarray(group[name][...]) for name in _DIMS if name in group}
        table = settled(
            Table(
                tuple(Cell(*row) for row in told["cells"]), **arrays, tokens=tuple(map(tuple, told["tokens"])),
                asked=told["asked"], run=Run(**told["run"]), metrics=tuple(told.get("metrics", ())),
            )
        )  # fmt: skip
        same = files.digest(table) == told["digest"]
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise FileError(f"{path} is damaged: {error}", expected="a store that SweepResult.to_zarr wrote") from None
    if not same:
        raise FileError(f"{path} is damaged: what it holds is not what was written")
    return table


def lazy(path: str | os.PathLike[str]) -> xr.Dataset:
    """The arrays of a store, read when they are asked for, with what each cell is along the axis `cell`."""
    import xarray as xr

    _, told = _opened(path)
    found = xr.open_zarr(local_folder(path), consolidated=False, chunks=None)
    cells = [Cell(*row) for row in told["cells"]]
    coordinates: dict[str, Any] = {"path": ("cell", [cell.path for cell in cells])}
    coordinates["component"] = ("cell", [cell.component for cell in cells])
    for axis in (*AXES, *NAMED):
        each = [getattr(cell, axis) for cell in cells]
        if any(value is not None for value in each):
            numbers = all(isinstance(value, int) for value in each if value is not None)
            column = (
                [np.nan if v is None else v for v in each] if numbers else ["" if v is None else str(v) for v in each]
            )
            coordinates[axis] = ("cell", np.array(column))
    if told.get("metrics"):
        coordinates["metric"] = list(told["metrics"])
    part = told["asked"].get("part")
    coordinates["prompt"] = part["prompts"] if part else np.arange(found.sizes["prompt"])
    return found.assign_coords(coordinates).assign_attrs(asked=json.dumps(told["asked"]))


def _opened(path: str | os.PathLike[str]) -> tuple[Any, dict[str, Any]]:
    zarr = _zarr()
    folder = local_folder(path)
    if not (folder / "zarr.json").is_file():
        raise FileError(f"{folder} is no store of a result", expected="a store that SweepResult.to_zarr wrote")
    group = zarr.open_group(folder, mode="r")
    told = from_json(str(group.attrs.get("nnsplice", "null")), folder)
    if not isinstance(told, dict) or told.get("kind") != KIND or told["format"] > FORMAT:
        raise FileError(f"{folder} holds something else, or was written by a newer nnsplice")
    return group, told


def _zarr() -> Any:
    try:
        import zarr  # pyright: ignore[reportMissingImports]  (an extra)
    except ImportError as error:
        raise MissingPackage("Zarr is not installed", write='pip install "nnsplice[zarr]"') from error
    return zarr
