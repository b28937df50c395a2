"""Pruning: cells that cannot change the logits that the metric reads are not computed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nnsplice import engine
from nnsplice.activations.access import site_of
from nnsplice.activations.prompts import Prompts
from nnsplice.atlas import Site, unwrap
from nnsplice.errors import ShortRow
from nnsplice.shown import counted
from nnsplice.sweeps.jobs import Jobs
from nnsplice.sweeps.plan import Plan
from nnsplice.sweeps.targets import Target, TargetPart
from nnsplice.warn import warn_caller


def split(model: engine.Model, plan: Plan) -> tuple[Jobs, Jobs]:
    """The cells to compute, and those known to have the corrupted run's value."""
    # A hook of the user's may mix tokens in any way.
    causal = plan.corrupted.is_causal(model) and not engine.has_code_around(unwrap(model).modules())
    to_compute = np.zeros((len(plan.corrupted), len(plan.targets)), dtype=bool)
    is_known, is_after = np.zeros_like(to_compute), np.zeros(len(plan.targets), dtype=bool)
    kinds, after = _kinds(model, plan), 0
    patched = plan.operation.name == "patch" and plan.corruption is None and not plan.foreign
    for prompts in plan.alike:
        has, can = np.zeros(len(plan.targets), dtype=bool), np.zeros(len(plan.targets), dtype=bool)
        is_after[:] = False
        for numbers, behind in kinds:
            target = plan.targets[numbers[0]]
            if not plan.has(target, prompts[0]):
                continue  # these prompts have no such cell
            has[numbers] = True
            can[numbers], is_after[numbers] = _reached(plan, target, prompts[0], behind) if causal else (True, False)
        unlike = [prompt for prompt in prompts if not (patched and same(plan.corrupted, plan.clean, prompt))]
        is_known[prompts] = has
        to_compute[unlike], is_known[unlike] = has & can, has & ~can
        after += len(unlike) * int(is_after.sum())
    jobs, known = Jobs.of_mask(to_compute), Jobs.of_mask(is_known)
    if not jobs and not known:
        raise ShortRow(
            "none of these tokens has a partner in its clean prompt, which is shorter",
            expected="sites at tokens that both prompts of a pair have, counted from the end",
        )
    if not jobs and after and after == len(known):
        raise ShortRow(
            f"every site stands after the position [{plan.metric.metric.position}] that the metric reads, so none can "
            "change it",
            expected="sites at or before that position, or a metric read later",
        )
    if after:
        warn_caller(
            f"{counted(after, 'cell')} after the position that the metric reads: no change there can reach it, so the "
            "value is that of the corrupted run"
        )
    return jobs, known


def _kinds(model: engine.Model, plan: Plan) -> list[tuple[list[int], tuple[bool, ...]]]:
    """Groups of targets that are changed at the same tokens, and whether each part is after the last attention.

    A part counts as after it if all of its sites are.
    """
    # Computed once per value: many cells are heads or tokens of one value.
    behind: dict[object, bool] = {}
    found: list[tuple[list[int], tuple[bool, ...]]] = []
    for numbers in plan.positions_alike:
        kinds: dict[tuple[bool, ...], list[int]] = {}
        for number in numbers:
            for site in map(site_of, plan.targets[number].places):
                if _value_of(site) not in behind:
                    behind[_value_of(site)] = engine.after_last_attention(model, site)
            parts = plan.targets[number].parts
            key = tuple(all(behind[_value_of(site_of(place))] for place in part.places) for part in parts)
            kinds.setdefault(key, []).append(number)
        found += [(members, key) for key, members in kinds.items()]
    return found


def _reached(plan: Plan, target: Target, prompt: int, behind: Sequence[bool]) -> tuple[bool, bool]:
    """Whether a target can change the logits that the metric reads, and whether all its tokens come after them.

    Args:
        behind: for each part, whether all of its sites come after the last attention, where no token reads another.
    """
    length = plan.corrupted.length(target.tower, prompt)
    shared, read = plan.shared_start(target, prompt), plan.metric.metric.position % length
    # Each token of a set's site counts separately: before the first difference of the pair, its other patches
    # change nothing either.
    can = any(
        token == read or not late
        for part, late in zip(target.parts, behind, strict=True)
        for token in _changed(plan, part, prompt)
        if shared <= token <= read
    )
    return can, all(min(plan.positions(part, prompt)) > read for part in target.parts)


def _changed(plan: Plan, part: TargetPart, prompt: int) -> list[int]:
    """The tokens that a part changes; for a knockout, the queries that see one of the removed keys."""
    if part.key is None:
        return plan.positions(part, prompt)
    return sorted({query for query, key in plan.edges(part, prompt) if key <= query})


def same(edited: Prompts, source: Prompts | None, prompt: int) -> bool:
    """Whether both prompts of a pair are equal, with their spans, so that patching changes nothing."""
    if source is None:
        return False
    a, b = edited.take([prompt]), source.take([prompt])
    return (a.identity(0), a.spans) == (b.identity(0), b.spans)


def _value_of(site: Site) -> tuple:
    """The value that a site is part of, without heads or columns."""
    return (*site.location, site.kind, site.tower)
