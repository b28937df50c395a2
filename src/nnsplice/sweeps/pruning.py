"""Which cells need not run: those whose change cannot reach the logits that the metric reads."""

from __future__ import annotations

import warnings

from nnsplice import engine
from nnsplice.activations.access import site_of
from nnsplice.activations.prompts import Prompts
from nnsplice.atlas import Site, peel
from nnsplice.errors import ShortRow
from nnsplice.shown import counted
from nnsplice.sweeps.cells import Part
from nnsplice.sweeps.plan import Job, Plan


def split(model: engine.Model, plan: Plan) -> tuple[tuple[Job, ...], tuple[Job, ...]]:
    """The cells to compute, and those that cannot differ from the corrupted run."""
    jobs: list[Job] = []
    known: list[Job] = []
    # A hook of the user's may mix tokens in any way.
    causal = engine.is_causal(model) and not _has_hooks(model)
    after = 0
    behind: dict[object, bool] = {}
    for number, target in enumerate(plan.targets):
        # Asked once of a value, whatever number of heads and tokens of it are cells.
        for site in map(site_of, target.places):
            if _value(site) not in behind:
                behind[_value(site)] = engine.after_last_attention(model, site)
        for prompt, length in enumerate(plan.corrupted.lengths(target.tower)):
            if not plan.has(target, prompt):
                continue  # this prompt has no such cell
            if plan.operation.name == "patch" and plan.corruption is None and same(plan.corrupted, plan.clean, prompt):
                known.append((prompt, number))
                continue
            if not causal:
                jobs.append((prompt, number))
                continue
            shared, read = plan.shared_start(target, prompt), plan.metric.metric.position % length
            where = [(part, _changed(plan, part, prompt)) for part in target.parts]
            after += all(min(plan.positions(part, prompt)) > read for part in target.parts)
            # Of a set each token of a place is looked at by itself: where a pair is one run still, its other patches
            # change nothing either, and behind the last attention no token reads another.
            can = any(
                token == read or not behind[_value(site_of(place))]
                for part, tokens in where
                for token in tokens
                if shared <= token <= read
                for place in part.places
            )
            (jobs if can else known).append((prompt, number))
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
        warnings.warn(
            f"{counted(after, 'cell')} after the position that the metric reads: no change there can reach it, so the "
            "value is that of the corrupted run",
            stacklevel=4,
        )
    return tuple(jobs), tuple(known)


def _changed(plan: Plan, part: Part, prompt: int) -> list[int]:
    """The tokens that are changed: of a knockout, the queries that see a key that they lose."""
    if part.key is None:
        return plan.positions(part, prompt)
    return sorted({query for query, key in plan.edges(part, prompt) if key <= query})


def same(edited: Prompts, source: Prompts | None, prompt: int) -> bool:
    """Whether both prompts of a pair are one, their spans and all, so that one patched into the other is itself."""
    if source is None:
        return False
    a, b = edited.take([prompt]), source.take([prompt])
    return (a.ids, a.decoder_ids, a.spans) == (b.ids, b.decoder_ids, b.spans)


def _has_hooks(model: engine.Model) -> bool:
    return engine.has_code_around(peel(model).modules())


def _value(site: Site) -> tuple:
    return (*site.location, site.kind, site.tower)
