"""The data of a result as plain arrays: one value for each prompt and cell."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from nnsplice.errors import BadArgument
from nnsplice.results.parts import numbers_of
from nnsplice.shown import counted

#: The axes of a grid, after `prompt`: the indices of a cell.
AXES = ("layer", "head", "group", "neuron", "expert", "feature")
#: The axes after these: the tokens that were changed, by position or role.
OF_TOKENS = ("position", "key", "role")
#: ... and the axis of sets, which have no other.
NAMED = (*OF_TOKENS, "set")
#: The kind of site of a set.
SETS = "sets"


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell of a sweep: a site at some tokens.

    Attributes:
        path: the address with its position: `layers[3].heads[1].output[7]`.
        component: the kind of site: `layers[:].heads[:].output`.
        layer: the layer.
        head: the head.
        group: the key/value group.
        neuron: the neuron.
        expert: the expert.
        position: a token, a span (`"subject"[-1]`), or None for all tokens at once.
        role: the role of its tokens (`"subject last"`), in results by role.
        set: the addresses of a set, joined by ` + `.
        key: the key of an edge of attention; `position` is the query.
        feature: the feature of an SAE.
    """

    path: str
    component: str
    layer: int | None = None
    head: int | None = None
    group: int | None = None
    neuron: int | None = None
    expert: int | None = None
    position: int | str | None = None
    role: str | None = None
    set: str | None = None
    key: int | str | None = None
    feature: int | None = None


@dataclass(frozen=True, slots=True)
class Run:
    """The cost of a run, which is no part of a result's identity.

    Attributes:
        executor: the executor.
        seconds: wall-clock time.
        forwards: full forward passes, with those of the unedited runs.
        block_calls: calls of single blocks.
        tokens: tokens that went through a block, counted at each block.
        flops: operations of products with weight matrices; attention scores are not counted.
        known: cells whose value was known without a run.
        gate: forward passes of a 4-token prompt that checked the model's sites, at its first use.
        note: the reason for another executor than the fastest.
    """

    executor: str = ""
    seconds: float = 0.0
    forwards: int = 0
    block_calls: int = 0
    tokens: int = 0
    flops: float = 0.0
    known: int = 0
    gate: float = 0.0
    note: str = ""


@dataclass(frozen=True, eq=False)
class Table:
    """The measured values, and the metric of the clean and corrupted runs."""

    cells: tuple[Cell, ...]
    #: `[prompt, cell]`, float64; NaN where a prompt has no such cell, or it was not measured.
    values: np.ndarray
    #: `[prompt, cell]`: measured, or known without a run. A shard of a sweep has some of the cells.
    done: np.ndarray
    #: `[prompt, cell]`: whether the prompt has such a cell; a shorter prompt lacks the last positions.
    exists: np.ndarray
    #: `[prompt]`: the metric of the clean and of the corrupted run.
    clean: np.ndarray
    corrupted: np.ndarray
    #: The texts of each prompt's tokens, as the positions count them.
    tokens: tuple[tuple[str, ...], ...] = ()
    #: The question: model, prompts, sites, metric, operation, seed; plain data, the identity of the sweep.
    asked: Mapping[str, Any] = field(default_factory=dict)
    run: Run = field(default_factory=Run)
    #: `[prompt, cell, receiver]`: the change of the metric if the cell's change reached this receiver only; NaN where
    #: it cannot. And the receivers' paths.
    edges: np.ndarray | None = None
    receivers: tuple[str, ...] = ()
    #: The exact metric of verified estimates, shaped like the edges if there are some, else like the values; NaN where
    #: nothing was verified.
    exact: np.ndarray | None = None
    #: The names of several metrics; `values`, `clean` and `corrupted` then have a last axis of them.
    metrics: tuple[str, ...] = ()
    #: `[prompt, cell]`: the number of tokens averaged in a value, where cells are roles.
    counts: np.ndarray | None = None
    #: `[prompt]`: the rest of a sum whose other parts are the cells; together they are the clean run's metric.
    rest: np.ndarray | None = None

    @property
    def prompts(self) -> np.ndarray:
        """`[prompt]`: the numbers of the prompts; of a part, its numbers in the whole."""
        numbers = numbers_of(self.asked)
        return np.arange(len(self.clean)) if numbers is None else np.array(numbers)

    #: Labels for figures and pages, not part of the identity: `words`, the texts of the metric's token ids, and
    #: `clean`, the tokens of each clean prompt.
    labels: Mapping[str, Any] = field(default_factory=dict)


def settled(table: Table) -> Table:
    """A read-only copy, with NaN for everything that was not measured.

    Raises:
        BadArgument: the shapes of the arrays do not match.
    """
    several = (len(table.metrics),) if table.metrics else ()
    clean, corrupted = (_ends(getattr(table, name), name, several) for name in ("clean", "corrupted"))
    prompts, cells = len(clean), tuple(table.cells)
    expected = {
        "corrupted": (prompts, *several),
        "values": (prompts, len(cells), *several),
        **dict.fromkeys(("done", "exists"), (prompts, len(cells))),
    }
    for name, shape in expected.items():
        found = np.shape(getattr(table, name))
        if found != shape:
            raise BadArgument(
                f"{name} has shape {list(found)}, for {counted(prompts, 'prompt')} and {counted(len(cells), 'cell')}",
                expected=f"{list(shape)}",
            )
    scored = (prompts, len(cells)) if table.edges is None else (prompts, len(cells), len(table.receivers))
    for name in ("edges", "exact"):
        found = getattr(table, name)
        if found is not None and np.shape(found) != scored:
            raise BadArgument(f"{name} has shape {list(np.shape(found))}", expected=f"{list(scored)}")
    if table.counts is not None and np.shape(table.counts) != (prompts, len(cells)):
        raise BadArgument(f"counts has shape {list(np.shape(table.counts))}", expected=f"{[prompts, len(cells)]}")
    if table.tokens and len(table.tokens) != prompts:
        raise BadArgument(f"the tokens are of {len(table.tokens)} prompts, the values of {prompts}")
    if table.rest is not None and np.shape(table.rest) != (prompts,):
        raise BadArgument(f"rest has shape {list(np.shape(table.rest))}", expected=f"{[prompts]}")
    numbers = numbers_of(table.asked)
    if numbers is not None and len(numbers) != prompts:
        raise BadArgument(f"the part is of {len(numbers)} prompts, the values of {prompts}")
    exists = np.array(table.exists, dtype=bool)
    done = np.array(table.done, dtype=bool) & exists
    # NaN has many bit patterns; one of them is used, as digests are of bits.
    values = np.where(done[..., None] if several else done, np.asarray(table.values, dtype=np.float64), np.nan)
    values[np.isnan(values)] = np.nan
    edges, exact, counts, rest = (
        None if a is None else np.array(a, dtype=np.float64)
        for a in (table.edges, table.exact, table.counts, table.rest)
    )
    for array in (values, done, exists, clean, corrupted, edges, exact, counts, rest):
        if array is not None:
            array.setflags(write=False)
    return replace(
        table, cells=cells, values=values, done=done, exists=exists, clean=clean, corrupted=corrupted,
        tokens=tuple(tuple(row) for row in table.tokens), asked=copy.deepcopy(dict(table.asked)),
        edges=edges, exact=exact, counts=counts, rest=rest, receivers=tuple(table.receivers),
        metrics=tuple(table.metrics),
    )  # fmt: skip


def _ends(values: np.ndarray, name: str, several: tuple[int, ...]) -> np.ndarray:
    array = np.array(values, dtype=np.float64)
    if array.ndim != 1 + len(several) or array.shape[1:] != several:
        raise BadArgument(
            f"{name} has shape {list(array.shape)}",
            expected="one number for each prompt" + (" and metric" if several else ""),
        )
    return array
