"""Jobs and corrupted runs in chunks, and less at once when memory runs out."""

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

#: Operations of a chunk on a CPU, and of the first one: some ten seconds and some two, so that the bar moves.
CHUNK, FIRST = 1e12, 1.5e11
#: Fewer tokens than this take as long: every chunk reads the weights once.
LEAST = 128


def corrupted_batches(work: Work, executor: Executor, at_once: int) -> Iterator[tuple[list[int], Tensor, Cost]]:
    """Corrupted prompts, whose jobs are run together, and their logits: from a run that is made for these anyway."""
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
    """Neighbouring prompts that fit into one recorded pass; a prompt that is too long is in none."""
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


def rooms(model: engine.Model, max_tokens: int | None) -> tuple[int, int]:
    """The tokens that run at once in the first chunk and in later ones: `max_tokens`, or a number for this machine."""
    # Processes may have different amounts of free memory.
    room = engine.ProcessGroup.of(model).minimum(engine.tokens_at_once(model, max_tokens))
    if max_tokens is not None or (model.device is not None and model.device.type != "cpu"):
        return room, room
    each = CostModel.of(model).token
    return min(room, max(int(FIRST / each), LEAST)), min(room, max(int(CHUNK / each), LEAST))


def chunks(
    work: Work, executor: Executor, jobs: Sequence[Job], at_once: int, first: int | None = None
) -> Iterator[tuple[Sequence[Job], list[float], Cost]]:
    """Jobs that run together, at most so many tokens at once, and half of it after running out of memory.

    Args:
        first: how many tokens the first chunk has, where a few chunks follow it.
    """
    room = at_once if first is None else first
    for members in _together(work, executor, jobs):
        sizes, prompts = executor.tokens(work, members), whole_prompts(work, members)
        if sum(sizes) <= 2 * room:
            room = min(2 * room, at_once)  # what would be left is not worth another reading of all weights
        at = 0
        while at < len(members):
            chunk = members[at : at + fitting(members, sizes, prompts, room, at)]
            try:
                values, cost = executor(work, chunk)
            except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
                if len(chunk) == 1 or isinstance(error, NnspliceError) or not engine.is_out_of_memory(error):
                    raise
                engine.ProcessGroup.of(work.model).refuse_out_of_memory(error)
                if executor.forget is not None:
                    executor.forget(work)
                room = at_once = min(room, sum(sizes[at : at + len(chunk)])) // 2
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                continue
            yield chunk, values, cost
            at, room = at + len(chunk), at_once


def _together(work: Work, executor: Executor, jobs: Sequence[Job]) -> list[list[Job]]:
    """Jobs by the shape of their prompts, where that matters; sorted by prompt, so that a chunk is about few."""
    prompts = work.plan.corrupted
    shapes = [() if executor.mixed else prompts.shape(row) for row in range(len(prompts))]
    groups: dict[object, list[Job]] = {}
    for job in sorted(jobs):
        groups.setdefault(shapes[job[0]], []).append(job)
    return list(groups.values())
