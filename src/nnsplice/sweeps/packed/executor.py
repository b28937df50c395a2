"""The packed wavefront: the tokens of all cells that can differ, side by side through every block once.

A cell changes nothing before its layer and before its token. So its row begins there: what enters that layer is taken
from the recorded corrupted run, and the tokens before come in as recorded keys and values. Rows of all cells are packed
into one sequence without padding, each block is called once for all of them, and before the next block the rows that
begin there are appended. In the last block a row needs its keys and values, and then one token: the one that the metric
reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nnsplice import wire
from nnsplice.activations.access import site_of
from nnsplice.atlas import peel
from nnsplice.sweeps.executors import Cost, Work, measured
from nnsplice.sweeps.packed.attention import Group, Left, Packed, attention
from nnsplice.sweeps.packed.recording import Recording, first, logits_of, record
from nnsplice.sweeps.packed.rows import Edit, Row, rows_of
from nnsplice.sweeps.plan import Job


def packed(work: Work, jobs: Sequence[Job]) -> tuple[list[float], Cost]:
    """The values of jobs whose prompts have one length.

    Raises:
        NotImplementedError: this model, or one of these sites, is not covered.
    """
    root = peel(work.model)
    recording = _recorded(work, jobs)
    length = recording.entering[0].shape[1]
    read = work.plan.metric.metric.position % length
    rows = rows_of(work, jobs, recording.tower)
    wave = Wave(work, recording, rows, read)
    with torch.no_grad():
        states = wave.run(root)
        logits = logits_of(root, recording, states)
    order = [wave.finished.index(number) for number in range(len(rows))] if rows else []
    values = measured(work, logits[order], jobs)
    return values, Cost(tokens=wave.tokens, block_calls=wave.calls, peak=wave.peak)


def _recorded(work: Work, jobs: Sequence[Job]) -> Recording:
    """The recorded pass of these prompts; kept for the next chunk, which is often about the same ones."""
    prompts = tuple(dict.fromkeys(prompt for prompt, _ in jobs))
    known = work.memo.get("recording")
    if known is None or not set(prompts) <= set(known.number):
        known = work.memo["recording"] = record(work, prompts)
    return known


@dataclass
class Wave:
    """A pack on its way through the blocks."""

    work: Work
    recording: Recording
    rows: Sequence[Row]
    #: The token that the metric reads; nothing after it runs.
    read: int
    #: Rows in the order in which their final states come out.
    finished: list[int] = field(default_factory=list)
    tokens: int = 0
    calls: int = 0
    peak: int = 0

    def run(self, root: nn.Module) -> Tensor:
        """The states of every row at the token that is read, after the last block: `[row, width]`."""
        last = len(self.recording.blocks) - 1
        width = self.recording.entering[0].shape[-1]
        states = self.recording.entering[0].new_empty(0, width)
        active: list[int] = []
        for layer in range(last + 1):
            entering = [n for n, row in enumerate(self.rows) if row.layer == layer and not row.alone]
            if entering:
                states = torch.cat([states, self._begin(entering, layer)])
                active = active + entering
            alone = [n for n, row in enumerate(self.rows) if row.layer == layer and row.alone]
            if layer == last:
                states = self._last(root, active, alone, states)
                break
            if not active and not alone:
                continue
            states, ends = self._through(root, layer, active, alone, states)
            if alone:
                states = torch.cat([states, self._widened(alone, layer, ends)])
                active = active + alone
        self.finished = active + alone
        leaving = [n for n, row in enumerate(self.rows) if row.layer == last + 1]
        if leaving:
            states = torch.cat([states, self._left(leaving, last)])
            self.finished += leaving
        return states

    def _of(self, numbers: Sequence[int]) -> list[Row]:
        return [self.rows[n] for n in numbers]

    def _length(self, row: Row) -> int:
        return self.read + 1 - row.start

    # --- rows that begin

    def _begin(self, numbers: Sequence[int], layer: int) -> Tensor:
        """What enters a block for rows that begin there, with the first edit done where it is one of the stream."""
        entering = self.recording.entering[layer]
        parts = [entering[self._prompt(row), row.start : self.read + 1] for row in self._of(numbers)]
        states = torch.cat(parts)
        edits = [(n, self.rows[n].edits[0]) for n in numbers if self.rows[n].edits[0].where in ("input", "output")]
        return self._edited(states, edits, self._offsets(numbers))

    def _widened(self, numbers: Sequence[int], layer: int, ends: Tensor) -> Tensor:
        """Rows that ran a block with their changed tokens alone: the other tokens leave it as they were recorded."""
        after = self.recording.entering[layer + 1]
        parts: list[Tensor] = []
        at = 0
        for row in self._of(numbers):
            state = after[self._prompt(row), row.start : self.read + 1].clone()
            tokens = [p - row.start for p in row.changed if p <= self.read]
            state[tokens] = ends[at : at + len(tokens)]
            at += len(tokens)
            parts.append(state)
        return torch.cat(parts)

    def _left(self, numbers: Sequence[int], last: int) -> Tensor:
        """Rows that change what leaves the last block: one token each."""
        states = torch.stack(
            [self.recording.entering[last + 1][self._prompt(row), self.read] for row in self._of(numbers)]
        )
        edits = [(n, edit) for n in numbers for edit in self.rows[n].edits if self.read in edit.positions]
        return self._edited(states, edits, dict(zip(numbers, range(len(numbers)), strict=True)), only_read=True)

    # --- blocks

    def _through(
        self, root: nn.Module, layer: int, active: list[int], alone: list[int], states: Tensor
    ) -> tuple[Tensor, Tensor]:
        """One block for the active rows and for the single tokens of rows that begin inside it."""
        offsets = self._offsets(active)
        size = states.shape[0]
        singles, more, at = [], {}, size
        for n in alone:
            row = self.rows[n]
            tokens = [p for p in row.changed if p <= self.read]
            singles.append(self.recording.entering[layer][self._prompt(row), tokens])
            more[n] = at
            at += len(tokens)
        pack = torch.cat([states, *singles])
        positions = torch.tensor(self._positions(active, alone), device=pack.device)
        groups = self._groups(active, alone, offsets, more, pack.device)
        edits = self._inside(layer, active, alone)
        out = self._call(root, layer, pack, positions, Packed(self.recording.attended, groups), edits, offsets | more)
        outputs = [(n, e) for n in active for e in self.rows[n].edits if e.layer == layer and e.where == "output"]
        active_out = self._edited(out[:size], outputs, offsets)
        return active_out, out[size:]

    def _last(self, root: nn.Module, active: list[int], alone: list[int], states: Tensor) -> Tensor:
        """The last block: keys and values of every token, then the token that is read."""
        layer = len(self.recording.blocks) - 1
        offsets = self._offsets(active)
        groups = self._groups(active, [], offsets, {}, states.device)
        left: dict[int, tuple[Tensor, Tensor]] = {}
        if active:
            positions = torch.tensor(self._positions(active, []), device=states.device)
            leave = Packed(self.recording.attended, groups, leave=left)
            self._call(root, layer, states, positions, leave, self._inside(layer, active, []), offsets)
        ends = [offsets[n] + self._length(self.rows[n]) - 1 for n in active]
        singles = [self.recording.entering[layer][self._prompt(row), self.read][None] for row in self._of(alone)]
        pack = torch.cat([states[ends], *singles])
        if not len(pack):
            return pack
        numbers = active + alone
        at = {n: i for i, n in enumerate(numbers)}
        asks = self._last_groups(groups, active, alone, at, pack.device)
        positions = torch.full((len(pack),), self.read, device=pack.device)
        edits = [
            (n, e) for n, e in self._inside(layer, active, alone) if e.where != "keys" and self.read in e.positions
        ]
        out = self._call(
            root, layer, pack, positions, Packed(self.recording.attended, asks, left=left), edits, at, only_read=True
        )
        outputs = [
            (n, e) for n in active for e in self.rows[n].edits
            if e.layer == layer and e.where == "output" and self.read in e.positions
        ]  # fmt: skip
        return self._edited(out, outputs, at, only_read=True)

    def _call(
        self,
        root: nn.Module,
        layer: int,
        pack: Tensor,
        positions: Tensor,
        attend: Packed,
        edits: Sequence[tuple[int, Edit]],
        offsets: dict[int, int],
        only_read: bool = False,
    ) -> Tensor:
        self.calls += 1
        self.tokens += pack.shape[0]
        self.peak = max(self.peak, pack.shape[0])
        block = self.recording.blocks[layer]

        def change(values: Tensor, members: Sequence[tuple[int, Edit]]) -> Tensor:
            return self._edited(values, members, offsets, only_read=only_read)

        with attention(root, attend), _hooked(root, edits, change):
            try:
                out = block(pack[None], **self.recording.arguments(layer, positions))
            except Left:
                return pack
        return first(out)[0]

    # --- where everything stands

    def _prompt(self, row: Row) -> int:
        return self.recording.number[row.job[0]]

    def _offsets(self, numbers: Sequence[int]) -> dict[int, int]:
        found, at = {}, 0
        for n in numbers:
            found[n] = at
            at += self._length(self.rows[n])
        return found

    def _positions(self, active: Sequence[int], alone: Sequence[int]) -> list[int]:
        long = [p for n in active for p in range(self.rows[n].start, self.read + 1)]
        return long + [p for n in alone for p in self.rows[n].changed if p <= self.read]

    def _groups(
        self, active: Sequence[int], alone: Sequence[int], offsets: dict[int, int], more: dict[int, int], device: Any
    ) -> list[Group]:
        together: dict[tuple[int, tuple[int, ...], int | None], list[int]] = {}
        for n in active:
            row = self.rows[n]
            together.setdefault((self._prompt(row), tuple(range(row.start, self.read + 1)), row.start), []).append(
                offsets[n]
            )
        for n in alone:
            row = self.rows[n]
            tokens = tuple(p for p in row.changed if p <= self.read)
            together.setdefault((self._prompt(row), tokens, None), []).append(more[n])
        return [
            Group(
                prompt,
                torch.tensor(tokens, device=device),
                torch.tensor(starts, device=device)[:, None] + torch.arange(len(tokens), device=device),
                own,
            )
            for (prompt, tokens, own), starts in together.items()
        ]

    def _last_groups(
        self, groups: Sequence[Group], active: Sequence[int], alone: Sequence[int], at: dict[int, int], device: Any
    ) -> list[Group]:
        """The same rows, asking with one token each; groups keep their numbers, under which their keys were left."""
        query = torch.tensor([self.read], device=device)
        members: dict[tuple[int, int], list[int]] = {}
        for n in active:
            row = self.rows[n]
            members.setdefault((self._prompt(row), row.start), []).append(at[n])
        asks = [
            Group(g.prompt, query, torch.tensor(members[g.prompt, g.own_from or 0], device=device)[:, None], g.own_from)
            for g in groups
        ]
        single: dict[int, list[int]] = {}
        for n in alone:
            single.setdefault(self._prompt(self.rows[n]), []).append(at[n])
        return asks + [
            Group(prompt, query, torch.tensor(places, device=device)[:, None], None)
            for prompt, places in single.items()
        ]

    # --- edits

    def _inside(self, layer: int, active: Sequence[int], alone: Sequence[int]) -> list[tuple[int, Edit]]:
        """The edits inside this block, and those of its input that later layers of a window bring."""
        found: list[tuple[int, Edit]] = []
        for n in (*active, *alone):
            for number, edit in enumerate(self.rows[n].edits):
                begun = number == 0 and edit.where == "input"
                if edit.layer == layer and edit.where != "output" and not begun:
                    found.append((n, edit))
        return found

    def _edited(
        self, values: Tensor, edits: Sequence[tuple[int, Edit]], offsets: dict[int, int], *, only_read: bool = False
    ) -> Tensor:
        """A copy of packed `[token, width]` with these edits done; all of them at one place, or of the whole width."""
        if not edits:
            return values
        plan, source = self.work.plan, self.work.source
        where: list[int] = []
        news: list[Tensor | None] = []
        for n, edit in edits:
            row = self.rows[n]
            for order, position in enumerate(edit.positions):
                if position > self.read or (only_read and position != self.read):
                    continue
                single = only_read or (row.alone and edit.layer == row.layer)
                step = 0 if only_read else edit.positions.index(position) if single else position - row.start
                where.append(offsets[n] + step)
                news.append(source.value(row.job, edit.place, order, position, values.shape[-1]))
        if not where:
            return values
        at = torch.tensor(where, device=values.device)
        current = values[at]
        given = [new.to(current) for new in news if new is not None]
        out = values.clone()
        out[at] = plan.operation.apply(current, torch.stack(given) if given else None)
        return out


Change = Callable[[Tensor, Sequence[tuple[int, Edit]]], Tensor]


@contextmanager
def _hooked(root: nn.Module, edits: Sequence[tuple[int, Edit]], change: Change) -> Iterator[None]:
    """Do the edits of a block's inside while it runs."""
    sites: dict[Any, list[tuple[int, Edit]]] = {}
    for n, edit in edits:
        sites.setdefault(site_of(edit.place), []).append((n, edit))
    hooks = []
    for site, members in sites.items():
        module = root.get_submodule(site.module)
        if site.end == "input":
            hooks.append(module.register_forward_pre_hook(_before(site, members, change), with_kwargs=True))
        else:
            hooks.append(module.register_forward_hook(_after(site, members, change)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _changed(tensor: Tensor, site: Any, members: Sequence[tuple[int, Edit]], change: Change) -> Tensor:
    flat = tensor.reshape(-1, tensor.shape[-1])
    start, stop = site.columns or (0, flat.shape[-1])
    new = flat.clone()
    new[:, start:stop] = change(flat[:, start:stop], members)
    return new.reshape(tensor.shape)


def _before(site: Any, members: Sequence[tuple[int, Edit]], change: Change) -> Any:
    def hook(_module: nn.Module, args: tuple, kwargs: dict) -> Any:
        held = args[0] if args else next(iter(kwargs.values()))
        new = _changed(held, site, members, change)
        if site.kind == "stream":
            held.copy_(new)  # the skip path holds the same tensor, and the stream is both
            return None
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): new})

    return hook


def _after(site: Any, members: Sequence[tuple[int, Edit]], change: Change) -> Any:
    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        held = wire.unpack(output, site.item)
        return wire.repack(output, site.item, _changed(held, site, members, change))

    return hook
