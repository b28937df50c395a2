"""Index maps between packed tokens, prompt positions and recorded tokens.

Recorded tokens are stored flat, prompt after prompt, so that prompts of different length need no padding, and so are
the tokens of a pack. For attention both are concatenated, recorded tokens first, and the keys of a row are indices into
that.
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

#: A function (row index, position) -> index of that token in the pack; None if it does not run.
Find = Callable[[int, int], int | None]


@dataclass(frozen=True)
class RowColumns:
    """The fields of all rows that layouts need, as arrays `[row]`."""

    start: np.ndarray
    last: np.ndarray
    base: np.ndarray
    prompt: np.ndarray

    @classmethod
    def of(cls, rows: Sequence[PreparedRow]) -> RowColumns:
        """The columns of these rows."""
        table = np.array([(row.start, row.last, row.base, row.prompt) for row in rows], int).reshape(-1, 4)
        return cls(*table.T)


@dataclass(frozen=True)
class PackLayout:
    """The tokens of one call of a block.

    Attributes:
        rows: all rows of the run.
        full: indices of rows with all tokens from the first changed to the last needed one.
        partial: indices of rows with their changed tokens only, which attend to recorded tokens only.
        shared: the columns of all rows, if computed already.
    """

    rows: Sequence[PreparedRow]
    full: Sequence[int]
    partial: Sequence[int] = ()
    shared: RowColumns | None = None

    @cached_property
    def columns(self) -> RowColumns:
        """The columns of all rows."""
        return self.shared or RowColumns.of(self.rows)

    @cached_property
    def _sizes(self) -> np.ndarray:
        """The number of tokens of each row: of the full rows, then of the partial rows."""
        full = np.asarray(self.full, int)
        partial = [len(self.rows[n].changed) for n in self.partial]
        return np.concatenate([self.columns.last[full] + 1 - self.columns.start[full], np.array(partial, int)])

    @cached_property
    def _begins(self) -> np.ndarray:
        """The index of each row's first token in the pack, in the same order."""
        return np.cumsum(self._sizes) - self._sizes

    @cached_property
    def offsets(self) -> dict[int, int]:
        """Row index -> the index of its first token in the pack."""
        return dict(zip((*self.full, *self.partial), self._begins.tolist(), strict=True))

    @cached_property
    def positions(self) -> np.ndarray:
        """`[token]`: the position of each packed token in its prompt."""
        full = len(self.full)
        sizes, begins = self._sizes[:full], self._begins[:full]
        first = self.columns.start[np.asarray(self.full, int)] - begins
        return np.concatenate(
            [np.repeat(first, sizes) + np.arange(sizes.sum()), *(np.array(self.rows[n].changed) for n in self.partial)]
        )

    @cached_property
    def recorded(self) -> np.ndarray:
        """`[token]`: the index of each packed token among the recorded tokens."""
        rows = np.array([*self.full, *self.partial], int)
        return self.positions + np.repeat(self.columns.base[rows], self._sizes)

    @cached_property
    def size(self) -> int:
        """The number of tokens."""
        return len(self.positions)

    def find(self, number: int, position: int) -> int | None:
        """The index of a row's token in the pack; None if it is not there."""
        row = self.rows[number]
        if number in self._partial_rows:
            return self.offsets[number] + row.changed.index(position) if position in row.changed else None
        return self.offsets[number] + position - row.start if row.start <= position <= row.last else None

    @cached_property
    def _partial_rows(self) -> frozenset[int]:
        return frozenset(self.partial)

    def ends(self) -> np.ndarray:
        """The index in the pack of the last token of each full row."""
        return (self._begins + self._sizes)[: len(self.full)] - 1

    def groups(self, total: int, bucket: int, indices: Indices, *, last_only: bool = False) -> list[AttentionGroup]:
        """The groups of rows that attend in one call.

        Args:
            total: the number of recorded tokens.
            bucket: numbers of queries and keys are padded to a multiple of this, and rows of equal padded size share a
                call; 1 for no padding.
            indices: takes index arrays to the device.
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
        """The groups of partial rows: all queries of one prompt share its keys."""
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
    """Rows of one padded shape, for one call of attention. Padding repeats the last token of a row."""

    #: `[row, query]`: indices of the queries in the pack.
    queries: DeviceIndex
    #: `[row, key]`: indices of the keys among recorded and packed tokens, in the order of their positions.
    keys: DeviceIndex
    #: `[row or 1, query]`: the position of each query in its prompt.
    positions: DeviceIndex
    #: `[row]`: the index of the prompt among the recorded prompts.
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
        """The (row, head, query, key) indices of cut edges in this group.

        Args:
            cut_edges: token of the pack -> pairs of a head and the position of a key.
        """
        queries = self.queries.array
        return [
            (int(row), head, int(query), key)
            for row, query in np.argwhere(np.isin(queries, list(cut_edges)))
            for head, key in cut_edges[int(queries[row, query])]
            if key < self.keys.array.shape[1]  # later keys are after all queries
        ]

    def mask(self, table: Tensor | None) -> Tensor | None:
        """The mask `[row or 1, head or 1, query, key]` from a table of `masks.tables`; None if nothing is masked."""
        key = id(table)  # the recording keeps the tables alive
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
        # Padding keys are after the last query, so `before` masks them.
        chosen = table[prompts[:, None, None], :, positions[..., None], at.clamp(max=table.shape[-1] - 1)]
        chosen = chosen.permute(0, 3, 1, 2)
        if table.dtype is not torch.bool:
            return chosen.masked_fill(~before, float("-inf"))
        sees = chosen & before
        # On a GPU the check would synchronise, which takes longer than applying the mask.
        return None if sees.device.type == "cpu" and bool(sees.all()) else sees
