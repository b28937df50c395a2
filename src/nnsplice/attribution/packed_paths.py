"""Path patches as rows of the packed engine: the receivers' inputs with a sender's change, and the runs with them.

Nothing runs between a sender and its receivers, as every branch there is frozen; and the second run begins at the
receivers. A receiver that is the end of the stream needs no second run.

Whether that is right for the model at hand is tried on a few cells of the job, beside the three runs of the literature.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from nnsplice import engine
from nnsplice.atlas import unwrap
from nnsplice.attribution.branches import Branch as ModelBranch
from nnsplice.attribution.branches import Branches
from nnsplice.packed import Cost, Edit, FrozenBranch, FrozenRow, Read, Row, run, run_frozen, ways
from nnsplice.paths import Path
from nnsplice.sweeps.choosing import longest_prompt, probe_key
from nnsplice.sweeps.executors import Executor, Work, whole_prompts
from nnsplice.sweeps.expansion import tokens_of
from nnsplice.sweeps.jobs import Job
from nnsplice.sweeps.packing import base_of, measured_states, row_of
from nnsplice.sweeps.plan import Plan
from nnsplice.sweeps.probe_cells import probe_cells
from nnsplice.sweeps.rounding import HALF_PRECISION, direction, dtype_of, rounding_note, tolerance
from nnsplice.sweeps.unedited import clean_run

#: The name of this executor in results.
PACKED = "packed paths"


@dataclass(frozen=True)
class PackedPaths:
    """Jobs -> the metric of each, and the cost."""

    branches: Branches
    #: For each target of the plan.
    receivers: Sequence[Sequence[Path]]
    #: When each site is reached.
    rank: Mapping[Path, engine.Rank]

    def __call__(self, work: Work, jobs: Sequence[Job]) -> tuple[list[float], Cost]:
        """Run jobs.

        Raises:
            NotImplementedError: this model, or one of these sites, is not covered.
        """
        branches = {branch: FrozenBranch(branch.block.index, branch.added) for branch in self.branches.all}
        base = base_of(work, keep=tuple(branch.added for branch in branches.values()))
        rows = [self._frozen_row(work, job, branches) for job in jobs]
        frozen = run_frozen(base, rows, tuple(branches.values()))
        again: list[Row] = []
        numbers: list[int] = []
        for number, row in enumerate(rows):
            if row.row.end is None:
                moved = [(read, frozen.moved.get((number, read))) for read in row.row.reads]
                edits = tuple(Edit.of(read.place, *found) for read, found in moved if found is not None)
                again.append(Row(row.row.prompt, edits, self._read(work, row.row.prompt)))
                numbers.append(number)
        cost, ends = frozen.cost, dict(frozen.ends)
        if again:
            ran = run(base, again)
            cost += ran.cost
            ends |= {number: ran.ends[order] for order, number in enumerate(numbers)}
        with torch.no_grad():
            states = torch.stack([ends[number] for number in range(len(jobs))])
            values, head = measured_states(work, frozen.head, states, jobs)
        return values, cost + head

    def _frozen_row(self, work: Work, job: Job, branches: Mapping[ModelBranch, FrozenBranch]) -> FrozenRow:
        """The sender's row, with its receivers' inputs."""
        plan, prompt = work.plan, job[0]
        row = row_of(work, job)
        inside = [self.branches.of(place) for place in plan.targets[job[1]].places]
        free = frozenset(branches[branch] for branch in inside if branch is not None)
        read = self._read(work, prompt)
        first = min(self.rank[place][0] for place in plan.targets[job[1]].places)
        reads: list[Read] = []
        for receiver in self.receivers[job[1]]:
            positions = [token for token in tokens_of(receiver, plan.corrupted)[prompt] if token <= read]
            if self.branches.stream_at(receiver) == self.branches.ends_at:
                if read in positions:
                    return FrozenRow(Row(prompt, row.edits, read), free)
                continue
            if positions and self.rank[receiver][0] >= first:
                reads.append(Read(receiver.place, tuple(positions)))
        return FrozenRow(Row(prompt, row.edits, None, tuple(reads)), free)

    @staticmethod
    def _read(work: Work, prompt: int) -> int:
        return work.plan.metric.metric.position % work.plan.corrupted.length("decoder", prompt)


# --- whether it is right ----------------------------------------------------------------------------------------------

#: Results of trials, by model and question: the attention of packed rows, or the reason not to use them.
_trusted: weakref.WeakKeyDictionary[nn.Module, dict[Hashable, _TrialResult]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class _TrialResult:
    way: str | None
    refused: str
    longest: int
    #: A note about numbers in half precision.
    rough: str = ""


@dataclass(frozen=True)
class PathExecution:
    """The execution of a plan's paths, which parts of the plan use without a trial."""

    packed: bool
    #: How packed rows come by their attention.
    attention: str | None = None
    note: str = ""


def path_execution(plan: Plan, model: engine.Model, executor: Executor, at_once: int) -> PathExecution:
    """The way of a plan that others will run in parts: tried on its longest prompt and its shortest, once."""
    prompts = plan.jobs.prompts
    if not prompts or executor.choose is None:
        return PathExecution(False)
    lengths = plan.corrupted.lengths("decoder")
    part = plan.take(sorted({max(prompts, key=lengths.__getitem__), min(prompts, key=lengths.__getitem__)}))
    with engine.locked(model):
        logits, source, _ = clean_run(model, part, at_once)
        work = Work(model, part, source, logits if part.metric.metric.compares else None)
        found, note, _ = executor.choose(work)
    return PathExecution(found.name == PACKED, work.memo.get("way"), note)


def handed(work: Work, way: PathExecution, paths: PackedPaths, slow: Executor) -> tuple[Executor, str, Cost]:
    """The remembered answer of `chosen`, if there is one."""
    if not way.packed:
        return slow, way.note, Cost()
    work.memo["way"] = way.attention
    return Executor(paths, whole_prompts, mixed=True, name=PACKED), way.note, Cost()


def chosen(work: Work, paths: PackedPaths, slow: Executor) -> tuple[Executor, str, Cost]:
    """Packed rows if they agree with the slow executor on a few cells, else that; the reason, and the trial's cost."""
    fast = Executor(paths, whole_prompts, mixed=True, name=PACKED)
    if not work.plan.jobs:
        return slow, "", Cost()
    known = _trusted.setdefault(unwrap(work.model), {})
    sites = frozenset(path.site for each in paths.receivers for path in each)
    asked, longest, cost = (probe_key(work), sites), longest_prompt(work), Cost()
    # What code of the user's does may depend on its variables, so that it is tried anew.
    own = engine.has_own_code(unwrap(work.model).modules())
    if own or asked not in known or known[asked].longest < longest:
        known[asked], cost = _tried(work, fast, slow, longest)
    answer = known[asked]
    if answer.way is None:
        return slow, "; ".join(filter(None, (f"not packed: {answer.refused}", answer.rough))), cost
    work.memo["way"] = answer.way
    return fast, answer.rough, cost


def _tried(work: Work, fast: Executor, slow: Executor, longest: int) -> tuple[_TrialResult, Cost]:
    jobs = probe_cells(work)
    size = 0.0

    def pointing(logits: Tensor) -> Tensor:
        nonlocal size
        size = max(size, float(logits.abs().max()))
        return direction(logits)

    metric = replace(work.plan.metric.metric, name="logits", rule=pointing, answers={}, compares=False, local=False)
    probe = replace(work, plan=replace(work.plan, metric=metric.bind(None, len(work.plan.corrupted))), memo={})
    one_by_one: list[float] = []
    cost, refused = Cost(), ""
    for job in jobs:
        values, spent = slow(probe, [job])
        one_by_one += values
        cost += spent
    for way in ways(whole_prompts(work, jobs)):
        probe.memo.clear()
        probe.memo["way"] = way
        try:
            values, spent = fast(probe, jobs)
        except Exception as error:
            if engine.is_out_of_memory(error):
                raise
            refused = refused or str(error).partition("\n")[0] or type(error).__name__
            continue
        cost += spent
        apart = max(abs(a - b) for a, b in zip(values, one_by_one, strict=True))
        if apart <= tolerance(work):
            rough, spent = _rough(work, fast, slow, jobs, way, size)
            return _TrialResult(way, "", longest, rough), cost + spent
        refused = f"the logits of a cell point {apart:.2g} away from where the three runs of its own point"
    rough, spent = _rough(work, None, slow, jobs, None, size)
    return _TrialResult(None, refused, longest, rough), cost + spent


def _rough(
    work: Work, fast: Executor | None, slow: Executor, jobs: Sequence[Job], way: str | None, size: float
) -> tuple[str, Cost]:
    """The rounding of half precision in the metric: cells run together compared with one run per cell.

    Args:
        size: the size of the cells' logits.
    """
    if dtype_of(work) not in HALF_PRECISION:
        return "", Cost()
    trial, one_by_one, cost = replace(work, memo={} if way is None else {"way": way}), [], Cost()
    for job in jobs:
        values, spent = slow(trial, [job])
        one_by_one += values
        cost += spent
    apart = 0.0
    if fast is not None:
        together, spent = fast(trial, jobs)
        apart, cost = float(np.abs(np.asarray(together, float) - np.asarray(one_by_one, float)).max()), cost + spent
    return rounding_note(work, apart, size), cost
