"""The packed executor: each job is a row of the packed engine (`nnsplice.packed`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from nnsplice import engine
from nnsplice import packed as engine_of_rows
from nnsplice.activations.access import site_of
from nnsplice.atlas import unwrap
from nnsplice.packed import LOGITS, BaseRuns, Cost, Edit, Head, PackedResult, Row
from nnsplice.packed.rows import Change, Values
from nnsplice.paths import Path
from nnsplice.sweeps.executors import Executor, Work, measured
from nnsplice.sweeps.jobs import Job
from nnsplice.sweeps.knockouts import cuts_of
from nnsplice.sweeps.targets import TargetPart

#: Key of `Work.memo`: the prompts of the recorded pass that several chunks of jobs share.
SHARED = "shared"


def run_packed(work: Work, jobs: Sequence[Job]) -> tuple[list[float], Cost]:
    """The metric of each job, and the cost; the prompts may have different lengths.

    Raises:
        NotImplementedError: this model, or one of these sites, is not covered.
    """
    ran = run_rows(work, jobs)
    with torch.no_grad():
        values, spent = measured_states(work, ran.head, ran.states(), jobs)
    return values, ran.cost + spent


def run_rows(work: Work, jobs: Sequence[Job]) -> PackedResult:
    """Run jobs together, without the metric."""
    return engine_of_rows.run(base_of(work), [row_of(work, job) for job in jobs], prompts=work.memo.get(SHARED))


def row_of(work: Work, job: Job, change: Change | None = None) -> Row:
    """The packed row of a job.

    Args:
        change: replaces the plan's operation.
    """
    plan, prompt = work.plan, job[0]
    target = plan.targets[job[1]]
    same = plan.shared_start(target, prompt)
    edits: list[Edit] = []
    for part in () if plan.operation.way == "cut" else target.parts:
        # The two runs of a pair are equal before their first different token, so a patch there changes nothing.
        tokens = {position: order for order, position in enumerate(plan.positions(part, prompt)) if position >= same}
        edits += [
            Edit.made(
                work.model,
                place,
                tuple(tokens),
                change or plan.operation.apply,
                _values(work, prompt, part, place, tokens),
            )
            for place in (part.places if tokens else ())
        ]
    read = plan.metric.metric.position % plan.corrupted.length("decoder", prompt)
    return Row(prompt, tuple(edits), read, cuts=cuts_of(plan, job))


def _values(work: Work, prompt: int, part: TargetPart, place: Path, tokens: Mapping[int, int]) -> Values:
    def values(width: int) -> list[Tensor] | None:
        each = [work.source.value(prompt, part, place, order, position, width) for position, order in tokens.items()]
        return None if each[0] is None else [value for value in each if value is not None]

    return values


def base_of(work: Work, keep: tuple[Path, ...] = ()) -> BaseRuns:
    """The corrupted runs, which the jobs edit.

    Args:
        keep: sites whose values in these runs are kept.
    """
    if "base" not in work.memo:
        around = lambda prompts: _corrupted(work, prompts)  # noqa: E731
        work.memo["base"] = BaseRuns(work.model, work.plan.corrupted, around, keep, work.memo)
    return work.memo["base"]


def corrupted_logits(work: Work, prompts: Sequence[int]) -> tuple[Tensor, Cost]:
    """The logits of corrupted runs where the metric reads, `[prompt, vocab]`, from the recorded pass; and the cost."""
    recording, spent = engine_of_rows.recorded(base_of(work), prompts)
    work.memo[SHARED] = recording.prompts
    lengths = work.plan.corrupted.lengths("decoder")
    position = work.plan.metric.metric.position
    read = [recording.bases[prompt] + position % lengths[prompt] for prompt in prompts]
    return recording.head.logits(recording.entering[-1][read]), spent + _head_cost(work, recording.head, len(read))


def forget(work: Work) -> None:
    """Free the recorded pass; later chunks each record their own prompts."""
    for name in (SHARED, "recording"):
        work.memo.pop(name, None)


def tokens_of(work: Work, jobs: Sequence[Job]) -> list[int]:
    """The number of tokens that each job adds to a pack."""
    lengths = work.plan.corrupted.lengths("decoder")
    position = work.plan.metric.metric.position
    targets = work.plan.targets

    def start(job: Job) -> int:
        target, prompt = targets[job[1]], job[0]
        first = min(min(work.plan.positions(part, prompt)) for part in target.parts)
        return max(first, work.plan.shared_start(target, prompt))

    return [max(position % lengths[job[0]] + 1 - start(job), 1) for job in jobs]


packed: Executor = Executor(run_packed, tokens_of, mixed=True, corrupted=corrupted_logits, forget=forget)


# --- the metric -------------------------------------------------------------------------------------------------------


def measured_states(work: Work, head: Head, states: Tensor, jobs: Sequence[Job]) -> tuple[list[float], Cost]:
    """The metric of each job from its final state `[job, width]`, and the cost.

    Logits are computed for as many rows at once as fit into memory.
    """
    metric = work.plan.metric
    if head.plain and metric.metric.local:
        prompts = [prompt for prompt, _ in jobs]
        tokens = metric.tokens(prompts).to(states.device)
        values = metric.of_tokens(head.logits_of(states, tokens), prompts).double().tolist()
        return values, Cost(flops=2 * tokens.numel() * states.shape[-1])
    step = max(LOGITS // head.vocabulary, 1)
    values: list[float] = []
    for start in range(0, len(jobs), step):
        some = slice(start, start + step)
        values += measured(work, head.logits(states[some]), jobs[some])
    return values, _head_cost(work, head, len(jobs))


def _head_cost(work: Work, head: Head, rows: int) -> Cost:
    return Cost(flops=rows * work.cost_model.per_token(head.tower.unembed))


# --- the corruption ---------------------------------------------------------------------------------------------------


@contextmanager
def _corrupted(work: Work, prompts: Sequence[int]) -> Iterator[None]:
    """In this block, runs of these prompts have the plan's corruption."""
    corruption = work.plan.corruption
    if corruption is None:
        yield
        return

    def corrupt(states: Tensor) -> Tensor:
        return corruption.apply(prompts, states)

    # Before all other hooks there, so that the recorded run includes the corruption.
    with engine.changing(unwrap(work.model), site_of(corruption.place), corrupt, first=True):
        yield
