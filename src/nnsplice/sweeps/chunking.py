"""Jobs and corrupted runs in chunks that fit into memory; halved when memory runs out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from nnsplice import engine
from nnsplice.errors import NnspliceError
from nnsplice.packed import Cost, CostModel
from nnsplice.sweeps.executors import Executor, Work, fitting, whole_prompts
from nnsplice.sweeps.jobs import Job
from nnsplice.sweeps.unedited import corrupted_run

#: Floating point operations of a chunk on a CPU, and of the first chunk: about ten seconds and about two, so that the
#: progress bar moves.
CHUNK_FLOPS, FIRST_FLOPS = 1e12, 1.5e11
#: The least tokens of a chunk: fewer take as long, as every chunk reads all weights once.
LEAST_TOKENS = 128


def corrupted_batches(work: Work, executor: Executor, at_once: int) -> Iterator[tuple[list[int], Tensor, Cost]]:
    """Corrupted prompts in groups whose jobs run together, with their logits `[prompt, vocab]` and the cost.

    An executor that records the corrupted run for its jobs gives the logits of that run.
    """
    every, about = list(range(len(work.plan.corrupted))), work.plan.jobs.prompts
    shared = [] if executor.corrupted is None else _recorded_together(work, about, at_once)
    unshared = sorted(set(every).difference(*shared))
    if unshared:
        yield unshared, *corrupted_run(work.model, work.plan, at_once, unshared)
    for rows in shared:
        assert executor.corrupted is not None
        try:
            logits, spent = executor.corrupted(work, rows)
        except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
            if not engine.is_out_of_memory(error):
                raise
            engine.ProcessGroup.of(work.model).refuse_out_of_memory(error)
            if executor.forget is not None:
                executor.forget(work)
            logits, spent = corrupted_run(work.model, work.plan, at_once, rows)
        yield rows, logits, spent


def _recorded_together(work: Work, prompts: Sequence[int], at_once: int) -> list[list[int]]:
    """Consecutive prompts in groups that fit into one recorded pass; too long prompts are in no group."""
    lengths = work.plan.corrupted.lengths("decoder")
    groups: list[list[int]] = []
    tokens = 0
    for prompt in (prompt for prompt in prompts if lengths[prompt] <= at_once):
        tokens += lengths[prompt]
        if not groups or tokens > at_once:
            groups.append([])
            tokens = lengths[prompt]
        groups[-1].append(prompt)
    return groups


def tokens_at_once(model: engine.Model, max_tokens: int | None) -> tuple[int, int]:
    """The number of tokens that run at once in the first chunk and in later ones."""
    # Processes may have different amounts of free memory.
    limit = engine.ProcessGroup.of(model).minimum(engine.tokens_at_once(model, max_tokens))
    if max_tokens is not None or (model.device is not None and model.device.type != "cpu"):
        return limit, limit
    each = CostModel.of(model).token
    return min(limit, max(int(FIRST_FLOPS / each), LEAST_TOKENS)), min(
        limit, max(int(CHUNK_FLOPS / each), LEAST_TOKENS)
    )


def chunks(
    work: Work, executor: Executor, jobs: Sequence[Job], at_once: int, first: int | None = None
) -> Iterator[tuple[Sequence[Job], list[float], Cost]]:
    """Run jobs in chunks of at most `at_once` tokens, which is halved when memory runs out; yields chunks with values.

    Args:
        first: the number of tokens of the first chunk, if it is smaller.
    """
    limit = at_once if first is None else first
    for members in _together(work, executor, jobs):
        sizes, prompts = executor.tokens(work, members), whole_prompts(work, members)
        if sum(sizes) <= 2 * limit:
            limit = min(2 * limit, at_once)  # the rest is not worth reading all weights again
        at = 0
        while at < len(members):
            chunk = members[at : at + fitting(members, sizes, prompts, limit, at)]
            try:
                values, cost = executor(work, chunk)
            except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
                if len(chunk) == 1 or isinstance(error, NnspliceError) or not engine.is_out_of_memory(error):
                    raise
                engine.ProcessGroup.of(work.model).refuse_out_of_memory(error)
                if executor.forget is not None:
                    executor.forget(work)
                limit = at_once = min(limit, sum(sizes[at : at + len(chunk)])) // 2
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                continue
            yield chunk, values, cost
            at, limit = at + len(chunk), at_once


def _together(work: Work, executor: Executor, jobs: Sequence[Job]) -> list[list[Job]]:
    """Jobs in groups that may share a run: of prompts of one shape, unless the executor takes any; sorted by prompt."""
    prompts = work.plan.corrupted
    shapes = [() if executor.mixed else prompts.shape(row) for row in range(len(prompts))]
    groups: dict[object, list[Job]] = {}
    for job in sorted(jobs):
        groups.setdefault(shapes[job[0]], []).append(job)
    return list(groups.values())
