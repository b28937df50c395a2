"""The cells of the trial of an executor: a few that cover all properties of the plan's cells."""

from __future__ import annotations

import random
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

from torch import nn

from nnsplice.atlas import Atlas, unwrap
from nnsplice.sweeps.executors import Work, whole_prompts
from nnsplice.sweeps.jobs import Job
from nnsplice.sweeps.targets import Target

#: The least number of cells in the trial, and the largest number of kinds of layer that it distinguishes.
CELLS, LAYERS = 4, 6


def probe_cells(work: Work) -> list[Job]:
    """A few jobs that together have every property of the plan's jobs."""
    chosen = random.Random(0)
    lengths = dict(zip((job[0] for job in work.plan.jobs), whole_prompts(work, work.plan.jobs), strict=True))
    ends = {max(lengths, key=lengths.__getitem__): "longest", min(lengths, key=lengths.__getitem__): "shortest"}
    kinds = _kinds_of_layer(work)
    alike: dict[frozenset[Hashable], list[Job]] = {}
    for job in work.plan.jobs:
        if job[0] in ends:
            alike.setdefault(frozenset(_properties(work, job, ends[job[0]], lengths[job[0]], kinds)), []).append(job)
    several = {properties: chosen.choice(members) for properties, members in alike.items()}
    missing, jobs = frozenset[Hashable]().union(*several), []
    while missing:
        best = max(several, key=lambda properties: len(properties & missing))
        jobs.append(several[best])
        missing -= best
    others = [job for members in alike.values() for job in members if job not in jobs]
    return sorted([*jobs, *chosen.sample(others, min(len(others), max(CELLS - len(jobs), 0)))])


def _properties(
    work: Work, job: Job, prompt: str, length: int, kinds: Mapping[tuple[str, int | None], Hashable]
) -> Iterator[Hashable]:
    target = work.plan.targets[job[1]]
    yield prompt
    yield from kinds_of_target(target)
    for part in target.parts:
        yield "layer", kinds.get((part.tower, part.cell.layer))
    # The third of the prompt that the first changed token is in.
    yield prompt, 3 * min(min(work.plan.positions(part, job[0])) for part in target.parts) // length


def kinds_of_target(target: Target) -> Iterator[Hashable]:
    """Properties of a cell that may need another executor: its kinds of site, and the layers of a set."""
    for part in target.parts:
        yield "kind", part.cell.component, type(part.position), len(part.places)
    layers = [part.cell.layer for part in target.parts]
    yield "several", len(layers) > 1, len(set(layers)) < len(layers)


def _kinds_of_layer(work: Work) -> dict[tuple[str, int | None], Hashable]:
    """The kind of every layer: its modules, their settings and hooks, and whether it is the first or the last."""
    root = unwrap(work.model)
    found: dict[tuple[str, int | None], Hashable] = {}
    for tower in Atlas.of(root).towers.values():
        blocks = [root.get_submodule(block.module) for block in tower.blocks]
        kinds: list[Hashable] = [_structure_of(block, settings=True) for block in blocks]
        if len(set(kinds)) > LAYERS:  # a setting that differs in each layer, such as its number
            kinds = [_structure_of(block, settings=False) for block in blocks]
        order = {kind: number for number, kind in enumerate(dict.fromkeys(kinds))}
        last = len(blocks) - 1
        for number, kind in enumerate(kinds):
            found[tower.name, number] = (min(order[kind], LAYERS), number == 0, number == last)
    return found


def _structure_of(block: nn.Module, *, settings: bool) -> Hashable:
    return tuple(
        (
            name,
            type(module),
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
            tuple(sorted((k, v) for k, v in vars(module).items() if _is_setting(k, v))) if settings else (),
        )
        for name, module in block.named_modules()
    )


def _is_setting(name: str, value: Any) -> bool:
    numbers = ("layer_idx", "layer_id", "layer_index", "layer_number", "block_idx")
    return isinstance(value, bool | int | float | str) and not name.startswith("_") and name not in numbers
