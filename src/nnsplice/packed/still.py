"""Rows with frozen branches: the direct change of the stream, and what later sites read of it.

A branch is an attention or an MLP. Where every branch but the edited one adds what it added in the recorded run, an
edit moves the stream by one difference, from where it is made to the end. So no block has to run between the edit and a
site that reads it; and a block that is read runs only as far as the last site that is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from nnsplice import engine, wire
from nnsplice.activations.access import site_of
from nnsplice.atlas import Block, Site
from nnsplice.packed.attention import Packed, attention
from nnsplice.packed.base import Base
from nnsplice.packed.cost import Cost
from nnsplice.packed.edits import Find, Numbered, Readings, edited, hooked
from nnsplice.packed.heads import Head
from nnsplice.packed.indices import Indices, on
from nnsplice.packed.layout import Layout
from nnsplice.packed.recording import Recording
from nnsplice.packed.rows import Begun, Edit, Homes, Placed, Read, Row, begun
from nnsplice.packed.run import grain_of, recorded
from nnsplice.paths import Path

#: What a row reads, where its edit moved it: positions, and `[position, width]`.
Moved = tuple[tuple[int, ...], Tensor]


@dataclass(frozen=True, slots=True)
class Branch:
    """One attention or MLP: its layer, and the site of what it adds to the stream."""

    layer: int
    added: Path

    @property
    def site(self) -> Site:
        """The site as the model has it."""
        return site_of(self.added)


@dataclass(frozen=True, slots=True)
class StillRow:
    """A row, and the branches that its edits are in: these run freely where they are edited, all others stand still."""

    row: Row
    free: frozenset[Branch]


@dataclass(frozen=True)
class StillRan:
    """What rows gave whose branches stood still."""

    head: Head
    #: By the row's number, the state that left the last block at its `end`: `[width]`.
    ends: Mapping[int, Tensor]
    #: By the row's number and the read; at other tokens, and where it is missing, a read has the recorded values.
    moved: Mapping[tuple[int, Read], Moved]
    cost: Cost


def run_still(base: Base, rows: Sequence[StillRow], branches: Sequence[Branch]) -> StillRan:
    """Run rows of which every branch stands still but their own.

    Args:
        base: has to keep what all branches add: `Base(..., keep=[branch.added for branch in branches])`.
        branches: all of the model's.

    Raises:
        NotImplementedError: this model, or one of these sites, is not covered.
    """
    recording, spent = recorded(base, [row.row.prompt for row in rows])
    if any(block.post_norm or block.scale != 1.0 or block.beside for block in recording.tower.blocks):
        raise NotImplementedError("its stream is normed or scaled on its way, so that a difference does not stay one")
    if engine.has_code_around(module for block in recording.blocks for module in block.modules()):
        raise NotImplementedError("hooks of the user's stand in its blocks, which may change a difference on its way")
    if any(row.row.cuts for row in rows):
        raise NotImplementedError("edges of attention are cut in rows whose branches run")
    homes = Homes(recording)
    walk = _Walk(base, recording, [_walker(recording, homes, row) for row in rows], branches)
    with torch.no_grad():
        walk.run()
    return StillRan(recording.head, walk.ends, walk.moved, spent + walk.cost)


# --- which tokens of a row matter -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Walker:
    """A row on its way: `begun.changed` are its tokens."""

    begun: Begun
    free: frozenset[Branch]
    #: Whether its tokens have nothing to do with each other.
    narrow: bool

    @property
    def tokens(self) -> tuple[int, ...]:
        """The tokens whose stream may be moved, as far as that is wanted."""
        return self.begun.changed


def _walker(recording: Recording, homes: Homes, asked: StillRow) -> _Walker:
    row = begun(asked.row, homes)
    wanted = {position for read in row.reads for position in read.what.positions} | {row.row.end}
    sent = {position for edit in row.edits for position in edit.what.positions}
    narrow = not recording.whole.calls and _is_narrow(row, recording)
    tokens = sorted(sent & wanted) if narrow else range(row.start, row.last + 1) if row.edits else ()
    return _Walker(replace(row, changed=tuple(tokens), alone=narrow), asked.free, narrow)


def _is_narrow(row: Begun, recording: Recording) -> bool:
    """Whether no token of the row reads what is moved at another one."""
    inside = [edit for edit in row.edits if edit.where not in ("input", "output")]
    # A second edited site would be reached by the first, and attention then mixes its tokens.
    if len({edit.layer for edit in inside}) > 1 or (inside and len(inside) < len(row.edits)):
        return False
    if any(edit.where == "keys" for edit in inside):
        return False
    return not any(_mixed(read.site, recording.tower.blocks[read.layer]) for read in row.reads)


def _mixed(site: Site, block: Block) -> bool:
    """Whether attention has mixed tokens there. Of what stands in it, only the projections are known to come before."""
    home = block.mixes
    if home is None or not (site.module == home or site.module.startswith(f"{home}.")):
        return site.module in (block.mixer_added, block.o)
    if site.module == home:
        return site.end == "output"
    return site.module not in (block.q, block.k, block.v, block.fused)


# --- the walk ---------------------------------------------------------------------------------------------------------


class _Done(Exception):  # no error: the way out of a block of which nothing more is wanted
    pass


@dataclass
class _Walk:
    """From layer to layer, with what each row has moved the stream by."""

    base: Base
    recording: Recording
    walkers: Sequence[_Walker]
    branches: Sequence[Branch]
    #: By the row's number: `[token, width]`.
    delta: dict[int, Tensor] = field(default_factory=dict)
    ends: dict[int, Tensor] = field(default_factory=dict)
    moved: dict[tuple[int, Read], Moved] = field(default_factory=dict)
    cost: Cost = field(default_factory=Cost)

    def run(self) -> None:
        """All layers."""
        entering = self.recording.entering
        for number, walker in enumerate(self.walkers):
            self.delta[number] = entering[0].new_zeros(len(walker.tokens), entering[0].shape[-1])
        for layer in range(len(self.recording.blocks)):
            self._stream(layer, "input", entering[layer])
            inside = [n for n in self._running() if any(map(_stands_inside(layer), self._all(n)))]
            if inside:
                self._inside(layer, inside)
            self._stream(layer, "output", entering[layer + 1])
        for number, walker in enumerate(self.walkers):
            end = walker.begun.row.end
            if end is not None:
                state = entering[-1][walker.begun.base + end]
                at = walker.tokens.index(end) if end in walker.tokens else None
                self.ends[number] = state if at is None else state + self.delta[number][at].to(state)

    def _running(self) -> list[int]:
        return [n for n, walker in enumerate(self.walkers) if walker.tokens]

    def _all(self, number: int) -> tuple[Placed, ...]:
        row = self.walkers[number].begun
        return (*row.edits, *row.reads)

    def _recorded(self, number: int, of: Tensor) -> Tensor:
        """What is recorded at a row's tokens, of values of all recorded tokens."""
        walker = self.walkers[number]
        return of[on([walker.begun.base + token for token in walker.tokens], of.device)]

    def _stream(self, layer: int, where: str, recorded: Tensor) -> None:
        """Edits and reads of the stream as it enters or leaves a block."""
        for number in self._running():
            here = [placed for placed in self._all(number) if (placed.layer, placed.where) == (layer, where)]
            if not here:
                continue
            before, tokens = self._recorded(number, recorded), self.walkers[number].tokens
            now = before + self.delta[number].to(before)
            find = _finder(tokens)
            now = edited(now, [(number, placed) for placed in here if isinstance(placed.what, Edit)], find)
            self.delta[number] = now - before
            for placed in here:
                if isinstance(placed.what, Read):
                    self._note(number, placed.what, lambda at, now=now: now[on(at, now.device)])

    def _note(self, number: int, read: Read, values: Callable[[list[int]], Tensor]) -> None:
        tokens = self.walkers[number].tokens
        positions = tuple(position for position in read.positions if position in tokens)
        if positions:
            self.moved[number, read] = positions, values([tokens.index(position) for position in positions])

    # --- inside a block

    def _inside(self, layer: int, numbers: Sequence[int]) -> None:
        """Run a block as far as anything in it is edited or read, and move the streams of the rows that edit it."""
        asked: list[Numbered] = []
        wanted: list[tuple[int, Read, Read]] = []  # the row, what it asked for, and the same at the tokens that run
        own: dict[tuple[int, Site], Read] = {}
        homes = Homes(self.recording)
        for number in numbers:
            tokens = self.walkers[number].tokens
            for placed in filter(_stands_inside(layer), self._all(number)):
                if isinstance(placed.what, Edit):
                    asked.append((number, placed))
                    place = self._added(number, layer, placed)
                    own[number, site_of(place)] = Read(place, tokens)
                    continue
                assert isinstance(placed.what, Read)
                positions = tuple(position for position in placed.what.positions if position in tokens)
                if positions:
                    cut = Read(placed.what.place, positions)
                    wanted.append((number, placed.what, cut))
        reads = {(number, cut) for number, _, cut in wanted} | {(number, read) for (number, _), read in own.items()}
        asked += [(number, homes.placed(read)) for number, read in reads]
        readings: Readings = {}
        self._run_block(layer, numbers, asked, readings, len(reads))
        for number, read, cut in wanted:
            self.moved[number, read] = cut.positions, readings[number, cut]
        for number in numbers:
            self._move(number, layer, {site: readings[n, read] for (n, site), read in own.items() if n == number})

    def _added(self, number: int, layer: int, edit: Placed) -> Path:
        """Where the effect of an edit inside a block is added to the stream: by its branch, or it is the stream."""
        block = self.recording.tower.blocks[layer]
        if block.mid is not None and block.mid == (edit.site.module, edit.site.end):
            return edit.what.place
        free = [branch for branch in self.walkers[number].free if branch.layer == layer]
        inside = [branch for branch in free if _in_attention(branch.site, block) == _in_attention(edit.site, block)]
        if len(inside) != 1:
            raise NotImplementedError(f"{edit.what.place.place} is in no branch that may run freely")
        return inside[0].added

    def _move(self, number: int, layer: int, read: Mapping[Site, Tensor]) -> None:
        """Move a row's stream by what its own edits did in this layer."""
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
        self, layer: int, numbers: Sequence[int], asked: Sequence[Numbered], readings: Readings, count: int
    ) -> None:
        recording = self.recording
        rows = [walker.begun for walker in self.walkers]
        long = [n for n in numbers if not self.walkers[n].narrow]
        layout = Layout(rows, long, [n for n in numbers if self.walkers[n].narrow])
        order = [*layout.long, *layout.short]
        entering = recording.entering[layer]
        there = Indices(entering.device)
        tokens = there.add(layout.recorded)
        groups = () if recording.whole.calls else layout.groups(recording.total, grain_of(recording), there)
        pack = entering[tokens.tensor] + torch.cat([self.delta[n].to(entering.device) for n in order])
        find: list[Find] = [layout.find]
        with ExitStack() as stack:
            # Hooks of both go before the user's; those that are registered last run first.
            stack.enter_context(self._standing(layer, layout, lambda: find[0], lambda: len(readings) >= count))
            stack.enter_context(hooked(self.base.root, asked, lambda: find[0], readings))
            if recording.whole.calls:
                running = recording.whole.running(layout, lambda inner: find.__setitem__(0, inner or layout.find))
                stack.enter_context(running)
            else:
                attend = Packed(recording.attended, recording.masks, groups)
                stack.enter_context(attention(self.base.root, attend))
            with suppress(_Done):
                recording.blocks[layer](pack[None], **recording.arguments(layer, tokens.tensor))
        block = recording.tower.blocks[layer]
        self.cost += Cost(
            len(pack), block_calls=1, flops=len(pack) * self.base.law.per_token(*block.modules), peak=len(pack)
        )

    @contextmanager
    def _standing(
        self, layer: int, layout: Layout, find: Callable[[], Find], done: Callable[[], bool]
    ) -> Iterator[None]:
        """Let branches add what they added before, and leave the block when everything is read."""
        root, hooks = self.base.root, []
        for branch in (branch for branch in self.branches if branch.layer == layer):
            still = [n for n in (*layout.long, *layout.short) if branch not in self.walkers[n].free]
            hook = self._standing_still(branch.site, still, find, done)
            hooks.append(root.get_submodule(branch.site.module).register_forward_hook(hook, prepend=True))
        modules = {placed.site.module for n in layout.offsets for placed in self._all(n) if placed.layer == layer}
        for name in modules:
            left = root.get_submodule(name).register_forward_hook(lambda *_: _leave(done()), prepend=True)
            hooks.append(left)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _standing_still(
        self, site: Site, numbers: Sequence[int], find: Callable[[], Find], done: Callable[[], bool]
    ) -> Any:
        recorded = self.recording.kept[site]

        def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
            _leave(done())
            places = [(find()(n, t), self.walkers[n].begun.base + t) for n in numbers for t in self.walkers[n].tokens]
            here = [(at, token) for at, token in places if at is not None]
            if not here:
                return None
            held = wire.unpack(output, site.item)
            flat = held.reshape(-1, held.shape[-1]).clone()
            at, tokens = zip(*here, strict=True)
            flat[on(at, flat.device)] = recorded[on(tokens, recorded.device)].to(flat)
            return wire.repack(output, site.item, flat.reshape(held.shape))

        return hook


def _leave(now: bool) -> None:
    if now:
        raise _Done


def _stands_inside(layer: int) -> Callable[[Placed], bool]:
    return lambda placed: placed.layer == layer and placed.where not in ("input", "output")


def _in_attention(site: Site, block: Block) -> bool:
    if site.module in (block.mixer_added, block.o, block.q, block.k, block.v, block.fused):
        return True
    home = block.mixes
    return home is not None and (site.module == home or site.module.startswith(f"{home}."))


def _finder(tokens: Sequence[int]) -> Find:
    order = {token: place for place, token in enumerate(tokens)}
    return lambda _, position: order.get(position)
