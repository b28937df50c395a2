"""Results as Zarr stores, for many millions of cells; the only file that imports zarr.

A store (Zarr v3) has the arrays of a table, a chunk for each prompt, so that one prompt is read without the others. All
that is text stands as JSON in its attributes. It is written under another name and renamed when it is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from nnsplice.errors import FileError, MissingPackage
from nnsplice.files import from_json
from nnsplice.results import files
from nnsplice.results.table import AXES, NAMED, Cell, Run, Table, settled
from nnsplice.stores import Store, store_of

if TYPE_CHECKING:
    import xarray as xr

KIND, FORMAT = "SweepResult", 1
#: Of the group: all that is text.
ATTRIBUTE = "nnsplice"
#: ... and of one that is being written, whose run that is.
RUN = "nnsplice run"
_DIMS = {
    "values": ("prompt", "cell"), "done": ("prompt", "cell"), "exists": ("prompt", "cell"), "clean": ("prompt",),
    "corrupted": ("prompt",), "counts": ("prompt", "cell"),
}  # fmt: skip


def write(path: str | os.PathLike[str], table: Table) -> None:
    """Write a table; the store takes its place when it is whole.

    Raises:
        FileError: there is something of that name, or the result has edges, which fit into one file.
    """
    zarr = needed()
    store = store_of(path)
    if store.folder.exists() if store.folder is not None else store.names():
        raise FileError(f"{store.address} exists", expected="a new name")
    if table.edges is not None or table.exact is not None:
        raise FileError("estimates of edges, and what was checked of them, go to a file", write="result.to_file(path)")
    told = {
        "kind": KIND, "format": FORMAT, "digest": files.digest(table), "run": files.told_of_run(table),
        **files.texts(table),
    }  # fmt: skip
    with _new(store) as place:
        group = zarr.create_group(place, zarr_format=3)
        for name in _DIMS:
            array = getattr(table, name)
            if array is not None:
                _array(group, name, array.shape, array.dtype)[...] = array
        group.attrs[ATTRIBUTE] = files.canonical(told)  # the last, as a store without it is none


class Growing:
    """A store whose prompts come one after the other, from any process, each written by one alone."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """A store that `begin` has made."""
        self._group: Any = needed().open_group(_place(store_of(path)), mode="r+")

    @classmethod
    def begin(cls, path: str | os.PathLike[str], exists: np.ndarray, metrics: int, run: str) -> None:
        """Make the arrays, unless the same run has.

        Args:
            path: a new folder, or an address of an object store.
            exists: `[prompt, cell]`, as of a table.
            metrics: how many there are; 0 for one without an axis of its own.
            run: a text that is the same for the same run alone.

        Raises:
            FileError: there is something of that name.
        """
        zarr, store = needed(), store_of(path)
        if store.has("zarr.json") and zarr.open_group(_place(store), mode="r").attrs.get(RUN) == run:
            return
        if store.names():
            raise FileError(f"{store.address} exists, and is of no run that could go on", expected="a new name")
        with _new(store) as place:
            group = zarr.create_group(place, zarr_format=3)
            several = (metrics,) if metrics else ()
            for name in ("values", "done", "exists"):
                is_values = name == "values"
                shape = (*exists.shape, *several) if is_values else exists.shape
                array = _array(group, name, shape, np.dtype("float64" if is_values else "bool"))
                if name == "exists":
                    array[...] = exists
            for name in ("clean", "corrupted"):
                _array(group, name, (len(exists), *several), np.dtype("float64"))
            group.attrs[RUN] = run

    def empty(self) -> tuple[np.ndarray, np.ndarray]:
        """Values and `done` of a prompt without any."""
        shape = self._group["values"].shape[1:]
        return np.full(shape, np.nan), np.zeros(shape[0], dtype=bool)

    def write(self, prompt: int, values: np.ndarray, done: np.ndarray) -> str:
        """Write the cells of a prompt, and return their checksum."""
        self._group["values"][prompt] = values
        self._group["done"][prompt] = done
        return row_sum(values, done)

    def finish(self, table: Table, sums: list[str]) -> None:
        """Write all that is not cells, which makes it a store that is read.

        Args:
            table: of which the values are not looked at.
            sums: of each prompt, as `write` returned them; empty for one that was not written.
        """
        for name in ("clean", "corrupted"):
            self._group[name][...] = getattr(table, name)
        told = {"kind": KIND, "format": FORMAT, "sums": sums, "run": files.told_of_run(table), **files.texts(table)}
        self._group.attrs[ATTRIBUTE] = files.canonical(told)


def row_sum(values: np.ndarray, done: np.ndarray) -> str:
    """A checksum of one prompt's cells."""
    return hashlib.sha256(np.ascontiguousarray(values).tobytes() + done.tobytes()).hexdigest()[:16]


def _array(group: Any, name: str, shape: tuple[int, ...], kind: np.dtype[Any]) -> Any:
    dims = _DIMS[name]
    several = ("metric",) if len(shape) > len(dims) else ()
    chunks = (1, *shape[1:]) if len(dims) > 1 else shape
    return group.create_array(
        name,
        shape=shape,
        dtype=kind,
        chunks=tuple(max(n, 1) for n in chunks),
        fill_value=np.nan if kind.kind == "f" else False,  # what is lost is no number
        dimension_names=(*dims, *several),
    )


@contextmanager
def _new(store: Store) -> Iterator[Any]:
    """Where a new store is written, which is there when the block ends well."""
    if store.folder is None:
        try:
            yield _place(store)  # nothing is renamed in an object store; a store is one when its attribute is there
        except BaseException:
            store.clear()
            raise
        return
    store.folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = store.folder.with_name(f".{store.folder.name}.{uuid.uuid4().hex}.part")
    try:
        yield temporary
        temporary.rename(store.folder)
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
        if "sums" in told:  # of a store that was written a prompt at a time
            rows = zip(table.values, table.done, told["sums"], strict=True)
            same = all((row_sum(values, done) == there) if there else not done.any() for values, done, there in rows)
        else:
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
    store = store_of(path)
    found = xr.open_zarr(_place(store), consolidated=False, chunks=None)
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
    zarr = needed()
    store = store_of(path)
    if not store.has("zarr.json"):
        raise FileError(f"{store.address} is no store of a result", expected="a store that SweepResult.to_zarr wrote")
    group = zarr.open_group(_place(store), mode="r")
    told = from_json(str(group.attrs.get(ATTRIBUTE, "null")), store.address)
    if not isinstance(told, dict) or told.get("kind") != KIND or told["format"] > FORMAT:
        raise FileError(
            f"{store.address} holds something else, is not finished, or was written by a newer nnsplice",
            expected="a store that SweepResult.to_zarr wrote",
        )
    return group, told


def _place(store: Store) -> Any:
    """A store as zarr takes it."""
    if store.folder is not None:
        return store.folder
    from zarr.storage import ObjectStore  # pyright: ignore[reportMissingImports]  (an extra)

    return ObjectStore(store.inner)


def needed() -> Any:
    """The package.

    Raises:
        MissingPackage: it is not installed.
    """
    try:
        import zarr  # pyright: ignore[reportMissingImports]  (an extra)
    except ImportError as error:
        raise MissingPackage("Zarr is not installed", write='pip install "nnsplice[zarr]"') from error
    return zarr
