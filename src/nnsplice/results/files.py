"""Results on disk: a safetensors file of the arrays, and all that is text as JSON in its header.

Nothing is ever unpickled. A file is written under another name and renamed when it is whole, and it holds its own
digest, so that damage to a number is found as surely as damage to the form.
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

#: Fields of a cell that stand in every file: its path, its kind, its numbers and its position.
_ALWAYS = 8
_ARRAYS = {"values": "F64", "done": "BOOL", "exists": "BOOL", "clean": "F64", "corrupted": "F64"}
#: What only estimates, means by role, and parts of a sum have.
_MORE = {"edges": "F64", "exact": "F64", "counts": "F64", "rest": "F64"}


def digest(table: Table) -> str:
    """What was asked and what was measured, as one number; what running cost is left out."""
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
    """One text for equal values: plain data as JSON, its keys in order.

    Raises:
        BadType: what was asked is not plain data.
    """
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), default=_number)
    except (TypeError, ValueError) as error:
        raise BadType(
            f"what was asked of a sweep has to be plain data: {error}", expected="numbers, texts, lists, dictionaries"
        ) from None


def plain(value: Mapping[str, Any]) -> dict[str, Any]:
    """The value as JSON gives it back: tuples are lists there, and every key a text."""
    return json.loads(canonical(dict(value)))


def differences(
    there: Mapping[str, Any], here: Mapping[str, Any], names: tuple[str, str] = ("there", "here")
) -> list[str]:
    """A line for each key in which two asks differ."""
    a, b = plain(there), plain(here)
    return [
        f"{key}: {_short(a.get(key))} {names[0]}, {_short(b.get(key))} {names[1]}"
        for key in dict.fromkeys([*b, *a])
        if canonical(a.get(key)) != canonical(b.get(key))
    ]


def write(path: str | os.PathLike[str], table: Table) -> None:
    """Write a table: the whole of it, or nothing, and then the file that was there stays."""
    from safetensors.numpy import save_file

    header = {
        "kind": KIND, "format": FORMAT, "version": version("nnsplice"), "digest": digest(table),
        "run": told_of_run(table), "labels": dict(table.labels), **texts(table),
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
    """All that is text in a table, as plain data; its identity with the arrays."""
    # Rows and not dictionaries: the names of a cell's fields would be most of the header.
    rows = (dataclasses.astuple(cell) for cell in table.cells)
    cells = [_short_row(row) for row in rows]
    told: dict[str, Any] = {"asked": dict(table.asked), "cells": cells, "tokens": table.tokens}
    more = {"receivers": table.receivers, "metrics": table.metrics}
    return told | {name: value for name, value in more.items() if value}


def told_of_run(table: Table) -> dict[str, Any]:
    """What running cost, as plain data."""
    return dataclasses.asdict(table.run)


def _short_row(row: tuple[Any, ...]) -> tuple[Any, ...]:
    """Without what it lacks at its end: most cells have no role, and are no set and no edge."""
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
