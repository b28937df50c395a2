"""Results on disk: a safetensors file of the arrays, with all texts as JSON in its header.

Nothing is unpickled. Files are written atomically and hold their digest, so that any damage is found.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path as FilePath
from typing import Any

import numpy as np

from nnsplice.errors import BadType, FileError, NnspliceError, named
from nnsplice.files import from_json, is_pickle
from nnsplice.headers import read_header
from nnsplice.results.table import Cell, Run, Table, settled
from nnsplice.stores import opened, whole

HEADER = "nnsplice"
KIND = "SweepResult"
FORMAT = 1
WRITTEN = "a file that SweepResult.to_file wrote"

#: The number of fields of a cell that every file has: path, kind, indices and position.
_ALWAYS = 8
_ARRAYS = {"values": "F64", "done": "BOOL", "exists": "BOOL", "clean": "F64", "corrupted": "F64"}
#: Arrays of estimates, means by role, and parts of a sum.
_MORE = {"edges": "F64", "exact": "F64", "counts": "F64", "rest": "F64"}


def digest(table: Table) -> str:
    """A hash of the question and the values; the cost of the run is left out."""
    summed = hashlib.sha256(canonical(texts(table)).encode())
    for name, found in _arrays(table).items():
        if name in _MORE:
            summed.update(name.encode())
        summed.update(repr(found.shape).encode())
        summed.update(found.tobytes())
    return summed.hexdigest()


def _arrays(table: Table) -> dict[str, np.ndarray]:
    found = {name: getattr(table, name) for name in (*_ARRAYS, *_MORE)}
    return {name: np.ascontiguousarray(array) for name, array in found.items() if array is not None}


def canonical(value: Any) -> str:
    """Plain data as JSON with sorted keys: equal values have equal texts.

    Raises:
        BadType: the value is not plain data.
    """
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), default=_number)
    except (TypeError, ValueError) as error:
        raise BadType(
            f"what was asked of a sweep has to be plain data: {error}", expected="numbers, texts, lists, dictionaries"
        ) from None


def plain(value: Mapping[str, Any]) -> dict[str, Any]:
    """The value after a round trip through JSON: tuples become lists, and keys texts."""
    return json.loads(canonical(dict(value)))


def differences(
    there: Mapping[str, Any], here: Mapping[str, Any], names: tuple[str, str] = ("there", "here")
) -> list[str]:
    """A line for each key in which two questions differ."""
    a, b = plain(there), plain(here)
    return [
        f"{key}: {_short(a.get(key))} {names[0]}, {_short(b.get(key))} {names[1]}"
        for key in dict.fromkeys([*b, *a])
        if canonical(a.get(key)) != canonical(b.get(key))
    ]


def write(path: str | os.PathLike[str], table: Table) -> None:
    """Write a table, atomically."""
    from safetensors.numpy import save_file

    header = {
        "kind": KIND, "format": FORMAT, "version": version("nnsplice"), "digest": digest(table),
        "run": dataclasses.asdict(table.run), "labels": dict(table.labels), **texts(table),
    }  # fmt: skip
    arrays = _arrays(table)
    with whole(path) as temporary:
        save_file(arrays, temporary, metadata={HEADER: canonical(header)})


def read(path: str | os.PathLike[str]) -> Table:
    """Read a table.

    Raises:
        FileError: another file, or a damaged one.
    """
    with opened(path) as file:
        return _read(path, file.local)


def _read(path: str | os.PathLike[str], local: FilePath) -> Table:
    from safetensors import SafetensorError, safe_open

    if is_pickle(local):
        raise FileError(
            f"{path} looks like a pickle, which can run any code when it is opened; it is left closed",
            expected=WRITTEN,
        )
    try:
        header = _header(path, read_header(path, local=local).metadata)
        with safe_open(os.fspath(local), framework="np") as file:
            held = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 (no mapping)
            if held != {**_ARRAYS, **{name: kind for name, kind in _MORE.items() if name in held}}:
                raise FileError(f"{path} is damaged: it holds {held}", expected=WRITTEN)
            arrays = {name: file.get_tensor(name) for name in held}
        table = settled(
            Table(
                tuple(Cell(*row) for row in header["cells"]),
                **arrays,
                tokens=tuple(tuple(row) for row in header["tokens"]),
                asked=header["asked"],
                run=Run(**header["run"]),
                receivers=tuple(header.get("receivers", ())),
                metrics=tuple(header.get("metrics", ())),
                labels=header.get("labels", {}),
            )
        )
        same = digest(table) == header["digest"]
    except FileError:
        raise
    except (SafetensorError, NnspliceError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileError(f"{path} is damaged or no safetensors file: {error}", expected=WRITTEN) from None
    if not same:
        raise FileError(f"{path} is damaged: what it holds is not what was written", expected=WRITTEN)
    return table


def _header(path: str | os.PathLike[str], metadata: Mapping[str, str]) -> dict[str, Any]:
    header = from_json(metadata.get(HEADER, "null"), f"the header of {path}")
    kind = header.get("kind") if isinstance(header, dict) else None
    if kind != KIND:
        found = f"a {kind}" if isinstance(kind, str) else "a safetensors file of something else"
        raise FileError(f"{path} holds no result of a sweep, but {found}", expected=WRITTEN)
    if header["format"] > FORMAT:
        raise FileError(f"{path} has format {header['format']}; this nnsplice reads up to {FORMAT}")
    return header


def texts(table: Table) -> dict[str, Any]:
    """All texts of a table as plain data; with the arrays they are its identity."""
    # Tuples, as the field names of the cells would be most of the header.
    cells = [_short_row(dataclasses.astuple(cell)) for cell in table.cells]
    found: dict[str, Any] = {"asked": dict(table.asked), "cells": cells, "tokens": table.tokens}
    more = {"receivers": table.receivers, "metrics": table.metrics}
    return found | {name: value for name, value in more.items() if value}


def _short_row(row: tuple[Any, ...]) -> tuple[Any, ...]:
    """A cell's fields without trailing None: most cells have no role, set, key or feature."""
    stop = len(row)
    while stop > _ALWAYS and row[stop - 1] is None:
        stop -= 1
    return row[:stop]


def _number(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{value!r} is {named(value)}")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
