"""The trial of executors: a few cells of a plan in each executor, compared with one run per cell.

The cells represent the plan: its longest and its shortest prompt, each kind of site and of layer, early and late
tokens. Compared is a projection of the logits (`rounding.direction`), whatever the metric is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nnsplice import engine
from nnsplice.packed import ways
from nnsplice.packed.cost import Cost
from nnsplice.sweeps.executors import Work, batched, fitting, measured, run_single, whole_prompts
from nnsplice.sweeps.jobs import Job
from nnsplice.sweeps.packing import forget, measured_states, run_rows, tokens_of
from nnsplice.sweeps.probe_cells import probe_cells
from nnsplice.sweeps.reading import only_read, read_at
from nnsplice.sweeps.rounding import (
    HALF_PRECISION,
    MOST_ALLOWED,
    NOISE_FACTOR,
    TOLERANCE,
    direction,
    dtype_of,
    rounding_noise,
    rounding_note,
    tolerance,
)

#: Key of `Work.memo`: all jobs of a small plan and their values, where the trial ran the whole plan.
PROBE_VALUES = "probe values"


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """The executor that a trial found, and why."""

    executor: str
    note: str
    #: Prompts up to this length were tried.
    longest: int
    #: Why packed rows are not used; empty if they are.
    refused: str = ""
    #: The way of the recording that packed rows start from: one of `packed.recording.WAYS`.
    way: str | None = None


@dataclass(frozen=True, slots=True)
class Comparison:
    """The comparison of cells in one executor with one run per cell."""

    #: A message about the first cell that differs; empty if none does.
    differs: str
    #: The largest difference of the metric.
    off: float
    cost: Cost
    #: The values of all jobs that ran.
    values: list[Any]


def compare(work: Work, longest: int, trial_tokens: int = 0) -> tuple[ProbeResult, Cost]:
    """Try all ways on a few cells, the fastest first, until one agrees with one run per cell.

    Args:
        trial_tokens: a plan whose jobs fit into this many tokens is run as a whole, and the cells are compared in that
            run; if they agree, the values of all jobs are kept in the memo under `PROBE_VALUES`.
    """
    probe = _Probe(work, probe_cells(work))
    cost, mismatch, raised = probe.cost, "", ""
    processes = engine.ProcessGroup.of(work.model).size
    if processes > 1:
        raised = f"this model is spread over {processes} processes, and packed rows run their attention in one"
    whole = list(work.plan.jobs) if processes == 1 and _fits(work, trial_tokens) else None
    for way in ways(whole_prompts(work, whole or probe.jobs)) if processes == 1 else ():
        work.memo["way"] = way
        try:
            tried, whole = _packed(probe, whole)
        except Exception as error:
            raised = _reason(error)
            continue
        cost += tried.cost
        if not tried.differs:
            if whole is not None:
                work.memo[PROBE_VALUES] = whole, tried.values
            return ProbeResult("packed", probe.note(tried), longest, way=way), cost + probe.noise_cost
        mismatch = mismatch or tried.differs
    work.memo.pop("way", None)
    forget(work)
    refused = mismatch or raised
    try:
        tried = probe.batched()
    except Exception as error:
        note = f"not packed: {refused}; not batched: {_reason(error)}"
        return ProbeResult("reference", note, longest, refused), cost + probe.noise_cost
    cost += tried.cost + probe.noise_cost
    # In a batch a cell may depend on the other rows, for example with dynamic int8 quantisation.
    if tried.differs:
        return ProbeResult("reference", f"not batched: {tried.differs}", longest, refused), cost
    note = "; ".join(part for part in (f"not packed: {refused}", probe.note(tried)) if part)
    return ProbeResult("batched", note, longest, refused), cost


def batches_differ(work: Work) -> str:
    """A message about the first of a few cells whose value changes in a batch; empty if none does."""
    try:
        return _Probe(work, probe_cells(work)).batched().differs
    except Exception as error:
        if engine.is_out_of_memory(error):
            engine.ProcessGroup.of(work.model).refuse_out_of_memory(error)
        raise


def _packed(probe: _Probe, whole: list[Job] | None) -> tuple[Comparison, list[Job] | None]:
    """The cells in a pack of the whole plan, and that pack; the cells only if there is no memory for it."""
    if whole is not None:
        try:
            return probe.packed(whole), whole
        except Exception as error:
            if not engine.is_out_of_memory(error):
                raise
            forget(probe.work)
    return probe.packed(probe.jobs), None


def _fits(work: Work, trial_tokens: int) -> bool:
    """Whether all jobs of a plan fit into one pack of at most this many tokens."""
    jobs = work.plan.jobs
    if len(jobs) > trial_tokens:
        return False
    return fitting(jobs, tokens_of(work, jobs), whole_prompts(work, jobs), trial_tokens) == len(jobs)


def _reason(error: Exception) -> str:
    """Why a way did not run. Running out of memory is raised instead: another way would not help."""
    if engine.is_out_of_memory(error):
        raise error
    text = str(error).partition("\n")[0] or "no more is said"
    return text if isinstance(error, NotImplementedError) else f"{type(error).__name__}: {text}"


def _by_shape(work: Work, jobs: Sequence[Job]) -> list[list[Job]]:
    groups: dict[object, list[Job]] = {}
    for job in jobs:
        groups.setdefault(work.plan.corrupted.shape(job[0]), []).append(job)
    return list(groups.values())


class _Probe:
    """The cells of the trial, with the logits of one run per cell."""

    def __init__(self, work: Work, jobs: Sequence[Job]) -> None:
        self.work, self.jobs = work, list(jobs)
        self.kept: list[Tensor] = []
        metric = replace(
            work.plan.metric.metric, name="logits", rule=self._keep, answers={}, compares=False, local=False
        )
        self.of_logits = replace(work, plan=replace(work.plan, metric=metric.bind(None, len(work.plan.corrupted))))
        # The first run computes all logits, which checks that the others may skip unread ones.
        self.logits = {job: run_single(self.of_logits, job, only=number > 0) for number, job in enumerate(self.jobs)}
        self.points = {job: float(direction(logits)) for job, logits in self.logits.items()}
        self.cost, self.noise_cost = Cost(), Cost()
        for number, (prompt, target) in enumerate(self.jobs):
            length = work.plan.corrupted.length("decoder", prompt)
            fewer = only_read(work.model, read_at(work.plan, prompt), work.plan.targets[target].places)
            logits = fewer.get("logits_to_keep", length) if number else length
            self.cost += work.cost_model.whole(work.plan.corrupted, [prompt], logits)
        self.dtype = dtype_of(work)
        self.allowed = tolerance(work)
        self.noise: float | None = None

    def _keep(self, logits: Tensor) -> Tensor:
        self.kept.append(logits)
        return direction(logits)

    def packed(self, jobs: Sequence[Job]) -> Comparison:
        """Run jobs as packed rows, and compare the cells of the trial, which are among them."""
        ran = run_rows(self.work, jobs)
        order = {job: number for number, job in enumerate(jobs)}
        at = [order[job] for job in self.jobs]
        with torch.no_grad():
            states = ran.states()
            points, spent = measured_states(self.of_logits, ran.head, states[at], self.jobs)
            differs = self._difference(self.jobs, points)
            if differs:
                return Comparison(differs, 0.0, ran.cost + spent, [])
            values, more = measured_states(self.work, ran.head, states, jobs)
        single, packed_values = self._single(self.jobs), [values[number] for number in at]
        metric = self.work.plan.metric.metric
        if metric.local:  # computed from the logits of the answers only, which `points` does not check
            scale = max(float(logits.abs().max()) for logits in self.logits.values())
            differs = self._first_difference(self.jobs, packed_values, single, metric.name, max(scale, 1.0))
        return Comparison(differs, _largest_difference(packed_values, single), ran.cost + spent + more, values)

    def batched(self) -> Comparison:
        """Run the cells as rows of batches."""
        cost, differs, off, found = Cost(), "", 0.0, []
        for jobs in _by_shape(self.work, self.jobs):
            self.kept.clear()
            points, spent = batched(self.of_logits, jobs)
            cost += spent
            differs = differs or self._difference(jobs, points)
            values = measured(self.work, torch.cat(self.kept), jobs)
            found += values
            off = max(off, _largest_difference(values, self._single(jobs)))
        return Comparison(differs, off, cost, found)

    def _single(self, jobs: Sequence[Job]) -> list[Any]:
        """The metric of these cells, with one run per cell."""
        return [measured(self.work, self.logits[job], [job])[0] for job in jobs]

    def note(self, tried: Comparison) -> str:
        """The note of a result whose numbers agree with one run per cell up to this model's rounding."""
        if self.dtype in HALF_PRECISION:
            return rounding_note(self.work, tried.off, max(float(one.abs().max()) for one in self.logits.values()))
        if self.noise is None:
            return ""
        return (
            f"equal to runs of their own within {self.allowed:.2g}, as parts of this model round to less than its "
            f"{str(self.dtype).removeprefix('torch.')}: rounding moves its logits by {self.noise:.2g}"
        )

    def _difference(self, jobs: Sequence[Job], points: Sequence[float]) -> str:
        single = [self.points[job] for job in jobs]
        found = self._first_difference(jobs, points, single, "the logits", 1.0)
        if found and self.dtype is torch.float64 and self.noise is None:
            self.noise, self.noise_cost = rounding_noise(self.work, self.jobs)
            self.allowed = min(max(self.allowed, NOISE_FACTOR * self.noise), MOST_ALLOWED)
            if self.allowed <= TOLERANCE[torch.float64]:
                self.noise = None
            return self._first_difference(jobs, points, single, "the logits", 1.0)
        return found

    def _first_difference(
        self, jobs: Sequence[Job], values: Sequence[Any], single: Sequence[Any], what: str, scale: float
    ) -> str:
        """A message about the first cell that differs from its own run; empty if none does."""
        for job, a, b in _pairs(jobs, values, single):
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


def _largest_difference(values: Sequence[Any], single: Sequence[Any]) -> float:
    """The largest difference between two lists of numbers, where both are finite."""
    apart = np.abs(np.asarray(values, float) - np.asarray(single, float))
    return max(apart[np.isfinite(apart)].tolist(), default=0.0)


def _pairs(jobs: Sequence[Job], values: Sequence[Any], single: Sequence[Any]) -> Iterator[tuple[Job, float, float]]:
    """Both numbers of every job, and of each of several metrics."""
    for job, a, b in zip(jobs, values, single, strict=True):
        pairs = zip(a, b, strict=True) if isinstance(a, list) else [(a, b)]
        yield from ((job, *pair) for pair in pairs)
