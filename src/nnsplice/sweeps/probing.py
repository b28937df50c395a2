"""The trial: a few cells of a plan in every executor, compared with runs of their own.

The cells stand for the job: its longest prompt and its shortest, every kind of site, layers of every kind, tokens at
both ends. What is compared is where the logits point, whatever the metric.
"""

from __future__ import annotations

import math
import random
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nnsplice import engine
from nnsplice.atlas import Atlas, unwrap
from nnsplice.packed import ways
from nnsplice.packed.cost import Cost
from nnsplice.sweeps.cells import Target
from nnsplice.sweeps.executors import Work, alone, batched, fitting, measured, whole_prompts
from nnsplice.sweeps.jobs import Job
from nnsplice.sweeps.packing import forget, measured_states, run_rows, tokens_of
from nnsplice.sweeps.reading import only_read, read_at

#: How far two ways of computing one number may lie apart, in the model's dtype, before one of them is wrong.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1}
#: ... and as a multiple of what rounding does to it, in a model of float64 that rounds to less on its way.
NOISE, MOST = 32, TOLERANCE[torch.float32]
#: How far embeddings are moved to see that, relative to themselves.
MOVED = 1e-10
#: Dtypes in which a small effect may be rounding.
ROUGH = (torch.float16, torch.bfloat16)
#: At least so many cells are computed, and so many kinds of layer are told apart.
PROBES, LAYERS = 4, 6
#: Where the memo of a work has the jobs that ran beside the cells, with their values: the whole plan.
RAN = "ran"


@dataclass(frozen=True, slots=True)
class Answer:
    """What a probe found."""

    executor: str
    note: str
    #: Prompts up to this length were tried.
    longest: int
    #: Why packed rows are not used.
    refused: str = ""
    #: How packed rows come by their attention.
    way: str | None = None


@dataclass(frozen=True, slots=True)
class Tried:
    """What a way of running the cells gave, beside runs of their own."""

    #: The first cell that differs, in words; empty where none does.
    differs: str
    #: How far the metric was off at most.
    off: float
    cost: Cost
    #: The values of all jobs that ran.
    values: list[Any]


def compare(work: Work, longest: int, room: int = 0) -> tuple[Answer, Cost]:
    """All ways on a few cells, the fastest first, until one agrees with runs of their own.

    Args:
        room: a plan whose jobs fit into so many tokens is packed as a whole, and the cells are compared in the very run
            that gives all values; these are left in the memo as `RAN` where the cells agree, and else thrown away.
    """
    probe = _Probe(work, cells(work))
    cost, mismatch, raised = probe.cost, "", ""
    over = engine.Team.of(work.model).size
    if over > 1:
        raised = f"this model is spread over {over} processes, and packed rows run their attention in one"
    whole = list(work.plan.jobs) if over == 1 and _fits(work, room) else None
    for way in ways(whole_prompts(work, whole or probe.jobs)) if over == 1 else ():
        work.memo["way"] = way
        try:
            tried, whole = _packed(probe, whole)
        except Exception as error:
            raised = _reason(error)
            continue
        cost += tried.cost
        if not tried.differs:
            if whole is not None:
                work.memo[RAN] = whole, tried.values
            return Answer("packed", probe.note(tried), longest, way=way), cost + probe.noise_cost
        mismatch = mismatch or tried.differs
    work.memo.pop("way", None)
    forget(work)
    refused = mismatch or raised
    try:
        tried = probe.batched()
    except Exception as error:
        note = f"not packed: {refused}; not batched: {_reason(error)}"
        return Answer("reference", note, longest, refused), cost + probe.noise_cost
    cost += tried.cost + probe.noise_cost
    # Where numbers are rounded by a whole batch's largest (dynamic int8), the rows beside a cell change it.
    if tried.differs:
        return Answer("reference", f"not batched: {tried.differs}", longest, refused), cost
    note = "; ".join(part for part in (f"not packed: {refused}", probe.note(tried)) if part)
    return Answer("batched", note, longest, refused), cost


def _packed(probe: _Probe, whole: list[Job] | None) -> tuple[Tried, list[Job] | None]:
    """The cells in a pack of the whole plan, and that; by themselves where there is none, or no memory for it."""
    if whole is not None:
        try:
            return probe.packed(whole), whole
        except Exception as error:
            if not engine.is_memory(error):
                raise
            forget(probe.work)
    return probe.packed(probe.jobs), None


def _fits(work: Work, room: int) -> bool:
    """Whether all jobs of a plan run as one pack of at most so many tokens."""
    jobs = work.plan.jobs
    if len(jobs) > room:
        return False
    return fitting(jobs, tokens_of(work, jobs), whole_prompts(work, jobs), room) == len(jobs)


def _reason(error: Exception) -> str:
    """Why a way did not run; memory that ran out is no reason to run another way."""
    if engine.is_memory(error):
        raise error
    text = str(error).partition("\n")[0] or "no more is said"
    return text if isinstance(error, NotImplementedError) else f"{type(error).__name__}: {text}"


def _by_shape(work: Work, jobs: Sequence[Job]) -> list[list[Job]]:
    groups: dict[object, list[Job]] = {}
    for job in jobs:
        groups.setdefault(work.plan.corrupted.shape(job[0]), []).append(job)
    return list(groups.values())


class _Probe:
    """The cells with the logits of runs of their own."""

    def __init__(self, work: Work, jobs: Sequence[Job]) -> None:
        self.work, self.jobs = work, list(jobs)
        self.kept: list[Tensor] = []
        asked = replace(
            work.plan.metric.metric, name="logits", rule=self._keep, answers={}, compares=False, local=False
        )
        self.asking = replace(work, plan=replace(work.plan, metric=asked.bind(None, len(work.plan.corrupted))))
        # The first has all logits computed, which shows that the others may do without those that nobody reads.
        self.logits = {job: alone(self.asking, job, only=number > 0) for number, job in enumerate(self.jobs)}
        self.points = {job: float(direction(logits)) for job, logits in self.logits.items()}
        self.cost, self.noise_cost = Cost(), Cost()
        for number, (prompt, target) in enumerate(self.jobs):
            length = work.plan.corrupted.length("decoder", prompt)
            fewer = only_read(work.model, read_at(work.plan, prompt), work.plan.targets[target].places)
            logits = fewer.get("logits_to_keep", length) if number else length
            self.cost += work.cost_model.whole(work.plan.corrupted, [prompt], logits)
        self.dtype = dtype_of(work)
        self.allowed = allowed(work)
        self.noise: float | None = None

    def _keep(self, logits: Tensor) -> Tensor:
        self.kept.append(logits)
        return direction(logits)

    def packed(self, jobs: Sequence[Job]) -> Tried:
        """Run jobs as packed rows, the cells among them, and compare the cells."""
        ran = run_rows(self.work, jobs)
        order = {job: number for number, job in enumerate(jobs)}
        at = [order[job] for job in self.jobs]
        with torch.no_grad():
            states = ran.states()
            points, spent = measured_states(self.asking, ran.head, states[at], self.jobs)
            differs = self._difference(self.jobs, points)
            if differs:
                return Tried(differs, 0.0, ran.cost + spent, [])
            values, more = measured_states(self.work, ran.head, states, jobs)
        mine, own = self._mine(self.jobs), [values[number] for number in at]
        metric = self.work.plan.metric.metric
        if metric.local:  # which computes the logits of its answers alone
            scale = max(float(logits.abs().max()) for logits in self.logits.values())
            differs = self._first(self.jobs, own, mine, metric.name, max(scale, 1.0))
        return Tried(differs, _apart(own, mine), ran.cost + spent + more, values)

    def batched(self) -> Tried:
        """Run the cells as rows of batches."""
        cost, differs, off, found = Cost(), "", 0.0, []
        for jobs in _by_shape(self.work, self.jobs):
            self.kept.clear()
            points, spent = batched(self.asking, jobs)
            cost += spent
            differs = differs or self._difference(jobs, points)
            values = measured(self.work, torch.cat(self.kept), jobs)
            found += values
            off = max(off, _apart(values, self._mine(jobs)))
        return Tried(differs, off, cost, found)

    def _mine(self, jobs: Sequence[Job]) -> list[Any]:
        """The metric of these cells in runs of their own."""
        return [measured(self.work, self.logits[job], [job])[0] for job in jobs]

    def note(self, tried: Tried) -> str:
        """What a result says of numbers that agree with runs of their own as well as this model's can."""
        if self.dtype in ROUGH:
            return rounding(self.work, tried.off, max(float(one.abs().max()) for one in self.logits.values()))
        if self.noise is None:
            return ""
        return (
            f"equal to runs of their own within {self.allowed:.2g}, as parts of this model round to less than its "
            f"{str(self.dtype).removeprefix('torch.')}: rounding moves its logits by {self.noise:.2g}"
        )

    def _difference(self, jobs: Sequence[Job], points: Sequence[float]) -> str:
        mine = [self.points[job] for job in jobs]
        found = self._first(jobs, points, mine, "the logits", 1.0)
        if found and self.dtype is torch.float64 and self.noise is None:
            self.noise, self.noise_cost = noise_of(self.work, self.jobs)
            self.allowed = min(max(self.allowed, NOISE * self.noise), MOST)
            if self.allowed <= TOLERANCE[torch.float64]:
                self.noise = None
            return self._first(jobs, points, mine, "the logits", 1.0)
        return found

    def _first(self, jobs: Sequence[Job], values: Sequence[Any], mine: Sequence[Any], what: str, scale: float) -> str:
        """The first cell whose value is not that of a run of its own, in words; empty where all are."""
        for job, a, b in _each(jobs, values, mine):
            if math.isclose(a, b, rel_tol=self.allowed, abs_tol=self.allowed * scale):
                continue
            if a == b or (math.isnan(a) and math.isnan(b)):
                continue
            path = self.work.plan.targets[job[1]].cell.path
            verb = "point to" if what == "the logits" else "is"
            return (
                f"{what} with {path} {verb} {a:.6g}, and {b:.6g} in a run of its own "
                f"({abs(a - b):.2g} apart, {self.allowed * scale:.2g} allowed)"
            )
        return ""


def _apart(values: Sequence[Any], mine: Sequence[Any]) -> float:
    """How far two lists of numbers lie apart at most, where both are finite."""
    apart = np.abs(np.asarray(values, float) - np.asarray(mine, float))
    return max(apart[np.isfinite(apart)].tolist(), default=0.0)


def _each(jobs: Sequence[Job], values: Sequence[Any], mine: Sequence[Any]) -> Iterator[tuple[Job, float, float]]:
    """Both numbers of every job; of several metrics each."""
    for job, a, b in zip(jobs, values, mine, strict=True):
        pairs = zip(a, b, strict=True) if isinstance(a, list) else [(a, b)]
        yield from ((job, *pair) for pair in pairs)


def rounding(work: Work, off: float, size: float) -> str:
    """What a result in half precision says of small effects; empty in others.

    Args:
        off: how far cells lay from runs of their own.
        size: of the logits; a few cells may agree to the last digit, and others are still rounded to steps of it.
    """
    dtype = dtype_of(work)
    if dtype not in ROUGH:
        return ""
    least = max(off, torch.finfo(dtype).eps * size)
    return (
        f"in {str(dtype).removeprefix('torch.')}, {work.plan.metric.metric.name} is known to about {least:.2g}: "
        "an effect that is no larger may be rounding, its sign too"
    )


def dtype_of(work: Work) -> torch.dtype:
    """What the model computes in."""
    return next((p.dtype for p in unwrap(work.model).parameters() if p.is_floating_point()), torch.float32)


def allowed(work: Work) -> float:
    """How far two ways of computing one number may lie apart in this model, before one of them is wrong."""
    return TOLERANCE.get(dtype_of(work), 2e-1)


def direction(logits: Tensor) -> Tensor:
    """Where logits point, as a number near 1 in size, whatever the scale of the metric that is asked for."""
    wide = torch.where(logits.abs() < 1e4, logits, 0).double()  # tokens that are ruled out have logits of any size
    wide = wide - wide.mean(-1, keepdim=True)
    along = torch.randn(wide.shape[-1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return wide @ along.to(wide.device) / wide.norm(dim=-1).clamp_min(1e-300)


def noise_of(work: Work, jobs: Sequence[Job]) -> tuple[float, Cost]:
    """How far the logits of a prompt move, at every token of it, in a batch and with embeddings a little moved.

    By so little that arithmetic in float64 hardly shows it, and enough to turn some roundings to float32.
    """
    lengths = work.plan.corrupted.lengths("decoder")
    prompt = max((prompt for prompt, _ in jobs), key=lambda prompt: lengths[prompt])
    draws = torch.Generator().manual_seed(0)

    def shaken(_module: nn.Module, _args: Any, out: Any) -> Any:
        if not isinstance(out, Tensor) or len(out) == 1:
            return out
        noise = torch.randn(out.shape, generator=draws, dtype=torch.float64).to(out)
        return out * (1 + MOVED * noise)

    found: list[Tensor] = []
    embedding: Any = unwrap(work.model).get_input_embeddings()  # pyright: ignore[reportCallIssue]
    hook = embedding.register_forward_hook(shaken)
    cost = Cost()
    try:
        for rows in ([prompt], [prompt] * 4):
            with torch.no_grad():
                engine.run(
                    work.model,
                    work.plan.corrupted.inputs(rows, work.model.device),
                    lambda: found.append(direction(engine.read_logits(work.model))),
                )
            cost += work.cost_model.whole(work.plan.corrupted, rows, lengths[prompt])
    finally:
        hook.remove()
    return float((found[1] - found[0]).abs().max()), cost


# --- which cells ------------------------------------------------------------------------------------------------------


def cells(work: Work) -> list[Job]:
    """Few jobs that have every property that some job of the plan has."""
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
    return sorted([*jobs, *chosen.sample(others, min(len(others), max(PROBES - len(jobs), 0)))])


def _properties(
    work: Work, job: Job, prompt: str, length: int, kinds: Mapping[tuple[str, int | None], Hashable]
) -> Iterator[Hashable]:
    target = work.plan.targets[job[1]]
    yield prompt
    yield from kinds_of(target)
    for part in target.parts:
        yield "layer", kinds.get((part.tower, part.cell.layer))
    # Before the window of the last token, and within it.
    yield prompt, 3 * min(min(work.plan.positions(part, job[0])) for part in target.parts) // length


def kinds_of(target: Target) -> Iterator[Hashable]:
    """What of a cell may need another way of running: kinds of site, and how those of a set stand to each other."""
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
        kinds: list[Hashable] = [_built(block, settings=True) for block in blocks]
        if len(set(kinds)) > LAYERS:  # some setting numbers them
            kinds = [_built(block, settings=False) for block in blocks]
        order = {kind: number for number, kind in enumerate(dict.fromkeys(kinds))}
        last = len(blocks) - 1
        for number, kind in enumerate(kinds):
            found[tower.name, number] = (min(order[kind], LAYERS), number == 0, number == last)
    return found


def _built(block: nn.Module, *, settings: bool) -> Hashable:
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
