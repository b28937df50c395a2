"""What each job is in a packed run: where its row begins, and what is written on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nnsplice.activations.access import site_of
from nnsplice.atlas import Block, Site, Tower
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
    #: Whether that block runs for the changed tokens alone: the others come out of it as they were recorded.
    alone: bool

    @property
    def changed(self) -> tuple[int, ...]:
        """The tokens that its first edit changes."""
        return self.edits[0].positions


def rows_of(work: Work, jobs: Sequence[Job], tower: Tower) -> list[Row]:
    """The rows of these jobs.

    Raises:
        NotImplementedError: a site that stands in no block.
    """
    homes = _homes(tower)
    return [_row(work, job, tower, homes) for job in jobs]


def _homes(tower: Tower) -> Mapping[str, int]:
    return {block.module: block.index for block in tower.blocks}


def _row(work: Work, job: Job, tower: Tower, homes: Mapping[str, int]) -> Row:
    target = work.plan.targets[job[1]]
    positions = tuple(work.plan.positions(target, job[0]))
    edits = tuple(_edit(place, tower, homes, positions) for place in target.places)
    first = edits[0]
    # What leaves a layer enters the next.
    layer = first.layer + (first.where == "output")
    return Row(job, edits, layer, min(positions), first.where == "point")


def _edit(place: Path, tower: Tower, homes: Mapping[str, int], positions: tuple[int, ...]) -> Edit:
    site = site_of(place)
    if site.kind not in ("plain", "stream"):
        raise NotImplementedError(f"{place.place} is derived from several values")
    if site.module in homes:
        return Edit(place, homes[site.module], site.end, positions)
    for module, layer in homes.items():
        if site.module.startswith(f"{module}."):
            return Edit(place, layer, _inside(site, tower.blocks[layer]), positions)
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
