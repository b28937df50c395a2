"""The forward pass of packed rows, block by block.

A row starts at the first block and the first token that it changes. Rows are appended to the pack at their first block,
and run together from there on. If a row's first edit is inside a block, at a point where a change affects only its own
token (attention output, MLP, queries), only its changed tokens run through that block: it is a partial row there.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from nnsplice.packed.attention import KeyValue, LeftBlock, PackedAttention, attention
from nnsplice.packed.cost import Cost, CostModel
from nnsplice.packed.edits import Find, Numbered, Readings, edited, hooked, read
from nnsplice.packed.indices import DeviceIndex, Indices, on_device
from nnsplice.packed.layout import AttentionGroup, PackLayout, RowColumns
from nnsplice.packed.passes import block_stream
from nnsplice.packed.recording import Recording
from nnsplice.packed.rows import Cut, PreparedRow


@dataclass(frozen=True)
class _Step:
    """One block of a pack, with the indices of its tokens; all are computed before anything runs."""

    layer: int
    #: The rows that run; rows whose first edit is inside this block may be partial.
    layout: PackLayout
    #: The rows that start at this block with all of their tokens, and the recorded indices of those tokens.
    entering: Sequence[int]
    entering_tokens: DeviceIndex
    #: Of partial rows: recorded indices of the tokens that run, of all tokens, and where the former are in the latter.
    partial_tokens: DeviceIndex
    widened: DeviceIndex
    changed: DeviceIndex
    #: The recorded indices of all tokens that run, and the groups of rows that attend together.
    tokens: DeviceIndex
    groups: Sequence[AttentionGroup]


@dataclass
class PackedForward:
    """One pack on its way through the blocks."""

    root: nn.Module
    recording: Recording
    rows: Sequence[PreparedRow]
    cost_model: CostModel
    #: See `PackLayout.groups`.
    bucket: int
    readings: Readings = field(default_factory=dict)
    cost: Cost = field(default_factory=Cost)

    def run(self) -> dict[int, Tensor]:
        """Run all rows: by the row's index, the output of the last block at its `end`, `[width]`."""
        last = len(self.recording.blocks) - 1
        states: Tensor | None = None
        ends: dict[int, Tensor] = {}
        for step in self._steps():
            if step.entering:
                entered = self._begin(step)
                states = entered if states is None else torch.cat([states, entered])
            if states is None:
                states = self.recording.entering[step.layer][:0]
            if step.layer == last:
                ends |= self._last(step, states)
                break
            states = self._through(step, states)
            states = self._staying(step, states)
        leaving = [n for n, row in enumerate(self.rows) if row.layer == last + 1]
        if leaving:
            ends |= dict(zip(leaving, self._after_last_block(leaving), strict=True))
        return ends

    def _steps(self) -> list[_Step]:
        """The blocks that run. Their indices go to each device in one copy."""
        steps: list[_Step] = []
        active: list[int] = []
        last = len(self.recording.blocks) - 1
        by_device: dict[torch.device, Indices] = {}
        for layer in range(last + 1):
            beginning = [n for n, row in enumerate(self.rows) if row.layer == layer]
            entering = [n for n in beginning if not self.rows[n].changed_only]
            partial = [n for n in beginning if self.rows[n].changed_only]
            active = active + entering
            if not active and not partial:
                continue
            device = self.recording.entering[layer].device
            there = by_device.setdefault(device, Indices(device))
            layout, widened = self._layout(active, partial), self._layout(partial)
            changed = [widened.find(n, position) for n in partial for position in self.rows[n].changed]
            grouped = not self.recording.whole.calls and not self._is_last_only(layer, layout)
            steps.append(
                _Step(
                    layer,
                    layout,
                    entering,
                    entering_tokens=there.add(self._layout(entering).recorded),
                    partial_tokens=there.add(self._layout((), partial).recorded),
                    widened=there.add(widened.recorded),
                    changed=there.add([at for at in changed if at is not None]),
                    tokens=there.add(layout.recorded),
                    groups=layout.groups(self.recording.total, self.bucket, there) if grouped else (),
                )
            )
            active = [n for n in active + partial if self.rows[n].runs(layer)]
        return steps

    def _layout(self, full: Sequence[int], partial: Sequence[int] = ()) -> PackLayout:
        return PackLayout(self.rows, full, partial, self._columns)

    @cached_property
    def _columns(self) -> RowColumns:
        return RowColumns.of(self.rows)

    def _begin(self, step: _Step) -> Tensor:
        """The inputs `[token, width]` of rows that start at this block, with their edits of the stream before it."""
        numbers, layer, layout = step.entering, step.layer, self._layout(step.entering)
        states = self.recording.entering[layer][step.entering_tokens.tensor]
        for where in ("output", "input"):  # the output of the layer before, then the input of this one
            edits = [(n, edit) for n in numbers for edit in self.rows[n].beginning if edit.where == where]
            states = edited(states, edits, layout.find)
        before = [(n, r) for n in numbers for r in self.rows[n].reads if (r.layer, r.where) == (layer - 1, "output")]
        read(states, before, layout.find, self.readings)
        return states

    def _after_last_block(self, numbers: Sequence[int]) -> Tensor:
        """The final states `[row, width]` of rows that edit the output of the last block."""
        rows = [self.rows[n] for n in numbers]
        if any(row.reads for row in rows):
            raise NotImplementedError("a read behind the last block")
        ended = self.recording.entering[-1]
        states = ended[on_device([row.base + row.last for row in rows], ended.device)]
        return edited(states, [(n, e) for n in numbers for e in self.rows[n].edits], self._only_last(numbers))

    def _staying(self, step: _Step, states: Tensor) -> Tensor:
        """The states of the rows that need the next block, on its device."""
        active = [*step.layout.full, *step.layout.partial]
        staying = [n for n in active if self.rows[n].runs(step.layer)]
        if len(staying) < len(active):
            offsets = self._layout(active).offsets
            kept = [states[offsets[n] : offsets[n] + self.rows[n].length] for n in staying]
            states = torch.cat(kept) if kept else states[:0]
        return states.to(self.recording.entering[step.layer + 1].device)

    # --- blocks

    def _through(self, step: _Step, states: Tensor) -> Tensor:
        """The output of a block: of the full rows, then of the partial rows, which are full from here on."""
        layer, layout = step.layer, step.layout
        pack = torch.cat([states, self.recording.entering[layer][step.partial_tokens.tensor]])
        out = self._edited_output(layer, layout, self._call(step, pack), layout.find)
        if not layout.partial:
            return out
        following = self.recording.entering[layer + 1]
        rest = following[on_device(step.widened.array, following.device)].to(out.device)
        rest[step.changed.tensor] = out[len(states) :]
        return torch.cat([out[: len(states)], rest])

    def _last(self, step: _Step, states: Tensor) -> dict[int, Tensor]:
        """The output of the last block at the `end` of each row; other tokens only compute keys and values."""
        layer, layout = step.layer, step.layout
        numbers = [*layout.full, *layout.partial]
        if not self._is_last_only(layer, layout):
            pack = torch.cat([states, self.recording.entering[layer][step.partial_tokens.tensor]])
            out = self._edited_output(layer, layout, self._call(step, pack), layout.find)
            return {n: self._end(n, layout, out) for n in numbers if self.rows[n].row.end is not None}
        full, there = self._layout(layout.full), Indices(states.device)
        own: KeyValue | None = None
        tokens, last = there.add(full.recorded), there.add(full.ends())
        ends = there.add([self.rows[n].base + self.rows[n].last for n in numbers])
        partial = there.add(ends.array[len(layout.full) :])
        groups = layout.groups(self.recording.total, self.bucket, there, last_only=True)
        if full.size:
            packed = PackedAttention(self.recording.attended, self.recording.masks, [], stops_at_keys=True)
            own = self._keys_and_values(layer, full, states, packed, tokens.tensor)
        find = self._only_last(numbers)
        pack = torch.cat([states[last.tensor], self.recording.entering[layer][partial.tensor]])
        attend = PackedAttention(
            self.recording.attended, self.recording.masks, groups, own=own or self._no_keys(layer),
            cut_edges=self._cut_edges(layer, layout, find),
        )  # fmt: skip
        inside = hooked(self.root, self._inside(layer, layout), lambda: find, self.readings)
        with attention(self.root, attend), inside:
            out = self._block(layer, pack, ends.tensor)
        self._count(layer, len(pack))
        out = self._edited_output(layer, layout, out, find)
        return {n: out[order] for order, n in enumerate(numbers)}

    def _is_last_only(self, layer: int, layout: PackLayout) -> bool:
        """Whether a block is the last one, and only the last token of each row has to run."""
        if layer < len(self.recording.blocks) - 1 or self.recording.whole.calls:
            return False
        rows = [self.rows[n] for n in (*layout.full, *layout.partial)]
        return all(row.last == row.row.end and all(read.layer != layer for read in row.reads) for row in rows)

    def _end(self, number: int, layout: PackLayout, out: Tensor) -> Tensor:
        row = self.rows[number]
        assert row.row.end is not None
        at = layout.find(number, row.row.end)
        # In a partial row the `end` may be an unchanged token, with its recorded state.
        return self.recording.entering[-1][row.base + row.row.end] if at is None else out[at]

    def _keys_and_values(
        self, layer: int, layout: PackLayout, states: Tensor, attend: PackedAttention, tokens: Tensor
    ) -> KeyValue:
        block = self.recording.tower.blocks[layer]
        self._count(layer, len(states), (block.q, block.k, block.v, block.fused))
        inside = hooked(self.root, self._inside(layer, layout), lambda: layout.find, self.readings)
        with attention(self.root, attend), inside:
            try:
                self._block(layer, states, tokens)
            except LeftBlock as left:
                return left.own
        raise NotImplementedError("a block ran through without attention")

    def _call(self, step: _Step, pack: Tensor) -> Tensor:
        """One block for a pack, with the edits and reads of its inside."""
        layer, layout, whole = step.layer, step.layout, self.recording.whole
        find: list[Find] = [layout.find]
        self._count(layer, len(pack))
        with ExitStack() as stack:
            stack.enter_context(hooked(self.root, self._inside(layer, layout), lambda: find[0], self.readings))
            if whole.calls:
                stack.enter_context(whole.running(layout, lambda inner: find.__setitem__(0, inner or layout.find)))
            else:
                cut_edges = self._cut_edges(layer, layout, layout.find)
                attend = PackedAttention(
                    self.recording.attended, self.recording.masks, step.groups, cut_edges=cut_edges
                )
                stack.enter_context(attention(self.root, attend))
            return self._block(layer, pack, step.tokens.tensor)

    def _count(self, layer: int, tokens: int, parts: Sequence[str | None] = ()) -> None:
        """Count a call of a block, or of some of its modules."""
        block = self.recording.tower.blocks[layer]
        flops = tokens * self.cost_model.per_token(*(parts or block.modules))
        if self.recording.whole.calls:  # attention runs whole prompts
            more = sum(self.recording.whole.length(row.base) - row.length for row in self.rows if row.layer <= layer)
            flops += more * self.cost_model.per_token(*filter(None, [block.mixes]))
        self.cost += Cost(tokens, block_calls=1, flops=flops, peak=tokens)

    def _block(self, layer: int, pack: Tensor, tokens: Tensor) -> Tensor:
        return block_stream(self.recording.blocks[layer](pack[None], **self.recording.arguments(layer, tokens)))[0]

    # --- edits and reads

    def _inside(self, layer: int, layout: PackLayout) -> list[Numbered]:
        """The edits and reads inside this block, and at its input for rows that started before it."""
        found: list[Numbered] = []
        for n in (*layout.full, *layout.partial):
            row = self.rows[n]
            entered = () if row.layer != layer else row.beginning
            found += [(n, e) for e in row.edits if e.layer == layer and e.where != "output" and e not in entered]
            found += [(n, r) for r in row.reads if r.layer == layer and r.where != "output"]
        return found

    def _edited_output(self, layer: int, layout: PackLayout, out: Tensor, find: Find) -> Tensor:
        """The output of a block, edited and read for rows that started before its output."""
        here = [(n, self.rows[n]) for n in layout.full]
        edits = [(n, e) for n, row in here for e in row.edits if (e.layer, e.where) == (layer, "output")]
        reads = [(n, r) for n, row in here for r in row.reads if (r.layer, r.where) == (layer, "output")]
        out = edited(out, edits, find)
        read(out, reads, find, self.readings)
        return out

    def _cut_edges(self, layer: int, layout: PackLayout, find: Find) -> dict[int, list[tuple[int, int]]]:
        """The knockouts of this block: token of the pack -> pairs of a head and a key's position."""
        cut_edges: dict[int, list[tuple[int, int]]] = {}
        for n in (*layout.full, *layout.partial):
            for cut in (placed.what for placed in self.rows[n].cuts if placed.layer == layer):
                assert isinstance(cut, Cut)
                for query, key in cut.edges:
                    at = find(n, query)
                    if at is not None:
                        cut_edges.setdefault(at, []).append((cut.head, key))
        return cut_edges

    # --- tokens

    def _only_last(self, numbers: Sequence[int]) -> Find:
        order = {n: place for place, n in enumerate(numbers)}
        return lambda n, position: order[n] if position == self.rows[n].last else None

    def _no_keys(self, layer: int) -> KeyValue:
        """Empty keys and values, for a pack whose rows attend to recorded tokens only."""
        keys, values = list(self.recording.attended.values())[layer]
        return keys[:, :0], values[:, :0]
