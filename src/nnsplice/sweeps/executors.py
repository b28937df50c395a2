"""The type of executors, and two of them: reference and batched.

reference    one nnsight trace per job, with the write of `SavedActivation.apply`: slow, and the oracle of the tests
batched      one nnsight trace for many jobs, a row per job: for any architecture
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from nnsplice import engine
from nnsplice.activations.access import Access, accesses, live_value, site_of
from nnsplice.activations.packs import Pack
from nnsplice.activations.updates import updates
from nnsplice.activations.writing import write
from nnsplice.atlas import DERIVED
from nnsplice.errors import ShapeError
from nnsplice.packed import cut, padded_at_most
from nnsplice.packed.cost import Cost, CostModel
from nnsplice.packed.indices import on_device
from nnsplice.paths import Path
from nnsplice.sweeps.jobs import Job
from nnsplice.sweeps.knockouts import cuts_of
from nnsplice.sweeps.plan import Plan
from nnsplice.sweeps.reading import only_read, read_at
from nnsplice.sweeps.sources import Source
from nnsplice.sweeps.targets import TargetPart


@dataclass(frozen=True)
class Work:
    """What an executor needs besides the jobs: the model, the plan, the values to write."""

    model: engine.Model
    plan: Plan
    source: Source
    #: The clean run's logits where the metric reads, `[prompt, vocab]`, for metrics that compare two runs; else None.
    clean_logits: Tensor | None
    #: Values that an executor keeps between chunks.
    memo: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def cost_model(self) -> CostModel:
        """The cost of tokens in the model."""
        return CostModel.of(self.model)


@dataclass(frozen=True, slots=True)
class Executor:
    """A way to run jobs."""

    #: Runs jobs: the metric of each, and the cost.
    run: Callable[[Work, Sequence[Job]], tuple[list[float], Cost]]
    #: The number of tokens that each job runs.
    tokens: Callable[[Work, Sequence[Job]], list[int]]
    #: Whether one run may have prompts of different lengths.
    mixed: bool = False
    #: Records the corrupted runs of prompts, for all jobs about them, and returns their logits where the metric reads,
    #: `[prompt, vocab]`; `forget` frees that recording. None for an executor without a recording.
    corrupted: Callable[[Work, Sequence[int]], tuple[Tensor, Cost]] | None = None
    forget: Callable[[Work], None] | None = None
    #: The name in results of an executor that is not in `EXECUTORS`.
    name: str = "own"
    #: For an executor with a faster variant: the variant that is exact for this work, the reason, and the trial's cost.
    choose: Callable[[Work], tuple[Executor, str, Cost]] | None = None

    def __call__(self, work: Work, jobs: Sequence[Job]) -> tuple[list[float], Cost]:
        """Run jobs."""
        return self.run(work, jobs)


def whole_prompts(work: Work, jobs: Sequence[Job]) -> list[int]:
    """The tokens of jobs that run their whole prompts."""
    encoder, decoder = work.plan.corrupted.lengths("encoder"), work.plan.corrupted.lengths("decoder")
    return [max(encoder[prompt], decoder[prompt]) for prompt, _ in jobs]


def fitting(jobs: Sequence[Job], sizes: Sequence[int], prompts: Sequence[int], limit: int, at: int = 0) -> int:
    """The number of jobs, from job `at` on, that fit into one run of `limit` tokens, with their prompts padded."""
    own = total = longest = 0
    prompts_in_batch: set[int] = set()
    for number in range(at, len(jobs)):
        own += sizes[number]
        prompt = jobs[number][0]
        if prompt not in prompts_in_batch:
            prompts_in_batch.add(prompt)
            total, longest = total + prompts[number], max(longest, prompts[number])
        if max(own, padded_at_most(len(prompts_in_batch), total, longest)) > limit:
            return max(number - at, 1)
    return len(jobs) - at


# --- reference --------------------------------------------------------------------------------------------------------


def _reference(work: Work, jobs: Sequence[Job]) -> tuple[list[float], Cost]:
    """One trace for each job."""
    values: list[float] = []
    cost = Cost()
    for job in jobs:
        values += measured(work, run_single(work, job), [job])
        cost += work.cost_model.whole(work.plan.corrupted, [job[0]], work.plan.corrupted.length("decoder", job[0]))
    return values, cost


def run_single(work: Work, job: Job, *, only: bool = False) -> Tensor:
    """The logits that the metric reads in a run of one job's own: `[1, vocab]`.

    Args:
        only: compute no other logits, if the model supports that (`logits_to_keep`).
    """
    plan, model = work.plan, work.model
    inputs = plan.corrupted.inputs([job[0]], model.device)
    found: list[Tensor] = []

    def body() -> None:
        # nnsight can read the attention mask only before the first value of a run.
        engine.batch_of(model, engine.worker(model, "a sweep"))
        corrupt(model, plan, [job[0]])
        if plan.operation.reads:
            _update_values(work, job)
        elif plan.operation.way != "cut":
            write(model, _packs(work, job), 1.0 if plan.operation.way == "add" else None)
        found.append(engine.read_logits(model, read_at(plan, job[0])))

    def over_processes() -> None:
        with engine.accepting_sharded(model):  # inside, as nnsight runs the body in its own thread
            body()

    fewer = only_read(model, read_at(plan, job[0]), plan.targets[job[1]].places) if only else {}
    with torch.no_grad(), cut(model, [cuts_of(plan, job)]):
        engine.run(model, {**inputs, **fewer} if fewer and isinstance(inputs, Mapping) else inputs, over_processes)
    return found[0]


def _packs(work: Work, job: Job) -> list[Pack]:
    packs: list[Pack] = []
    for part in work.plan.targets[job[1]].parts:
        positions = work.plan.positions(part, job[0])
        for place in part.places:
            rows = [work.source.value(job[0], part, place, order, p, 0) for order, p in enumerate(positions)]
            keys = tuple(place.at(position) for position in positions)
            packs.append(Pack(keys, torch.stack([row for row in rows if row is not None])[None]))
    return packs


def _update_values(work: Work, job: Job) -> None:
    where = {
        str(place.at(position)): (part, place, order, position)
        for part in work.plan.targets[job[1]].parts
        for order, position in enumerate(work.plan.positions(part, job[0]))
        for place in part.places
    }
    for key, current, update in updates(work.model, list(where)):
        part, place, order, position = where[key]
        value = work.source.value(job[0], part, place, order, position, current.shape[-1])
        update(work.plan.operation.apply(current, value))


# --- batched ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Write:
    """One change in a batch: a row, a token, and the new value."""

    row: int
    prompt: int
    part: TargetPart
    place: Path
    order: int
    position: int


def _batched(work: Work, jobs: Sequence[Job]) -> tuple[list[float], Cost]:
    """One trace with a row per job; each value is written once, in execution order."""
    plan, model = work.plan, work.model
    writes: dict[Path, list[Write]] = {}
    for row, job in enumerate(jobs):
        for part in () if plan.operation.way == "cut" else plan.targets[job[1]].parts:
            for order, position in enumerate(plan.positions(part, job[0])):
                for place in part.places:
                    if site_of(place).kind in DERIVED:
                        raise NotImplementedError(f"{place} is derived from a value, and stands in none")
                    writes.setdefault(place.place, []).append(Write(row, job[0], part, place, order, position))
    known = engine.map_of(model)
    visited = accesses(model, sorted(writes, key=known.rank))
    prompts = [prompt for prompt, _ in jobs]
    inputs = plan.corrupted.inputs(prompts, model.device)
    assert isinstance(inputs, Mapping)
    batch, at = plan.corrupted.batch(prompts), read_at(plan, prompts[0])
    found: list[Tensor] = []

    def body() -> None:
        mediator = engine.worker(model, "a sweep")
        corrupt(model, plan, prompts)
        for access in visited:
            live = live_value(access, mediator, batch.rows(access.tower))
            check_length(access, live.tensor, plan.corrupted.length(access.tower, prompts[0]))
            live.write(_changed(work, access, live.tensor, writes))
        found.append(engine.read_logits(model, at))

    with torch.no_grad(), cut(model, [cuts_of(plan, job) for job in jobs]):
        engine.run(model, {**inputs, **(fewer := only_read(model, at, writes))}, body)
    logits = fewer.get("logits_to_keep", plan.corrupted.length("decoder", prompts[0]))
    return measured(work, found[0], jobs), work.cost_model.whole(plan.corrupted, prompts, logits)


def check_length(access: Access, tensor: Tensor, length: int) -> None:
    """Raise for a value whose token axis is not the prompt's: its tokens would be taken for others."""
    if tensor.shape[1] != length:
        raise ShapeError(
            f"{tensor.shape[1]} tokens stand there, and the prompts have {length}",
            path=access.name,
            expected="a site that every token of a prompt passes, and no other (such as soft tokens)",
        )


def _changed(work: Work, access: Access, tensor: Tensor, writes: dict[Path, list[Write]]) -> Tensor:
    new = tensor.clone()
    for path in access.paths:
        start, stop = site_of(path).columns or (0, tensor.shape[-1])
        here = writes[path.place]
        rows, tokens = on_device([[w.row for w in here], [w.position for w in here]], tensor.device)
        current = tensor[rows, tokens, start:stop]
        values = [work.source.value(w.prompt, w.part, w.place, w.order, w.position, stop - start) for w in here]
        value = None if values[0] is None else torch.stack([v for v in values if v is not None]).to(current)
        new[rows, tokens, start:stop] = work.plan.operation.apply(current, value)
    return new


def corrupt(model: engine.Model, plan: Plan, prompts: Sequence[int]) -> None:
    """Apply the plan's corruption, inside a trace whose rows are these prompts."""
    corruption = plan.corruption
    if corruption is None:
        return
    mediator = engine.worker(model, "a sweep")
    (access,) = accesses(model, [corruption.place])
    live = live_value(access, mediator, plan.corrupted.batch(prompts).rows(access.tower))
    check_length(access, live.tensor, plan.corrupted.length(access.tower, prompts[0]))
    live.write(corruption.apply(prompts, live.tensor))


reference: Executor = Executor(_reference, whole_prompts)
batched: Executor = Executor(_batched, whole_prompts)


def measured(work: Work, logits: Tensor, jobs: Sequence[Job]) -> list[float]:
    """The metric of each job, from the logits that it reads."""
    prompts = [prompt for prompt, _ in jobs]
    reference_logits = None if work.clean_logits is None else work.clean_logits[prompts]
    return work.plan.metric(logits, prompts, reference_logits).double().tolist()
