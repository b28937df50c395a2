"""The packed executor: jobs in, metric values out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nnsplice.atlas import peel
from nnsplice.sweeps.cost import Cost
from nnsplice.sweeps.executors import Work, measured
from nnsplice.sweeps.packed.heads import LOGITS
from nnsplice.sweeps.packed.recording import Recording, record
from nnsplice.sweeps.packed.rows import rows_of
from nnsplice.sweeps.packed.wave import Wave
from nnsplice.sweeps.plan import Job

#: Numbers of queries and keys that are rounded up to a multiple share one call of attention: measured, see
#: bench/RESULTS.md. A launch on a GPU costs more than the padding does.
GRAIN = {"cpu": 1, "cuda": 64}


def run_packed(work: Work, jobs: Sequence[Job]) -> tuple[list[float], Cost]:
    """The values of jobs; their prompts may have different lengths.

    Raises:
        NotImplementedError: this model, or one of these sites, is not covered.
    """
    recording, spent = _recorded(work, tuple(dict.fromkeys(prompt for prompt, _ in jobs)))
    rows = rows_of(work, jobs, recording.tower, recording.bases, alone=not recording.whole.calls)
    grain = GRAIN.get(recording.entering[0].device.type, 1)
    wave = Wave(work, peel(work.model), recording, rows, grain)
    with torch.no_grad():
        states, order = wave.run()
        values, head = _measured(work, recording, states[_inverse(order)], jobs)
    return values, spent + wave.cost + head


def corrupted_logits(work: Work) -> tuple[Tensor, Cost]:
    """The logits of the corrupted prompts where the metric reads, from the pass that is recorded anyway."""
    recording, spent = _recorded(work, tuple(range(len(work.plan.corrupted))))
    lengths = work.plan.corrupted.lengths("decoder")
    position = work.plan.metric.metric.position
    read = [recording.bases[prompt] + position % length for prompt, length in enumerate(lengths)]
    return recording.head.logits(recording.entering[-1][read]), spent + _head(work, recording, len(read))


def tokens_of(work: Work, jobs: Sequence[Job]) -> list[int]:
    """How many tokens each job adds to a pack."""
    lengths = work.plan.corrupted.lengths("decoder")
    position = work.plan.metric.metric.position
    targets = work.plan.targets
    return [position % lengths[job[0]] + 1 - min(work.plan.positions(targets[job[1]], job[0])) for job in jobs]


def _recorded(work: Work, prompts: tuple[int, ...]) -> tuple[Recording, Cost]:
    """The recorded pass of just these prompts, so that what a chunk gives never depends on the chunks before it.

    And what it cost, where it was made now.
    """
    known = work.memo.get("recording")
    if known is not None and prompts == known.prompts and work.memo.get("way") == known.way:
        return known, Cost()
    recording = work.memo["recording"] = record(work, prompts)
    return recording, recording.cost


def _inverse(order: Sequence[int]) -> list[int]:
    places = {number: place for place, number in enumerate(order)}
    return [places[number] for number in range(len(order))]


def _measured(work: Work, recording: Recording, states: Tensor, jobs: Sequence[Job]) -> tuple[list[float], Cost]:
    """The metric of each job, and what that cost; as many rows of logits at once as fit."""
    head, metric = recording.head, work.plan.metric
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
    return values, _head(work, recording, len(jobs))


def _head(work: Work, recording: Recording, rows: int) -> Cost:
    return Cost(flops=rows * work.law.per_token(recording.tower.unembed))
