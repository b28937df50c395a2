"""Where every token stands: in a pack, in its prompt, and among the recorded tokens.

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

from nnsplice.packed.rows import Begun


@dataclass(frozen=True)
class Layout:
    """Which tokens stand side by side in one call of a block.

    Attributes:
        long: rows with every token from their first changed one to the last that is wanted.
        short: rows with their changed tokens alone, which attend to nothing but recorded tokens.
    """

    rows: Sequence[Begun]
    long: Sequence[int]
    short: Sequence[int] = ()

    @cached_property
    def offsets(self) -> dict[int, int]:
        """Row -> where its first token stands in the pack."""
        sizes = [self.rows[n].length for n in self.long] + [len(self.rows[n].changed) for n in self.short]
        ends = np.cumsum([0, *sizes])
        return {n: int(end) for n, end in zip((*self.long, *self.short), ends[:-1], strict=True)}

    @cached_property
    def positions(self) -> np.ndarray:
        """`[token]`, the position of every packed token in its prompt."""
        long = [np.arange(self.rows[n].start, self.rows[n].last + 1) for n in self.long]
        return np.concatenate([np.empty(0, int), *long, *(np.array(self.rows[n].changed) for n in self.short)])

    @cached_property
    def recorded(self) -> np.ndarray:
        """`[token]`, the number of every packed token among the recorded ones."""
        rows = [self.rows[n] for n in (*self.long, *self.short)]
        sizes = [self.rows[n].length for n in self.long] + [len(self.rows[n].changed) for n in self.short]
        return self.positions + np.repeat(np.array([row.base for row in rows], int), sizes)

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

    def ends(self) -> list[int]:
        """Where the last token stands in the pack, of every long row."""
        return [self.offsets[n] + self.rows[n].length - 1 for n in self.long]

    def groups(self, total: int, grain: int, device: torch.device, *, thin: bool = False) -> list[Group]:
        """Rows that attend together.

        Args:
            total: how many recorded tokens there are.
            grain: numbers of queries and keys are rounded up to a multiple of this, and rows that are then alike share
                a call: 1 for no padding at all.
            thin: only the last token asks, of a pack that holds one token of each row; keys and values are
                those of this layout.
        """
        alike: dict[tuple[int, int], list[int]] = {}
        for n in self.long:
            row = self.rows[n]
            asks = 1 if thin else _up(row.length, grain)
            alike.setdefault((asks, _up(row.last + 1, grain)), []).append(n)
        order = {n: place for place, n in enumerate(self.long)}
        groups = []
        for (queries, keys), members in alike.items():
            rows = [self.rows[n] for n in members]
            start, last, base = (
                np.array([getattr(row, name) for row in rows])[:, None] for name in ("start", "last", "base")
            )
            offset = np.array([self.offsets[n] for n in members])[:, None]
            at = np.minimum(np.arange(keys), last)
            held = np.where(at < start, base + at, total + offset + at - start)
            asked = last if thin else np.minimum(start + np.arange(queries), last)
            where = np.array([order[n] for n in members])[:, None] if thin else offset + asked - start
            groups.append(Group.of(where, held, asked, [row.prompt for row in rows], device))
        return groups + self._shorts(device, thin)

    def _shorts(self, device: torch.device, thin: bool) -> list[Group]:
        """Rows of changed tokens alone: all of one prompt ask the same keys, in one call."""
        prompts: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for order, n in enumerate(self.short):
            row = self.rows[n]
            asking = [(len(self.long) + order, row.last)] if thin else enumerate(row.changed, self.offsets[n])
            prompts.setdefault((row.base, row.prompt), []).extend(asking)
        groups = []
        for (base, prompt), members in prompts.items():
            where, asked = (np.array(column)[None] for column in zip(*members, strict=True))
            groups.append(Group.of(where, base + np.arange(asked.max() + 1)[None], asked, [prompt], device))
        return groups


def _up(number: int, grain: int) -> int:
    return -(-number // grain) * grain


@dataclass(frozen=True, eq=False)
class Group:
    """Rows of one shape, which one call attends for. What pads a row repeats its last token."""

    #: `[row, query]`, which tokens of the pack ask.
    asks: Tensor
    #: `[row, key]`, which tokens may be seen, in the order of their positions: recorded ones, then those of the pack.
    keys: Tensor
    #: `[row, query]`, where in its prompt each asking token stands; one row where that is the same for all.
    positions: Tensor
    #: `[row]`, the prompts by their order among the recorded ones.
    prompts: Tensor
    _made: dict[int, Tensor | None] = field(default_factory=dict, repr=False)

    @classmethod
    def of(
        cls, asks: np.ndarray, keys: np.ndarray, positions: np.ndarray, prompts: Sequence[int], device: torch.device
    ) -> Group:
        """A group of arrays, on the device."""
        same = positions[:1] if (positions == positions[:1]).all() else positions
        a, k, p, n = (torch.as_tensor(array).to(device) for array in (asks, keys, same, prompts))
        return cls(a, k, p, n)

    def edges(self, lost: Mapping[int, Sequence[tuple[int, int]]]) -> list[tuple[int, int, int, int]]:
        """Row, head, query and key of what tokens of the pack do not see; keys stand in the order of their positions.

        Args:
            lost: token of the pack -> heads, and positions of keys.
        """
        asks = self.asks.cpu().numpy()
        return [
            (int(row), head, int(query), key)
            for row, query in np.argwhere(np.isin(asks, list(lost)))
            for head, key in lost[int(asks[row, query])]
            if key < self.keys.shape[1]  # others stand behind all that ask
        ]

    def mask(self, table: Tensor | None) -> Tensor | None:
        """`[row or 1, head or 1, query, key]` of a table of `masks.tables`; None: every query sees every key."""
        known = id(table)  # the recording keeps its tables for as long as groups live
        if known not in self._made:
            self._made[known] = self._of(table)
        return self._made[known]

    def _of(self, table: Tensor | None) -> Tensor | None:
        at = torch.arange(self.keys.shape[1], device=self.keys.device)
        before = (at <= self.positions[..., None])[:, None]
        if table is None:
            return None if bool(before.all()) else before
        prompts = self.prompts if len(table) > 1 else self.prompts[:1] * 0
        # Keys that only fill up a row stand behind the last token that asks.
        chosen = table[prompts[:, None, None], :, self.positions[..., None], at.clamp(max=table.shape[-1] - 1)]
        chosen = chosen.permute(0, 3, 1, 2)
        if table.dtype is not torch.bool:
            return chosen.masked_fill(~before, float("-inf"))
        sees = chosen & before
        return None if bool(sees.all()) else sees
