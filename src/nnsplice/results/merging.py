"""Merging parts of one sweep."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from nnsplice.errors import BadArgument, KeyMismatch
from nnsplice.results import files
from nnsplice.results.parts import PART, common, joined
from nnsplice.results.table import Run, Table

#: The tolerance between the metrics of two unedited runs of one prompt, relative to the largest.
ROUNDING = 5e-2
SHARDS = "the results of one plan's shards"


def merge(tables: Sequence[Table]) -> Table:
    """One table with the cells of all; a cell of several tables must have the same value in all."""
    if not tables:
        raise BadArgument("nothing to merge", expected=SHARDS)
    if any(PART in table.asked for table in tables):
        tables = _spread(tables)
    first = tables[0]
    values, done = first.values.copy(), first.done.copy()
    for number, other in enumerate(tables[1:], 1):
        _check_same(first, other, number)
        both = done & other.done
        unlike = (values != other.values) & ~(np.isnan(values) & np.isnan(other.values))
        differ = both & (unlike.any(-1) if unlike.ndim > 2 else unlike)
        if differ.any():
            prompt, cell = (int(found[0]) for found in np.nonzero(differ))
            raise KeyMismatch(
                f"prompt {first.prompts[prompt]} was measured differently: "
                f"{values[prompt, cell].tolist()!r}, and {other.values[prompt, cell].tolist()!r} in result {number}",
                path=first.cells[cell].path,
                expected="shards that agree exactly where they overlap",
            )
        new = other.done & ~done
        values[new] = other.values[new]
        done |= new
    return replace(first, values=values, done=done, run=together([table.run for table in tables]))


def _spread(tables: Sequence[Table]) -> list[Table]:
    """The tables of parts, each extended to the prompts of all parts."""
    for number, other in enumerate(tables):
        if PART not in other.asked or files.differences(common(tables[0].asked), common(other.asked)):
            names = ("in result 0", f"in result {number}")
            lines = files.differences(common(tables[0].asked), common(other.asked), names)
            raise KeyMismatch(
                "\n  ".join(["these are no parts of one sweep", *lines]), expected="results of parts of one plan"
            )
    asked = joined([table.asked for table in tables])
    numbers = sorted({number for table in tables for number in table.prompts.tolist()})
    place = {number: at for at, number in enumerate(numbers)}
    unedited = {name: np.full((len(numbers), *tables[0].clean.shape[1:]), np.nan) for name in ("clean", "corrupted")}
    exists = np.zeros((len(numbers), len(tables[0].cells)), dtype=bool)
    for at, table in enumerate(tables):
        rows = np.array([place[number] for number in table.prompts.tolist()])
        for name, whole in unedited.items():
            there, new = whole[rows], getattr(table, name)
            known = ~np.isnan(there)
            if there[known].shape and not _same(name, there[known], new[known]):
                raise KeyMismatch(
                    f"result {at} has other values of {name} than those before it, so their runs were not the same",
                    expected=SHARDS,
                )
            whole[rows] = np.where(known, there, new)  # of a prompt in several parts, the value of the first
        exists[rows] |= table.exists
    words = {key: text for table in tables for key, text in table.labels.get("words", {}).items()}
    clean = _each(tables, numbers, lambda table: table.labels.get("clean", ()))
    more = {
        **unedited, "asked": asked, "tokens": tuple(_each(tables, numbers, lambda table: table.tokens)),
        "labels": {"words": words, **({"clean": clean} if clean else {})},
    }  # fmt: skip
    return [_extended(table, place, exists, more) for table in tables]


def _each(tables: Sequence[Table], numbers: Sequence[int], rows_of: Callable[[Table], Sequence[Any]]) -> list[Any]:
    """What the parts have for each of these prompts; empty where some have nothing."""
    found = {n: row for table in tables for n, row in zip(table.prompts.tolist(), rows_of(table), strict=False)}
    return [found[number] for number in numbers] if len(found) == len(numbers) else []


def _extended(
    table: Table,
    place: Mapping[int, int],
    exists: np.ndarray,
    more: Mapping[str, Any],
) -> Table:
    """The table with its prompts at these rows of a larger one, which has these other fields."""
    rows = np.array([place[number] for number in table.prompts.tolist()])
    if any(array is not None for array in (table.edges, table.exact, table.counts, table.rest)):
        raise BadArgument("parts with edges, checked estimates or roles", expected="parts as they were run")
    if (exists[rows] != table.exists).any():
        raise KeyMismatch("two parts have other cells of one prompt", expected=SHARDS)
    values, done = np.full((len(exists), *table.values.shape[1:]), np.nan), np.zeros(exists.shape, dtype=bool)
    values[rows], done[rows] = table.values, table.done
    return replace(table, values=values, done=done, exists=exists, **more)


def _check_same(first: Table, other: Table, number: int) -> None:
    names = ("in result 0", f"in result {number}")
    if different := files.differences(first.asked, other.asked, names):
        keys = ", ".join(line.partition(":")[0] for line in different)
        lines = [f"these are results of different sweeps: {keys} differ", *(f"  {line}" for line in different)]
        raise KeyMismatch("\n".join(lines), expected=SHARDS)
    for name in ("cells", "tokens", "receivers", "metrics"):
        if getattr(first, name) != getattr(other, name):
            raise KeyMismatch(f"these results have different {name}: result {number} and result 0", expected=SHARDS)
    for name in ("clean", "corrupted", "exists", "edges", "exact", "counts", "rest"):
        a, b = getattr(first, name), getattr(other, name)
        if a is None and b is None:
            continue
        if a is None or b is None or not _same(name, a, b):
            raise KeyMismatch(
                f"result {number} has other values of {name} than result 0, so their runs were not the same",
                expected=SHARDS,
            )


def _same(name: str, a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two results agree; unedited runs are repeated in each, and may round differently in other batches."""
    if name not in ("clean", "corrupted") or a.shape != b.shape:
        return np.array_equal(a, b, equal_nan=name != "exists")
    return agree(a, b)


def agree(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether the metrics of two unedited runs of the same prompts are equal up to rounding in any precision."""
    sizes = np.abs([a, b])
    largest = float(sizes.max(initial=0, where=np.isfinite(sizes)))
    return bool(np.isclose(a, b, rtol=ROUNDING, atol=ROUNDING * largest).all())


def together(runs: Sequence[Run]) -> Run:
    """The cost of several runs."""
    return Run(
        executor=", ".join(dict.fromkeys(run.executor for run in runs if run.executor)),
        seconds=sum(run.seconds for run in runs),
        forwards=sum(run.forwards for run in runs),
        block_calls=sum(run.block_calls for run in runs),
        tokens=sum(run.tokens for run in runs),
        flops=sum(run.flops for run in runs),
        known=sum(run.known for run in runs),
        gate=sum(run.gate for run in runs),
        note="; ".join(dict.fromkeys(run.note for run in runs if run.note)),
    )
