"""What each job is in a packed run: where its row begins, and what is written on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from nnsplice.activations.access import site_of
from nnsplice.atlas import Block, Site, Tower, peel
from nnsplice.paths import Path
from nnsplice.sweeps.executors import Work
from nnsplice.sweeps.plan import Job


@dataclass(frozen=True, slots=True)
class Edit:
    """A write of one job at one place: which layer, and which of the prompt's tokens."""

    place: Path
    layer: int
    #: `input` or `output` of the block itself, `point` inside it where a token's change stays with the token until the
    #: next layer, `keys` where other tokens read it in the same layer.
    where: str
    positions: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """One job, from the first layer that it changes."""

    job: Job
    edits: tuple[Edit, ...]
    #: The first block that runs for it, and the first token that does.
    layer: int
    start: int
    #: The token that the metric reads; nothing after it runs.
    read: int
    #: Its prompt: by its order among the recorded ones, and where it begins among the recorded tokens.
    prompt: int
    base: int
    #: Whether that block runs for the changed tokens alone: the others come out of it as they were recorded.
    alone: bool

    @property
    def length(self) -> int:
        """How many tokens run."""
        return self.read + 1 - self.start

    @property
    def changed(self) -> tuple[int, ...]:
        """The tokens that its first edit changes, as far as they can matter."""
        return tuple(position for position in self.edits[0].positions if position <= self.read)


def rows_of(
    work: Work, jobs: Sequence[Job], tower: Tower, bases: Mapping[int, int], *, alone: bool = True
) -> list[Row]:
    """The rows of these jobs.

    Args:
        bases: prompt -> where it begins among the recorded tokens, in the order of these.
        alone: whether a block can run for some tokens of a prompt alone.

    Raises:
        NotImplementedError: a site that stands in no block.
    """
    root = peel(work.model)
    blocks = [_Home(block, root.get_submodule(block.module)) for block in tower.blocks]
    homes = {home.block.module: home for home in blocks}
    order = {prompt: number for number, prompt in enumerate(bases)}
    lengths = work.plan.corrupted.lengths("decoder")
    rows = []
    for job in jobs:
        prompt, target = job[0], work.plan.targets[job[1]]
        positions = tuple(work.plan.positions(target, prompt))
        edits = tuple(_edit(place, homes, positions) for place in target.places)
        first = edits[0]
        rows.append(
            Row(
                job,
                edits,
                layer=first.layer + (first.where == "output"),  # what leaves a layer enters the next
                start=min(positions),
                read=work.plan.metric.metric.position % lengths[prompt],
                prompt=order[prompt],
                base=bases[prompt],
                alone=alone and first.where == "point",
            )
        )
    return rows


@dataclass(frozen=True, slots=True)
class _Home:
    """A block, and its module."""

    block: Block
    module: nn.Module

    def end(self, end: str) -> str:
        """Where an edit of the block's own input or output is made.

        A value is what a module returned, before hooks of the user's see it, and what it was given, after they did. So
        where there are such hooks the block runs, and the edit is made between the two.
        """
        if end == "input":
            return "keys" if self.module._forward_pre_hooks else "input"
        return "point" if self.module._forward_hooks else "output"


def _edit(place: Path, homes: Mapping[str, _Home], positions: tuple[int, ...]) -> Edit:
    site = site_of(place)
    if site.kind not in ("plain", "stream"):
        raise NotImplementedError(f"{place.place} is derived from several values")
    if site.module in homes:
        home = homes[site.module]
        return Edit(place, home.block.index, home.end(site.end), positions)
    for module, home in homes.items():
        if site.module.startswith(f"{module}."):
            return Edit(place, home.block.index, _inside(site, home.block), positions)
    raise NotImplementedError(f"{place.place} stands in no layer")


def _inside(site: Site, block: Block) -> str:
    """Whether other tokens of the same layer read what is written there."""
    after = {block.o, block.attn_added, block.mlp_added, block.mlp, block.down, block.up, block.gate, block.gate_up}
    after |= {block.mid and block.mid[0]} if block.mid else set()
    if site.module in after or site.module == block.q:
        return "point"
    if site.module == block.attn and site.end == "output":
        return "point"
    if site.module == block.fused and site.columns is not None and block.layout is not None:
        start, stop = site.columns
        if any(low <= start and stop <= high for low, high in block.layout.whole("q")):
            return "point"
    return "keys"
