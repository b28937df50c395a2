"""Which executor runs a plan: the fastest that gives the right numbers on this very model."""

from __future__ import annotations

import math
import random
import weakref
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from nnsplice import engine
from nnsplice.activations.access import site_of
from nnsplice.atlas import fingerprint, peel
from nnsplice.errors import BadArgument, NnspliceError
from nnsplice.packed.cost import Cost
from nnsplice.sweeps.executors import Executor, Work, batched, reference
from nnsplice.sweeps.packing import packed

EXECUTORS: dict[str, Executor] = {"reference": reference, "batched": batched, "packed": packed}
#: How far two ways of computing one number may lie apart, in the model's dtype, before one of them is wrong.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1}
#: Cells that are computed both ways before packed is trusted.
PROBES = 4

_trusted: weakref.WeakKeyDictionary[nn.Module, dict[object, tuple[str, str]]] = weakref.WeakKeyDictionary()


def choose(name: str, work: Work) -> tuple[str, str, Cost]:
    """The executor's name, why it is not the fastest where that is so, and what it cost to know."""
    if name not in (*EXECUTORS, "auto"):
        raise BadArgument(f"there is no executor {name!r}", expected=f"auto, {', '.join(EXECUTORS)}")
    targets = work.plan.targets
    derived = [t.cell.path for t in targets if any(site_of(p).kind in ("pattern", "expert") for p in t.places)]
    if derived and name != "reference":
        note = f"{derived[0]} is derived from several values of a run, so each cell runs by itself"
        if name != "auto":
            raise BadArgument(note, expected='executor="reference" or "auto"')
        return "reference", note, Cost()
    if name != "auto":
        return name, "", Cost()
    if not work.plan.jobs:
        return "batched", "", Cost()
    return _probe(work)


def _probe(work: Work) -> tuple[str, str, Cost]:
    """The fastest that is right for this model and these kinds of site, and why no faster. Asked once of a model."""
    root = peel(work.model)
    kinds = frozenset(target.cell.component for target in work.plan.targets)
    window = max(len(target.places) for target in work.plan.targets)
    # Numbers of hooks never come again; what one does to packed tokens is found out with it in place.
    hooks = tuple(key for m in root.modules() for key in (*m._forward_hooks, *m._forward_pre_hooks))
    there = (fingerprint(root), hooks, engine.is_edited(work.model))
    question = (*there, kinds, work.plan.operation.way, window > 1, work.plan.corruption is not None)
    known = _trusted.setdefault(root, {})
    cost = Cost()
    if question not in known:
        known[question], cost = _compare(work)
    return *known[question], cost


def _compare(work: Work) -> tuple[tuple[str, str], Cost]:
    """All ways on a few cells of one prompt, one of each kind of site where there are that many."""
    chosen = random.Random(0)
    prompt = work.plan.jobs[0][0]
    kinds: dict[str, list] = {}
    for job in work.plan.jobs:
        if job[0] == prompt:
            kinds.setdefault(work.plan.targets[job[1]].cell.component, []).append(job)
    jobs = [chosen.choice(members) for members in kinds.values()]
    others = [job for members in kinds.values() for job in members if job not in jobs]
    jobs = sorted([*jobs, *chosen.sample(others, min(len(others), max(PROBES - len(jobs), 0)))])
    asked = replace(work.plan.metric.metric, name="logits", rule=_direction, answers={}, compares=False, local=False)
    work = replace(work, plan=replace(work.plan, metric=asked.bind(None, len(work.plan.corrupted))))
    alone, cost = reference(work, jobs)
    try:
        fast, spent = packed(work, jobs)
        cost += spent
        refused = _difference(work, jobs, fast, alone)
    except (NotImplementedError, NnspliceError) as reason:  # the same cells have just run by themselves
        refused = str(reason).partition("\n")[0]
    if not refused:
        return ("packed", ""), cost
    rows, spent = batched(work, jobs)
    # Where numbers are rounded by a whole batch's largest (dynamic int8), the rows beside a cell change it.
    mixed = _difference(work, jobs, rows, alone)
    found = ("reference", f"not batched: {mixed}") if mixed else ("batched", f"not packed: {refused}")
    return found, cost + spent


def _direction(logits: Tensor) -> Tensor:
    """Where logits point, as a number near 1 in size, whatever the scale of the metric that is asked for."""
    wide = torch.where(logits.abs() < 1e4, logits, 0).double()  # tokens that are ruled out have logits of any size
    wide = wide - wide.mean(-1, keepdim=True)
    along = torch.randn(wide.shape[-1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return wide @ along.to(wide.device) / wide.norm(dim=-1).clamp_min(1e-300)


def _difference(work: Work, jobs: list, values: Sequence[float], alone: Sequence[float]) -> str:
    """The first cell whose value is not that of a run of its own, in words; empty where all are."""
    dtype = next((p.dtype for p in peel(work.model).parameters() if p.is_floating_point()), torch.float32)
    allowed = TOLERANCE.get(dtype, 2e-1)
    for job, a, b in zip(jobs, values, alone, strict=True):
        if not math.isclose(a, b, rel_tol=allowed, abs_tol=allowed) and not (math.isnan(a) and math.isnan(b)):
            path = work.plan.targets[job[1]].cell.path
            return f"the logits with {path} point to {a:.6g}, and to {b:.6g} in a run of its own"
    return ""
