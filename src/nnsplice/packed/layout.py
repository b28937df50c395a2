"""Index maps between packed tokens, prompt positions and recorded tokens.

Recorded tokens are kept flat, prompt after prompt, so that prompts of different length need no padding. A pack is flat
too. Attention sees both as one long list, recorded tokens first, and a row of it is a list of numbers into that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from nnsplice.packed.indices import DeviceIndex, Indices
from nnsplice.packed.rows import PreparedRow

#: The number of a row and a position -> the index of that token; None where it does not run.
Find = Callable[[int, int], int | None]


@dataclass(frozen=True)
class RowColumns:
    """The numbers of all rows that layouts are made of, as arrays: `[row]`."""

    start: np.ndarray
    last: np.ndarray
    base: np.ndarray
    prompt: np.ndarray

    @classmethod
    def of(cls, rows: Sequence[PreparedRow]) -> RowColumns:
        """Of these rows, in their order."""
        table = np.array([(row.start, row.last, row.base, row.prompt) for row in rows], int).reshape(-1, 4)
        return cls(*table.T)


@dataclass(frozen=True)
class PackLayout:
    """Which tokens stand side by side in one call of a block.

    Attributes:
        rows: all rows of the run; the others name them by their numbers.
        full: rows with every token from their first changed one to the last that is wanted.
        partial: rows with their changed tokens only, which attend to nothing but recorded tokens.
        shared: the columns of all rows, where several layouts share them.
    """

    rows: Sequence[PreparedRow]
    full: Sequence[int]
    partial: Sequence[int] = ()
    shared: RowColumns | None = None

    @cached_property
    def columns(self) -> RowColumns:
        """The numbers of all rows."""
        return self.shared or RowColumns.of(self.rows)

    @cached_property
    def _sizes(self) -> np.ndarray:
        """How many tokens each row has: the full ones, then the partial ones."""
        full = np.asarray(self.full, int)
        partial = [len(self.rows[n].changed) for n in self.partial]
        return np.concatenate([self.columns.last[full] + 1 - self.columns.start[full], np.array(partial, int)])

    @cached_property
    def _begins(self) -> np.ndarray:
        """Where each row's first token stands in the pack, in the same order."""
        return np.cumsum(self._sizes) - self._sizes

    @cached_property
    def offsets(self) -> dict[int, int]:
        """Row -> where its first token stands in the pack."""
        return dict(zip((*self.full, *self.partial), self._begins.tolist(), strict=True))

    @cached_property
    def positions(self) -> np.ndarray:
        """`[token]`, the position of every packed token in its prompt."""
        full = len(self.full)
        sizes, begins = self._sizes[:full], self._begins[:full]
        first = self.columns.start[np.asarray(self.full, int)] - begins
        return np.concatenate(
            [np.repeat(first, sizes) + np.arange(sizes.sum()), *(np.array(self.rows[n].changed) for n in self.partial)]
        )

    @cached_property
    def recorded(self) -> np.ndarray:
        """`[token]`, the number of every packed token among the recorded ones."""
        rows = np.array([*self.full, *self.partial], int)
        return self.positions + np.repeat(self.columns.base[rows], self._sizes)

    @cached_property
    def size(self) -> int:
        """How many tokens there are."""
        return len(self.positions)

    def find(self, number: int, position: int) -> int | None:
        """Where a row's token stands in the pack; None where it does not."""
        row = self.rows[number]
        if number in self._partial_rows:
            return self.offsets[number] + row.changed.index(position) if position in row.changed else None
        return self.offsets[number] + position - row.start if row.start <= position <= row.last else None

    @cached_property
    def _partial_rows(self) -> frozenset[int]:
        return frozenset(self.partial)

    def ends(self) -> np.ndarray:
        """Where the last token stands in the pack, of every full row."""
        return (self._begins + self._sizes)[: len(self.full)] - 1

    def groups(self, total: int, bucket: int, indices: Indices, *, last_only: bool = False) -> list[AttentionGroup]:
        """Rows that attend together.

        Args:
            total: how many recorded tokens there are.
            bucket: numbers of queries and keys are rounded up to a multiple of this, and rows that are then alike share
                a call: 1 for no padding at all.
            indices: what takes the numbers of tokens to the device.
            last_only: the pack holds the last token of each row only; keys and values are those of this layout.
        """
        numbers, of = np.asarray(self.full, int), self.columns
        start, last, base, prompt = (c[numbers] for c in (of.start, of.last, of.base, of.prompt))
        counts = np.ones_like(start) if last_only else round_up(last + 1 - start, bucket)
        shapes, kinds = np.unique(np.stack([counts, round_up(last + 1, bucket)], 1), axis=0, return_inverse=True)
        groups = []
        for kind, (queries, keys) in enumerate(shapes.tolist()):
            members = np.flatnonzero(kinds.ravel() == kind)
            first, end, offset = (each[members, None] for each in (start, last, self._begins[: len(numbers)]))
            at = np.minimum(np.arange(keys), end)
            sources = np.where(at < first, base[members, None] + at, total + offset + at - first)
            positions = end if last_only else np.minimum(first + np.arange(queries), end)
            where = members[:, None] if last_only else offset + positions - first
            groups.append(AttentionGroup.of(where, sources, positions, prompt[members], indices))
        return groups + self._partial_groups(indices, last_only)

    def _partial_groups(self, indices: Indices, last_only: bool) -> list[AttentionGroup]:
        """Rows of changed tokens only: all queries of one prompt share its keys, in one call."""
        prompts: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for order, n in enumerate(self.partial):
            row = self.rows[n]
            tokens = [(len(self.full) + order, row.last)] if last_only else enumerate(row.changed, self.offsets[n])
            prompts.setdefault((row.base, row.prompt), []).extend(tokens)
        groups = []
        for (base, prompt), members in prompts.items():
            where, positions = (np.array(column)[None] for column in zip(*members, strict=True))
            keys = base + np.arange(positions.max() + 1)[None]
            groups.append(AttentionGroup.of(where, keys, positions, np.array([prompt]), indices))
        return groups


def round_up(numbers: np.ndarray, bucket: int) -> np.ndarray:
    """Numbers rounded up to a multiple of `bucket`."""
    return -(-numbers // bucket) * bucket


@dataclass(frozen=True, eq=False)
class AttentionGroup:
    """Rows of one shape, which one call attends for. What pads a row repeats its last token."""

    #: `[row, query]`, the tokens of the pack whose queries these are.
    queries: DeviceIndex
    #: `[row, key]`, which tokens may be seen, in the order of their positions: recorded ones, then those of the pack.
    keys: DeviceIndex
    #: `[row, query]`, the position of each query in its prompt; one row where that is the same for all.
    positions: DeviceIndex
    #: `[row]`, the prompts by their order among the recorded ones.
    prompts: DeviceIndex
    _masks: dict[int, Tensor | None] = field(default_factory=dict, repr=False)

    @classmethod
    def of(
        cls, queries: np.ndarray, keys: np.ndarray, positions: np.ndarray, prompts: np.ndarray, indices: Indices
    ) -> AttentionGroup:
        """A group from its arrays."""
        same = positions[:1] if (positions == positions[:1]).all() else positions
        return cls(indices.add(queries), indices.add(keys), indices.add(same), indices.add(prompts))

    def edges(self, cut_edges: Mapping[int, Sequence[tuple[int, int]]]) -> list[tuple[int, int, int, int]]:
        """Row, head, query and key of what tokens of the pack do not see; keys stand in the order of their positions.

        Args:
            cut_edges: token of the pack -> heads, and positions of keys.
        """
        queries = self.queries.array
        return [
            (int(row), head, int(query), key)
            for row, query in np.argwhere(np.isin(queries, list(cut_edges)))
            for head, key in cut_edges[int(queries[row, query])]
            if key < self.keys.array.shape[1]  # others stand behind all queries
        ]

    def mask(self, table: Tensor | None) -> Tensor | None:
        """`[row or 1, head or 1, query, key]` of a table of `masks.tables`; None: every query sees every key."""
        key = id(table)  # the recording keeps its tables for as long as groups live
        if key not in self._masks:
            self._masks[key] = self._mask_of(table)
        return self._masks[key]

    def _mask_of(self, table: Tensor | None) -> Tensor | None:
        last = self.keys.array.shape[1] - 1
        if table is None and self.positions.array.min() >= last:
            return None
        positions = self.positions.tensor
        at = torch.arange(last + 1, device=positions.device)
        before = (at <= positions[..., None])[:, None]
        if table is None:
            return before
        prompts = self.prompts.tensor if len(table) > 1 else self.prompts.tensor[:1] * 0
        # Keys that only fill up a row stand behind the last query.
        chosen = table[prompts[:, None, None], :, positions[..., None], at.clamp(max=table.shape[-1] - 1)]
        chosen = chosen.permute(0, 3, 1, 2)
        if table.dtype is not torch.bool:
            return chosen.masked_fill(~before, float("-inf"))
        sees = chosen & before
        # Of another device the host would wait for the answer, which takes longer than a mask that hides nothing.
        return None if sees.device.type == "cpu" and bool(sees.all()) else sees
