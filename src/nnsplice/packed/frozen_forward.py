"""The forward pass of rows with frozen branches: only blocks with an edit or read inside run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nnsplice import wire
from nnsplice.activations.access import site_of
from nnsplice.atlas import Block, Site
from nnsplice.packed.attention import PackedAttention, attention
from nnsplice.packed.base_runs import BaseRuns
from nnsplice.packed.cost import Cost
from nnsplice.packed.edits import Numbered, Readings, edited, hooked
from nnsplice.packed.frozen_rows import FrozenBranch, Moved, MovedRow
from nnsplice.packed.indices import Indices, on_device
from nnsplice.packed.layout import Find, PackLayout
from nnsplice.packed.recording import Recording
from nnsplice.packed.rows import Edit, PlacedItem, Read, SiteLocator
from nnsplice.packed.running import bucket_size
from nnsplice.paths import Path


class _AllRead(Exception):  # no error: ends a block when all its reads are done
    pass


@dataclass
class FrozenForward:
    """The state of a pass of rows with frozen branches, with the change of each row's stream (`delta`)."""

    base: BaseRuns
    recording: Recording
    rows: Sequence[MovedRow]
    branches: Sequence[FrozenBranch]
    #: The change of the stream `[token, width]` by the row's index.
    delta: dict[int, Tensor] = field(default_factory=dict)
    ends: dict[int, Tensor] = field(default_factory=dict)
    moved: dict[tuple[int, Read], Moved] = field(default_factory=dict)
    cost: Cost = field(default_factory=Cost)

    def run(self) -> None:
        """Go through all layers."""
        entering = self.recording.entering
        for number, row in enumerate(self.rows):
            self.delta[number] = entering[0].new_zeros(len(row.tokens), entering[0].shape[-1])
        for layer in range(len(self.recording.blocks)):
            self._stream(layer, "input", entering[layer])
            inside = [n for n in self._running() if any(map(_is_inside(layer), self._all(n)))]
            if inside:
                self._inside(layer, inside)
            self._stream(layer, "output", entering[layer + 1])
        for number, row in enumerate(self.rows):
            end = row.prepared.row.end
            if end is not None:
                state = entering[-1][row.prepared.base + end]
                at = row.tokens.index(end) if end in row.tokens else None
                self.ends[number] = state if at is None else state + self.delta[number][at].to(state)

    def _running(self) -> list[int]:
        return [n for n, row in enumerate(self.rows) if row.tokens]

    def _all(self, number: int) -> tuple[PlacedItem, ...]:
        row = self.rows[number].prepared
        return (*row.edits, *row.reads)

    def _recorded(self, number: int, of: Tensor) -> Tensor:
        """The rows of recorded values `[recorded token, width]` at a row's tokens: `[token, width]`."""
        row = self.rows[number]
        return of[on_device([row.prepared.base + token for token in row.tokens], of.device)]

    def _stream(self, layer: int, where: str, recorded: Tensor) -> None:
        """Edits and reads of the stream as it enters or leaves a block."""
        for number in self._running():
            here = [placed for placed in self._all(number) if (placed.layer, placed.where) == (layer, where)]
            if not here:
                continue
            before, tokens = self._recorded(number, recorded), self.rows[number].tokens
            now = before + self.delta[number].to(before)
            find = _finder(tokens)
            now = edited(now, [(number, placed) for placed in here if isinstance(placed.what, Edit)], find)
            self.delta[number] = now - before
            for placed in here:
                if isinstance(placed.what, Read):
                    self._note(number, placed.what, lambda at, now=now: now[on_device(at, now.device)])

    def _note(self, number: int, read: Read, values: Callable[[list[int]], Tensor]) -> None:
        tokens = self.rows[number].tokens
        positions = tuple(position for position in read.positions if position in tokens)
        if positions:
            self.moved[number, read] = positions, values([tokens.index(position) for position in positions])

    # --- inside a block

    def _inside(self, layer: int, numbers: Sequence[int]) -> None:
        """Run a block up to its last edit or read, and update the streams of the rows that edit it."""
        items: list[Numbered] = []
        wanted: list[tuple[int, Read, Read]] = []  # the row, its read, and the same read at the tokens that run
        own: dict[tuple[int, Site], Read] = {}
        locator = SiteLocator(self.recording)
        for number in numbers:
            tokens = self.rows[number].tokens
            for placed in filter(_is_inside(layer), self._all(number)):
                if isinstance(placed.what, Edit):
                    items.append((number, placed))
                    place = self._added(number, layer, placed)
                    own[number, site_of(place)] = Read(place, tokens)
                    continue
                assert isinstance(placed.what, Read)
                positions = tuple(position for position in placed.what.positions if position in tokens)
                if positions:
                    cut = Read(placed.what.place, positions)
                    wanted.append((number, placed.what, cut))
        reads = {(number, cut) for number, _, cut in wanted} | {(number, read) for (number, _), read in own.items()}
        items += [(number, locator.located(read)) for number, read in reads]
        readings: Readings = {}
        self._run_block(layer, numbers, items, readings, len(reads))
        for number, read, cut in wanted:
            self.moved[number, read] = cut.positions, readings[number, cut]
        for number in numbers:
            self._move(number, layer, {site: readings[n, read] for (n, site), read in own.items() if n == number})

    def _added(self, number: int, layer: int, edit: PlacedItem) -> Path:
        """The output of the branch that an edit is in; for an edit of the stream, the edited site itself."""
        block = self.recording.tower.blocks[layer]
        if block.mid is not None and block.mid == (edit.site.module, edit.site.end):
            return edit.what.place
        free = [branch for branch in self.rows[number].free if branch.layer == layer]
        inside = [branch for branch in free if _in_attention(branch.site, block) == _in_attention(edit.site, block)]
        if len(inside) != 1:
            raise NotImplementedError(f"{edit.what.place.place} is in no branch that may run freely")
        return inside[0].added

    def _move(self, number: int, layer: int, read: Mapping[Site, Tensor]) -> None:
        """Add the effect of a row's edits in this layer to its stream."""
        block, kept = self.recording.tower.blocks[layer], self.recording.kept
        total = self.delta[number]
        for site in sorted(read, key=lambda site: not _in_attention(site, block)):  # attention comes first
            if site in kept and (site.module, site.end) != block.mid:
                total = total.to(read[site]) + read[site] - self._recorded(number, kept[site]).to(read[site])
            else:
                attn = next(b.site for b in self.branches if b.layer == layer and _in_attention(b.site, block))
                before = self.recording.entering[layer] + kept[attn].to(self.recording.entering[layer])
                total = read[site] - self._recorded(number, before).to(read[site])
        self.delta[number] = total

    def _run_block(
        self, layer: int, numbers: Sequence[int], items: Sequence[Numbered], readings: Readings, count: int
    ) -> None:
        recording = self.recording
        rows = [row.prepared for row in self.rows]
        dependent = [n for n in numbers if not self.rows[n].independent]
        layout = PackLayout(rows, dependent, [n for n in numbers if self.rows[n].independent])
        order = [*layout.full, *layout.partial]
        entering = recording.entering[layer]
        there = Indices(entering.device)
        tokens = there.add(layout.recorded)
        groups = () if recording.whole.calls else layout.groups(recording.total, bucket_size(recording), there)
        pack = entering[tokens.tensor] + torch.cat([self.delta[n].to(entering.device) for n in order])
        find: list[Find] = [layout.find]
        with ExitStack() as stack:
            # Both sets of hooks are prepended, before the user's; the ones registered last run first.
            stack.enter_context(self._frozen_branches(layer, layout, lambda: find[0], lambda: len(readings) >= count))
            stack.enter_context(hooked(self.base.root, items, lambda: find[0], readings))
            if recording.whole.calls:
                running = recording.whole.running(layout, lambda inner: find.__setitem__(0, inner or layout.find))
                stack.enter_context(running)
            else:
                attend = PackedAttention(recording.attended, recording.masks, groups)
                stack.enter_context(attention(self.base.root, attend))
            with suppress(_AllRead):
                recording.blocks[layer](pack[None], **recording.arguments(layer, tokens.tensor))
        block = recording.tower.blocks[layer]
        self.cost += Cost(
            len(pack), block_calls=1, flops=len(pack) * self.base.cost_model.per_token(*block.modules), peak=len(pack)
        )

    @contextmanager
    def _frozen_branches(
        self, layer: int, layout: PackLayout, find: Callable[[], Find], done: Callable[[], bool]
    ) -> Iterator[None]:
        """In this block frozen branches return their recorded outputs, and the block ends when all reads are done."""
        root, hooks = self.base.root, []
        for branch in (branch for branch in self.branches if branch.layer == layer):
            frozen = [n for n in (*layout.full, *layout.partial) if branch not in self.rows[n].free]
            hook = self._freeze(branch.site, frozen, find, done)
            hooks.append(root.get_submodule(branch.site.module).register_forward_hook(hook, prepend=True))
        modules = {placed.site.module for n in layout.offsets for placed in self._all(n) if placed.layer == layer}
        for name in modules:
            end = root.get_submodule(name).register_forward_hook(lambda *_: _stop_if(done()), prepend=True)
            hooks.append(end)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _freeze(self, site: Site, numbers: Sequence[int], find: Callable[[], Find], done: Callable[[], bool]) -> Any:
        recorded = self.recording.kept[site]

        def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
            _stop_if(done())
            places = [(find()(n, t), self.rows[n].prepared.base + t) for n in numbers for t in self.rows[n].tokens]
            here = [(at, token) for at, token in places if at is not None]
            if not here:
                return None
            held = wire.unpack(output, site.item)
            flat = held.reshape(-1, held.shape[-1]).clone()
            at, tokens = zip(*here, strict=True)
            flat[on_device(at, flat.device)] = recorded[on_device(tokens, recorded.device)].to(flat)
            return wire.repack(output, site.item, flat.reshape(held.shape))

        return hook


def _stop_if(now: bool) -> None:
    if now:
        raise _AllRead


def _is_inside(layer: int) -> Callable[[PlacedItem], bool]:
    return lambda placed: placed.layer == layer and placed.where not in ("input", "output")


def _in_attention(site: Site, block: Block) -> bool:
    if site.module in (block.mixer_added, block.o, block.q, block.k, block.v, block.fused):
        return True
    home = block.mixes
    return home is not None and (site.module == home or site.module.startswith(f"{home}."))


def _finder(tokens: Sequence[int]) -> Find:
    order = {token: place for place, token in enumerate(tokens)}
    return lambda _, position: order.get(position)
