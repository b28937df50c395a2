"""Index maps between packed tokens, prompt positions and recorded tokens.

Recorded tokens are kept flat, prompt after prompt, so that prompts of different length need no padding. A pack is flat
too. Attention sees both as one long list, recorded tokens first, and a row of it is a list of numbers into that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from nnsplice.packed.indices import Index, Indices
from nnsplice.packed.rows import Begun


@dataclass(frozen=True)
class Columns:
    """What layouts ask of all rows, as arrays: `[row]`."""

    start: np.ndarray
    last: np.ndarray
    base: np.ndarray
    prompt: np.ndarray

    @classmethod
    def of(cls, rows: Sequence[Begun]) -> Columns:
        """Of these rows, in their order."""
        table = np.array([(row.start, row.last, row.base, row.prompt) for row in rows], int).reshape(-1, 4)
        return cls(*table.T)


@dataclass(frozen=True)
class Layout:
    """Which tokens stand side by side in one call of a block.

    Attributes:
        long: rows with every token from their first changed one to the last that is wanted.
        short: rows with their changed tokens alone, which attend to nothing but recorded tokens.
        known: the columns of all rows, where several layouts share them.
    """

    rows: Sequence[Begun]
    long: Sequence[int]
    short: Sequence[int] = ()
    known: Columns | None = None

    @cached_property
    def columns(self) -> Columns:
        """What is asked of rows."""
        return self.known or Columns.of(self.rows)

    @cached_property
    def _sizes(self) -> np.ndarray:
        """How many tokens each row has: the long ones, then the short ones."""
        long = np.asarray(self.long, int)
        short = [len(self.rows[n].changed) for n in self.short]
        return np.concatenate([self.columns.last[long] + 1 - self.columns.start[long], np.array(short, int)])

    @cached_property
    def _begins(self) -> np.ndarray:
        """Where each row's first token stands in the pack, in the same order."""
        return np.cumsum(self._sizes) - self._sizes

    @cached_property
    def offsets(self) -> dict[int, int]:
        """Row -> where its first token stands in the pack."""
        return dict(zip((*self.long, *self.short), self._begins.tolist(), strict=True))

    @cached_property
    def positions(self) -> np.ndarray:
        """`[token]`, the position of every packed token in its prompt."""
        long = len(self.long)
        sizes, begins = self._sizes[:long], self._begins[:long]
        first = self.columns.start[np.asarray(self.long, int)] - begins
        return np.concatenate(
            [np.repeat(first, sizes) + np.arange(sizes.sum()), *(np.array(self.rows[n].changed) for n in self.short)]
        )

    @cached_property
    def recorded(self) -> np.ndarray:
        """`[token]`, the number of every packed token among the recorded ones."""
        rows = np.array([*self.long, *self.short], int)
        return self.positions + np.repeat(self.columns.base[rows], self._sizes)

    @cached_property
    def size(self) -> int:
        """How many tokens there are."""
        return len(self.positions)

    def find(self, number: int, position: int) -> int | None:
        """Where a row's token stands in the pack; None where it does not."""
        row = self.rows[number]
        if number in self._short:
            return self.offsets[number] + row.changed.index(position) if position in row.changed else None
        return self.offsets[number] + position - row.start if row.start <= position <= row.last else None

    @cached_property
    def _short(self) -> frozenset[int]:
        return frozenset(self.short)

    def ends(self) -> np.ndarray:
        """Where the last token stands in the pack, of every long row."""
        return (self._begins + self._sizes)[: len(self.long)] - 1

    def groups(self, total: int, grain: int, indices: Indices, *, thin: bool = False) -> list[Group]:
        """Rows that attend together.

        Args:
            total: how many recorded tokens there are.
            grain: numbers of queries and keys are rounded up to a multiple of this, and rows that are then alike share
                a call: 1 for no padding at all.
            indices: what takes the numbers of tokens to the device.
            thin: only the last token asks, of a pack that holds one token of each row; keys and values are
                those of this layout.
        """
        numbers, of = np.asarray(self.long, int), self.columns
        start, last, base, prompt = (c[numbers] for c in (of.start, of.last, of.base, of.prompt))
        asking = np.ones_like(start) if thin else _up(last + 1 - start, grain)
        shapes, kinds = np.unique(np.stack([asking, _up(last + 1, grain)], 1), axis=0, return_inverse=True)
        groups = []
        for kind, (queries, keys) in enumerate(shapes.tolist()):
            members = np.flatnonzero(kinds.ravel() == kind)
            first, end, offset = (each[members, None] for each in (start, last, self._begins[: len(numbers)]))
            at = np.minimum(np.arange(keys), end)
            held = np.where(at < first, base[members, None] + at, total + offset + at - first)
            asked = end if thin else np.minimum(first + np.arange(queries), end)
            where = members[:, None] if thin else offset + asked - first
            groups.append(Group.of(where, held, asked, prompt[members], indices))
        return groups + self._shorts(indices, thin)

    def _shorts(self, indices: Indices, thin: bool) -> list[Group]:
        """Rows of changed tokens alone: all of one prompt ask the same keys, in one call."""
        prompts: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for order, n in enumerate(self.short):
            row = self.rows[n]
            asking = [(len(self.long) + order, row.last)] if thin else enumerate(row.changed, self.offsets[n])
            prompts.setdefault((row.base, row.prompt), []).extend(asking)
        groups = []
        for (base, prompt), members in prompts.items():
            where, asked = (np.array(column)[None] for column in zip(*members, strict=True))
            held = base + np.arange(asked.max() + 1)[None]
            groups.append(Group.of(where, held, asked, np.array([prompt]), indices))
        return groups


def _up(numbers: np.ndarray, grain: int) -> np.ndarray:
    return -(-numbers // grain) * grain


@dataclass(frozen=True, eq=False)
class Group:
    """Rows of one shape, which one call attends for. What pads a row repeats its last token."""

    #: `[row, query]`, which tokens of the pack ask.
    asks: Index
    #: `[row, key]`, which tokens may be seen, in the order of their positions: recorded ones, then those of the pack.
    keys: Index
    #: `[row, query]`, where in its prompt each asking token stands; one row where that is the same for all.
    positions: Index
    #: `[row]`, the prompts by their order among the recorded ones.
    prompts: Index
    _made: dict[int, Tensor | None] = field(default_factory=dict, repr=False)

    @classmethod
    def of(
        cls, asks: np.ndarray, keys: np.ndarray, positions: np.ndarray, prompts: np.ndarray, indices: Indices
    ) -> Group:
        """A group of arrays."""
        same = positions[:1] if (positions == positions[:1]).all() else positions
        return cls(indices.add(asks), indices.add(keys), indices.add(same), indices.add(prompts))

    def edges(self, lost: Mapping[int, Sequence[tuple[int, int]]]) -> list[tuple[int, int, int, int]]:
        """Row, head, query and key of what tokens of the pack do not see; keys stand in the order of their positions.

        Args:
            lost: token of the pack -> heads, and positions of keys.
        """
        asks = self.asks.array
        return [
            (int(row), head, int(query), key)
            for row, query in np.argwhere(np.isin(asks, list(lost)))
            for head, key in lost[int(asks[row, query])]
            if key < self.keys.array.shape[1]  # others stand behind all that ask
        ]

    def mask(self, table: Tensor | None) -> Tensor | None:
        """`[row or 1, head or 1, query, key]` of a table of `masks.tables`; None: every query sees every key."""
        known = id(table)  # the recording keeps its tables for as long as groups live
        if known not in self._made:
            self._made[known] = self._of(table)
        return self._made[known]

    def _of(self, table: Tensor | None) -> Tensor | None:
        last = self.keys.array.shape[1] - 1
        if table is None and self.positions.array.min() >= last:
            return None
        positions = self.positions.tensor
        at = torch.arange(last + 1, device=positions.device)
        before = (at <= positions[..., None])[:, None]
        if table is None:
            return before
        prompts = self.prompts.tensor if len(table) > 1 else self.prompts.tensor[:1] * 0
        # Keys that only fill up a row stand behind the last token that asks.
        chosen = table[prompts[:, None, None], :, positions[..., None], at.clamp(max=table.shape[-1] - 1)]
        chosen = chosen.permute(0, 3, 1, 2)
        if table.dtype is not torch.bool:
            return chosen.masked_fill(~before, float("-inf"))
        sees = chosen & before
        # Of another device the host would wait for the answer, which takes longer than a mask that hides nothing.
        return None if sees.device.type == "cpu" and bool(sees.all()) else sees
