"""A pack of rows on its way through the blocks.

A row begins before the first block that it changes, at its first changed token. Rows are appended where they begin, and
from there all of them run together. A row that begins inside a block, where a change stays with its token until the
next (attention's output, the MLP, a query), runs that block for the changed tokens alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from nnsplice.sweeps.cost import Cost
from nnsplice.sweeps.executors import Work
from nnsplice.sweeps.packed.attention import KeyValue, Left, Packed, attention
from nnsplice.sweeps.packed.edits import Change, Find, Numbered, edited, hooked
from nnsplice.sweeps.packed.layout import Layout
from nnsplice.sweeps.packed.recording import Recording, first
from nnsplice.sweeps.packed.rows import Row


@dataclass
class Wave:
    """The run of one pack."""

    work: Work
    root: nn.Module
    recording: Recording
    rows: Sequence[Row]
    #: See `Layout.groups`.
    grain: int
    cost: Cost = field(default_factory=Cost)

    def run(self) -> tuple[Tensor, list[int]]:
        """The state that leaves the last block at the token that is read, `[row, width]`, and whose rows they are."""
        last = len(self.recording.blocks) - 1
        states = self.recording.entering[0][:0]
        active: list[int] = []
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
                states = self._last(layout, states)
            else:
                states = self._through(layer, layout, states)
            active = active + alone
        leaving = [n for n, row in enumerate(self.rows) if row.layer == last + 1]
        if leaving:
            states = torch.cat([states, self._leave(leaving)])
        return states, active + leaving

    def _begin(self, numbers: Sequence[int], layer: int) -> Tensor:
        """What enters a block for rows that begin there, with the first edit done where it is one of the stream."""
        layout = Layout(self.rows, numbers)
        states = self.recording.entering[layer][self._index(layout.recorded)]
        first_ = [(n, self.rows[n].edits[0]) for n in numbers]
        return self._edited(states, [(n, e) for n, e in first_ if e.where in ("input", "output")], layout.find)

    def _leave(self, numbers: Sequence[int]) -> Tensor:
        """Rows that change what leaves the last block: one token each."""
        rows = [self.rows[n] for n in numbers]
        states = self.recording.entering[-1][[row.base + row.read for row in rows]]
        return self._edited(states, [(n, e) for n in numbers for e in self.rows[n].edits], self._only_read(numbers))

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

    def _last(self, layout: Layout, states: Tensor) -> Tensor:
        """What leaves the last block at the tokens that are read; nothing else runs, but for keys and values."""
        layer = len(self.recording.blocks) - 1
        if self.recording.whole.calls:
            out = self._edited_output(layer, layout, self._call(layer, layout, states), layout.find)
            return out[layout.ends()]
        long = Layout(self.rows, layout.long)
        own: KeyValue | None = None
        if long.size:
            packed = Packed(self.recording.attended, self.recording.masks, [], leaves=True)
            own = self._keys_and_values(layer, long, states, packed)
        numbers = [*layout.long, *layout.short]
        find = self._only_read(numbers)
        ends = [self.rows[n].base + self.rows[n].read for n in numbers]
        pack = torch.cat([states[long.ends()], self.recording.entering[layer][ends[len(layout.long) :]]])
        groups = layout.groups(self.recording.total, self.grain, states.device, thin=True)
        attend = Packed(self.recording.attended, self.recording.masks, groups, own=own or self._none(layer))
        with attention(self.root, attend), hooked(self.root, self._inside(layer, layout), self._change(lambda: find)):
            out = self._block(layer, pack, self._index(ends))
        self._count(layer, len(pack))
        return self._edited_output(layer, layout, out, find)

    def _keys_and_values(self, layer: int, layout: Layout, states: Tensor, attend: Packed) -> KeyValue:
        block, change = self.recording.tower.blocks[layer], self._change(lambda: layout.find)
        self._count(layer, len(states), (block.q, block.k, block.v, block.fused))
        with attention(self.root, attend), hooked(self.root, self._inside(layer, layout), change):
            try:
                self._block(layer, states, self._index(layout.recorded))
            except Left as left:
                return left.own
        raise NotImplementedError("a block ran through without attention")

    def _call(self, layer: int, layout: Layout, pack: Tensor) -> Tensor:
        """One block for a pack, with the edits of its inside."""
        whole = self.recording.whole
        find: list[Find] = [layout.find]
        self._count(layer, len(pack))
        with ExitStack() as stack:
            stack.enter_context(hooked(self.root, self._inside(layer, layout), self._change(lambda: find[0])))
            if whole.calls:
                stack.enter_context(whole.running(layout, lambda inner: find.__setitem__(0, inner or layout.find)))
            else:
                groups = layout.groups(self.recording.total, self.grain, pack.device)
                attend = Packed(self.recording.attended, self.recording.masks, groups)
                stack.enter_context(attention(self.root, attend))
            return self._block(layer, pack, self._index(layout.recorded))

    def _count(self, layer: int, tokens: int, parts: Sequence[str | None] = ()) -> None:
        """Note a call of a block, or of those parts of it."""
        block, law = self.recording.tower.blocks[layer], self.work.law
        flops = tokens * law.per_token(*(parts or block.modules))
        if self.recording.whole.calls:  # whose attention runs whole prompts
            more = sum(self.recording.whole.length(row.base) - row.length for row in self.rows if row.layer <= layer)
            flops += more * law.per_token(block.attn)
        self.cost += Cost(tokens, block_calls=1, flops=flops, peak=tokens)

    def _block(self, layer: int, pack: Tensor, tokens: Tensor) -> Tensor:
        return first(self.recording.blocks[layer](pack[None], **self.recording.arguments(layer, tokens)))[0]

    # --- edits

    def _inside(self, layer: int, layout: Layout) -> list[Numbered]:
        """The edits inside this block, and those of its input that later layers of a window bring."""
        found: list[Numbered] = []
        for n in (*layout.long, *layout.short):
            for number, edit in enumerate(self.rows[n].edits):
                begun = number == 0 and edit.where == "input"
                if edit.layer == layer and edit.where != "output" and not begun:
                    found.append((n, edit))
        return found

    def _edited_output(self, layer: int, layout: Layout, out: Tensor, find: Find) -> Tensor:
        """What leaves a block, where rows that began before it change that too."""
        edits = [(n, e) for n in layout.long for e in self.rows[n].edits if e.layer == layer and e.where == "output"]
        return self._edited(out, edits, find)

    def _edited(self, values: Tensor, edits: Sequence[Numbered], find: Find) -> Tensor:
        return edited(self.work, self.rows, values, edits, find)

    def _change(self, find: Callable[[], Find]) -> Change:
        return lambda values, members: self._edited(values, members, find())

    # --- tokens

    def _only_read(self, numbers: Sequence[int]) -> Find:
        order = {n: place for place, n in enumerate(numbers)}
        return lambda n, position: order[n] if position == self.rows[n].read else None

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
