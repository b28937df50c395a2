"""Results as Zarr stores, for many millions of cells; the only file that imports zarr.

A store (Zarr v3) has the arrays of a table with a chunk for each prompt, so that one prompt can be read alone. All
texts are JSON in its attributes. It is written under a temporary name and renamed.
"""

from __future__ import annotations

import dataclasses
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
#: The attribute of the group that holds all texts.
ATTRIBUTE = "nnsplice"
#: The attribute of an incomplete store: the run that writes it.
RUN = "nnsplice run"
_DIMS = {
    "values": ("prompt", "cell"), "done": ("prompt", "cell"), "exists": ("prompt", "cell"), "clean": ("prompt",),
    "corrupted": ("prompt",), "counts": ("prompt", "cell"), "rest": ("prompt",),
}  # fmt: skip


def write(path: str | os.PathLike[str], table: Table) -> None:
    """Write a table, atomically.

    Raises:
        FileError: the path exists, or the result has edges, which go to a file.
    """
    zarr = needed()
    store = store_of(path)
    if store.folder.exists() if store.folder is not None else store.names():
        raise FileError(f"{store.address} exists", expected="a new name")
    if table.edges is not None or table.exact is not None:
        raise FileError("estimates of edges, and what was checked of them, go to a file", write="result.to_file(path)")
    with _new(store) as place:
        group = zarr.create_group(place, zarr_format=3)
        for name in _DIMS:
            array = getattr(table, name)
            if array is not None:
                _array(group, name, array.shape, array.dtype)[...] = array
        group.attrs[ATTRIBUTE] = _header(table, digest=files.digest(table))  # the last: it completes the store


class Growing:
    """A store whose prompts are written one by one, in any process; each prompt by one process."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """A store that `begin` has made."""
        self._group: Any = needed().open_group(_place(store_of(path)), mode="r+")

    @classmethod
    def begin(cls, path: str | os.PathLike[str], exists: np.ndarray, metrics: int, run: str) -> None:
        """Make the arrays, unless the same run already has.

        Args:
            path: a new folder, or an address of an object store.
            exists: `[prompt, cell]`, as in `Table`.
            metrics: the number of metrics; 0 for one metric without an axis.
            run: a text that identifies the run.

        Raises:
            FileError: the path exists.
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
        """Values and `done` of a prompt without measured cells."""
        shape = self._group["values"].shape[1:]
        return np.full(shape, np.nan), np.zeros(shape[0], dtype=bool)

    def write(self, prompt: int, values: np.ndarray, done: np.ndarray) -> str:
        """Write the cells of a prompt, and return their checksum."""
        self._group["values"][prompt] = values
        self._group["done"][prompt] = done
        return row_sum(values, done)

    def finish(self, table: Table, sums: list[str]) -> None:
        """Write everything but the cells, which completes the store.

        Args:
            table: the table; its values are not used.
            sums: the checksum of each prompt from `write`; empty for a prompt that was not written.
        """
        for name in ("clean", "corrupted"):
            self._group[name][...] = getattr(table, name)
        ends = row_sum(table.clean, table.corrupted)
        self._group.attrs[ATTRIBUTE] = _header(table, sums=sums, ends=ends)


def _header(table: Table, **sums: Any) -> str:
    run = dataclasses.asdict(table.run)
    return files.canonical({"kind": KIND, "format": FORMAT, "run": run, **sums, **files.texts(table)})


def row_sum(*arrays: np.ndarray) -> str:
    """A checksum of one prompt's cells, or of other arrays."""
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()[:16]


def _array(group: Any, name: str, shape: tuple[int, ...], kind: np.dtype[Any]) -> Any:
    dims = _DIMS[name]
    several = ("metric",) if len(shape) > len(dims) else ()
    chunks = (1, *shape[1:]) if len(dims) > 1 else shape
    return group.create_array(
        name,
        shape=shape,
        dtype=kind,
        chunks=tuple(max(n, 1) for n in chunks),
        fill_value=np.nan if kind.kind == "f" else False,  # a lost chunk reads as NaN
        dimension_names=(*dims, *several),
    )


@contextmanager
def _new(store: Store) -> Iterator[Any]:
    """The place to write a new store to; it is completed when the block ends without an error."""
    if store.folder is None:
        try:
            yield _place(store)  # an object store has no rename: the attribute marks a complete store
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
        FileError: it is no store of a result, or damaged.
    """
    group, header = _opened(path)
    try:
        arrays: dict[str, Any] = {name: np.asarray(group[name][...]) for name in _DIMS if name in group}
        table = settled(
            Table(
                tuple(Cell(*row) for row in header["cells"]), **arrays, tokens=tuple(map(tuple, header["tokens"])),
                asked=header["asked"], run=Run(**header["run"]), metrics=tuple(header.get("metrics", ())),
            )
        )  # fmt: skip
        if "sums" in header:  # the store was written prompt by prompt
            rows = zip(table.values, table.done, header["sums"], strict=True)
            same = all((row_sum(values, done) == there) if there else not done.any() for values, done, there in rows)
            ends = header.get("ends")  # older stores have none
            same = same and (ends is None or ends == row_sum(table.clean, table.corrupted))
        else:
            same = files.digest(table) == header["digest"]
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise FileError(f"{path} is damaged: {error}", expected="a store that SweepResult.to_zarr wrote") from None
    if not same:
        raise FileError(f"{path} is damaged: what it holds is not what was written")
    return table


def lazy(path: str | os.PathLike[str]) -> xr.Dataset:
    """The arrays of a store, read on access, with the fields of the cells as coordinates of the axis `cell`."""
    import xarray as xr

    _, header = _opened(path)
    store = store_of(path)
    found = xr.open_zarr(_place(store), consolidated=False, chunks=None)
    cells = [Cell(*row) for row in header["cells"]]
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
    if header.get("metrics"):
        coordinates["metric"] = list(header["metrics"])
    part = header["asked"].get("part")
    coordinates["prompt"] = part["prompts"] if part else np.arange(found.sizes["prompt"])
    return found.assign_coords(coordinates).assign_attrs(asked=json.dumps(header["asked"]))


def _opened(path: str | os.PathLike[str]) -> tuple[Any, dict[str, Any]]:
    zarr = needed()
    store = store_of(path)
    if not store.has("zarr.json"):
        raise FileError(f"{store.address} is no store of a result", expected="a store that SweepResult.to_zarr wrote")
    group = zarr.open_group(_place(store), mode="r")
    header = from_json(str(group.attrs.get(ATTRIBUTE, "null")), store.address)
    if not isinstance(header, dict) or header.get("kind") != KIND or header["format"] > FORMAT:
        raise FileError(
            f"{store.address} holds something else, is not finished, or was written by a newer nnsplice",
            expected="a store that SweepResult.to_zarr wrote",
        )
    return group, header


def _place(store: Store) -> Any:
    """A store as zarr's argument."""
    if store.folder is not None:
        return store.folder
    from zarr.storage import ObjectStore  # pyright: ignore[reportMissingImports]  (an extra)

    return ObjectStore(store.inner)


def needed() -> Any:
    """The module zarr.

    Raises:
        MissingPackage: it is not installed.
    """
    try:
        import zarr  # pyright: ignore[reportMissingImports]  (an extra)
    except ImportError as error:
        raise MissingPackage("Zarr is not installed", write='pip install "nnsplice[zarr]"') from error
    return zarr
