"""A pack of rows on its way through the blocks.

A row begins before the first block that it changes, at its first changed token. Rows are appended where they begin, and
from there all of them run together. A row that begins inside a block, where a change stays with its token until the
next (attention's output, the MLP, a query), runs that block for the changed tokens alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from nnsplice.packed.attention import KeyValue, Left, Packed, attention
from nnsplice.packed.cost import Cost, Law
from nnsplice.packed.edits import Find, Numbered, Readings, edited, hooked, read
from nnsplice.packed.layout import Layout
from nnsplice.packed.recording import Recording, first
from nnsplice.packed.rows import Begun, Cut


@dataclass
class Wave:
    """The run of one pack."""

    root: nn.Module
    recording: Recording
    rows: Sequence[Begun]
    law: Law
    #: See `Layout.groups`.
    grain: int
    readings: Readings = field(default_factory=dict)
    cost: Cost = field(default_factory=Cost)

    def run(self) -> dict[int, Tensor]:
        """The state that leaves the last block at the token that is wanted: by the row's number, `[width]`."""
        last = len(self.recording.blocks) - 1
        states = self.recording.entering[0][:0]
        active: list[int] = []
        ends: dict[int, Tensor] = {}
        for layer in range(last + 1):
            beginning = [n for n, row in enumerate(self.rows) if row.layer == layer]
            entering = [n for n in beginning if not self.rows[n].alone]
            alone = [n for n in beginning if self.rows[n].alone]
            if entering:
                states = torch.cat([states, self._begin(entering, layer)])
                active = active + entering
            if not active and not alone:
                continue
            layout = Layout(self.rows, active, alone)
            if layer == last:
                ends |= self._last(layout, states)
                break
            states = self._through(layer, layout, states)
            states, active = self._left(layer, states, active + alone)
        leaving = [n for n, row in enumerate(self.rows) if row.layer == last + 1]
        if leaving:
            ends |= dict(zip(leaving, self._leave(leaving), strict=True))
        return ends

    def _begin(self, numbers: Sequence[int], layer: int) -> Tensor:
        """What enters a block for rows that begin there, with the edits of the stream done that it begins with."""
        layout = Layout(self.rows, numbers)
        states = self.recording.entering[layer][self._index(layout.recorded)]
        for where in ("output", "input"):  # what leaves the layer before, then what enters this one
            edits = [(n, edit) for n in numbers for edit in self.rows[n].beginning if edit.where == where]
            states = edited(states, edits, layout.find)
        before = [(n, r) for n in numbers for r in self.rows[n].reads if (r.layer, r.where) == (layer - 1, "output")]
        read(states, before, layout.find, self.readings)
        return states

    def _leave(self, numbers: Sequence[int]) -> Tensor:
        """Rows that change what leaves the last block: one token each."""
        rows = [self.rows[n] for n in numbers]
        if any(row.reads for row in rows):
            raise NotImplementedError("a read behind the last block")
        states = self.recording.entering[-1][[row.base + row.last for row in rows]]
        return edited(states, [(n, e) for n in numbers for e in self.rows[n].edits], self._only_last(numbers))

    def _left(self, layer: int, states: Tensor, active: list[int]) -> tuple[Tensor, list[int]]:
        """The rows of which something is still wanted, and their states."""
        staying = [n for n in active if self.rows[n].runs(layer)]
        if len(staying) == len(active):
            return states, active
        offsets = Layout(self.rows, active).offsets
        kept = [states[offsets[n] : offsets[n] + self.rows[n].length] for n in staying]
        return torch.cat(kept) if kept else states[:0], staying

    # --- blocks

    def _through(self, layer: int, layout: Layout, states: Tensor) -> Tensor:
        """What leaves a block: of the long rows, then of the short ones, which are long from here on."""
        pack = torch.cat([states, self._recorded(layer, layout)])
        out = self._edited_output(layer, layout, self._call(layer, layout, pack), layout.find)
        if not layout.short:
            return out
        widened = Layout(self.rows, layout.short)
        rest = self.recording.entering[layer + 1][self._index(widened.recorded)]
        at = [widened.find(n, position) for n in layout.short for position in self.rows[n].changed]
        rest[at] = out[len(states) :]
        return torch.cat([out[: len(states)], rest])

    def _last(self, layout: Layout, states: Tensor) -> dict[int, Tensor]:
        """What leaves the last block at the tokens that are wanted; nothing else runs, but for keys and values."""
        layer = len(self.recording.blocks) - 1
        numbers = [*layout.long, *layout.short]
        wanted = [n for n in numbers if self.rows[n].row.end is not None]
        if self.recording.whole.calls or not all(self._thin(self.rows[n], layer) for n in numbers):
            pack = torch.cat([states, self._recorded(layer, layout)])
            out = self._edited_output(layer, layout, self._call(layer, layout, pack), layout.find)
            return {n: self._end(n, layout, out) for n in wanted}
        long = Layout(self.rows, layout.long)
        own: KeyValue | None = None
        if long.size:
            packed = Packed(self.recording.attended, self.recording.masks, [], leaves=True)
            own = self._keys_and_values(layer, long, states, packed)
        find = self._only_last(numbers)
        ends = [self.rows[n].base + self.rows[n].last for n in numbers]
        pack = torch.cat([states[long.ends()], self.recording.entering[layer][ends[len(layout.long) :]]])
        groups = layout.groups(self.recording.total, self.grain, states.device, thin=True)
        attend = Packed(
            self.recording.attended, self.recording.masks, groups, own=own or self._none(layer),
            lost=self._lost(layer, layout, find),
        )  # fmt: skip
        inside = hooked(self.root, self._inside(layer, layout), lambda: find, self.readings)
        with attention(self.root, attend), inside:
            out = self._block(layer, pack, self._index(ends))
        self._count(layer, len(pack))
        out = self._edited_output(layer, layout, out, find)
        return {n: out[order] for order, n in enumerate(numbers)}

    @staticmethod
    def _thin(row: Begun, layer: int) -> bool:
        """Whether one token is all that is wanted of the row behind the keys and values of this block."""
        return row.last == row.row.end and all(read.layer != layer for read in row.reads)

    def _end(self, number: int, layout: Layout, out: Tensor) -> Tensor:
        row = self.rows[number]
        assert row.row.end is not None
        at = layout.find(number, row.row.end)
        # A row of changed tokens alone may leave the wanted one as it was recorded.
        return self.recording.entering[-1][row.base + row.row.end] if at is None else out[at]

    def _keys_and_values(self, layer: int, layout: Layout, states: Tensor, attend: Packed) -> KeyValue:
        block = self.recording.tower.blocks[layer]
        self._count(layer, len(states), (block.q, block.k, block.v, block.fused))
        inside = hooked(self.root, self._inside(layer, layout), lambda: layout.find, self.readings)
        with attention(self.root, attend), inside:
            try:
                self._block(layer, states, self._index(layout.recorded))
            except Left as left:
                return left.own
        raise NotImplementedError("a block ran through without attention")

    def _call(self, layer: int, layout: Layout, pack: Tensor) -> Tensor:
        """One block for a pack, with the edits and reads of its inside."""
        whole = self.recording.whole
        find: list[Find] = [layout.find]
        self._count(layer, len(pack))
        with ExitStack() as stack:
            stack.enter_context(hooked(self.root, self._inside(layer, layout), lambda: find[0], self.readings))
            if whole.calls:
                stack.enter_context(whole.running(layout, lambda inner: find.__setitem__(0, inner or layout.find)))
            else:
                groups = layout.groups(self.recording.total, self.grain, pack.device)
                lost = self._lost(layer, layout, layout.find)
                attend = Packed(self.recording.attended, self.recording.masks, groups, lost=lost)
                stack.enter_context(attention(self.root, attend))
            return self._block(layer, pack, self._index(layout.recorded))

    def _count(self, layer: int, tokens: int, parts: Sequence[str | None] = ()) -> None:
        """Note a call of a block, or of those parts of it."""
        block = self.recording.tower.blocks[layer]
        flops = tokens * self.law.per_token(*(parts or block.modules))
        if self.recording.whole.calls:  # whose attention runs whole prompts
            more = sum(self.recording.whole.length(row.base) - row.length for row in self.rows if row.layer <= layer)
            flops += more * self.law.per_token(*filter(None, [block.mixes]))
        self.cost += Cost(tokens, block_calls=1, flops=flops, peak=tokens)

    def _block(self, layer: int, pack: Tensor, tokens: Tensor) -> Tensor:
        return first(self.recording.blocks[layer](pack[None], **self.recording.arguments(layer, tokens)))[0]

    # --- edits and reads

    def _inside(self, layer: int, layout: Layout) -> list[Numbered]:
        """The edits and reads inside this block, and those of its input that rows bring which began before it."""
        found: list[Numbered] = []
        for n in (*layout.long, *layout.short):
            row = self.rows[n]
            begun = () if row.layer != layer else row.beginning
            found += [(n, e) for e in row.edits if e.layer == layer and e.where != "output" and e not in begun]
            found += [(n, r) for r in row.reads if r.layer == layer and r.where != "output"]
        return found

    def _edited_output(self, layer: int, layout: Layout, out: Tensor, find: Find) -> Tensor:
        """What leaves a block, where rows that began before it change or read that too."""
        here = [(n, self.rows[n]) for n in layout.long]
        edits = [(n, e) for n, row in here for e in row.edits if (e.layer, e.where) == (layer, "output")]
        reads = [(n, r) for n, row in here for r in row.reads if (r.layer, r.where) == (layer, "output")]
        out = edited(out, edits, find)
        read(out, reads, find, self.readings)
        return out

    def _lost(self, layer: int, layout: Layout, find: Find) -> dict[int, list[tuple[int, int]]]:
        """Token of the pack -> the heads in which it does not see a key, and the key's position."""
        lost: dict[int, list[tuple[int, int]]] = {}
        for n in (*layout.long, *layout.short):
            for cut in (placed.what for placed in self.rows[n].cuts if placed.layer == layer):
                assert isinstance(cut, Cut)
                for query, key in cut.edges:
                    at = find(n, query)
                    if at is not None:
                        lost.setdefault(at, []).append((cut.head, key))
        return lost

    # --- tokens

    def _only_last(self, numbers: Sequence[int]) -> Find:
        order = {n: place for place, n in enumerate(numbers)}
        return lambda n, position: order[n] if position == self.rows[n].last else None

    def _recorded(self, layer: int, layout: Layout) -> Tensor:
        """What enters a block for the changed tokens of short rows."""
        tokens = Layout(self.rows, (), layout.short).recorded
        return self.recording.entering[layer][self._index(tokens)]

    def _index(self, numbers: Sequence[int] | np.ndarray) -> Tensor:
        return torch.as_tensor(numbers, dtype=torch.long, device=self.recording.entering[0].device)

    def _none(self, layer: int) -> KeyValue:
        """No keys and values of their own, for a pack whose rows all see recorded ones only."""
        keys, values = list(self.recording.attended.values())[layer]
        return keys[:, :0], values[:, :0]
