"""Path patching as rows of the packed engine, in two runs.

The first run has the sender patched and all other branches frozen, and gives the receivers' inputs (`run_frozen`); no
block runs between a sender and its receivers. The second run starts at the receivers, with these inputs written. A
receiver at the end of the stream needs no second run.

A trial compares this with the three full runs of the literature on a few cells of the plan.
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
    """Runs jobs of path patching: the metric of each, and the cost."""

    branches: Branches
    #: The receivers of each target of the plan.
    receivers: Sequence[Sequence[Path]]
    #: The place of each site in the order of execution.
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
        """The row of the first run: the sender patched, its receivers' inputs read."""
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

#: Results of trials, by model, `probe_key` and receivers.
_trusted: weakref.WeakKeyDictionary[nn.Module, dict[Hashable, _TrialResult]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class _TrialResult:
    #: The way of the recording (`packed.recording.WAYS`); None if packed rows are not used.
    way: str | None
    #: Why they are not used.
    refused: str
    #: The length of the longest prompt that was tried.
    longest: int
    #: A note about rounding in half precision.
    rounding: str = ""


@dataclass(frozen=True)
class PathExecution:
    """How to run the paths of a plan: the result of a trial, for its units."""

    packed: bool
    #: The way of the recording that packed rows start from: one of `packed.recording.WAYS`.
    attention: str | None = None
    note: str = ""


def path_execution(plan: Plan, model: engine.Model, executor: Executor, at_once: int) -> PathExecution:
    """How all units of a plan run, from a trial on its longest and its shortest prompt."""
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


def remembered(work: Work, execution: PathExecution, paths: PackedPaths, slow: Executor) -> tuple[Executor, str, Cost]:
    """As `chosen`, with the result of an earlier trial."""
    if not execution.packed:
        return slow, execution.note, Cost()
    work.memo["way"] = execution.attention
    return Executor(paths, whole_prompts, mixed=True, name=PACKED), execution.note, Cost()


def chosen(work: Work, paths: PackedPaths, slow: Executor) -> tuple[Executor, str, Cost]:
    """The packed executor if it agrees with the slow one on a few cells, else that one; a note; the trial's cost."""
    fast = Executor(paths, whole_prompts, mixed=True, name=PACKED)
    if not work.plan.jobs:
        return slow, "", Cost()
    known = _trusted.setdefault(unwrap(work.model), {})
    sites = frozenset(path.site for each in paths.receivers for path in each)
    key, longest, cost = (probe_key(work), sites), longest_prompt(work), Cost()
    # The effect of a user's hook may depend on variables, so nothing is remembered.
    own = engine.has_own_code(unwrap(work.model).modules())
    if own or key not in known or known[key].longest < longest:
        known[key], cost = _trial(work, fast, slow, longest)
    answer = known[key]
    if answer.way is None:
        return slow, "; ".join(filter(None, (f"not packed: {answer.refused}", answer.rounding))), cost
    work.memo["way"] = answer.way
    return fast, answer.rounding, cost


def _trial(work: Work, fast: Executor, slow: Executor, longest: int) -> tuple[_TrialResult, Cost]:
    jobs = probe_cells(work)
    size = 0.0

    def direction_of(logits: Tensor) -> Tensor:
        nonlocal size
        size = max(size, float(logits.abs().max()))
        return direction(logits)

    metric = replace(work.plan.metric.metric, name="logits", rule=direction_of, answers={}, compares=False, local=False)
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
            rounding, spent = _rounding_of(work, fast, slow, jobs, way, size)
            return _TrialResult(way, "", longest, rounding), cost + spent
        refused = f"the logits of a cell point {apart:.2g} away from where the three runs of its own point"
    rounding, spent = _rounding_of(work, None, slow, jobs, None, size)
    return _TrialResult(None, refused, longest, rounding), cost + spent


def _rounding_of(
    work: Work, fast: Executor | None, slow: Executor, jobs: Sequence[Job], way: str | None, size: float
) -> tuple[str, Cost]:
    """The note about rounding in half precision, from cells run together and one by one; and the cost.

    Args:
        size: the largest logit of the cells.
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
