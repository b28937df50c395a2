"""Path patches as rows of the packed engine: what receivers read of a sender, and the runs in which they have that.

Nothing runs between a sender and its receivers, as every branch there stands still; and the second run begins at the
receivers. A receiver that is the end of the stream needs no second run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from nnsplice import engine
from nnsplice.attribution.branches import Branch as ModelBranch
from nnsplice.attribution.branches import Branches
from nnsplice.packed import Branch, Cost, Edit, Read, Row, StillRow, run, run_still
from nnsplice.paths import Path
from nnsplice.sweeps.executors import Work
from nnsplice.sweeps.packing import base_of, measured_states, row_of
from nnsplice.sweeps.plan import Job
from nnsplice.sweeps.targets import tokens_of


@dataclass(frozen=True)
class PackedPaths:
    """Jobs -> the metric of each, and what it cost."""

    branches: Branches
    #: For each target of the plan.
    receivers: Sequence[Sequence[Path]]
    #: When each place is reached.
    rank: Mapping[Path, engine.Rank]

    def __call__(self, work: Work, jobs: Sequence[Job]) -> tuple[list[float], Cost]:
        """Run jobs.

        Raises:
            NotImplementedError: this model, or one of these places, is not covered.
        """
        branches = {branch: Branch(branch.block.index, branch.added) for branch in self.branches.all}
        base = base_of(work, keep=tuple(branch.added for branch in branches.values()))
        rows = [self._still(work, job, branches) for job in jobs]
        still = run_still(base, rows, tuple(branches.values()))
        again: list[Row] = []
        numbers: list[int] = []
        for number, row in enumerate(rows):
            if row.row.end is None:
                moved = [(read, still.moved.get((number, read))) for read in row.row.reads]
                edits = tuple(Edit.of(read.place, *found) for read, found in moved if found is not None)
                again.append(Row(row.row.prompt, edits, self._read(work, row.row.prompt)))
                numbers.append(number)
        cost, ends = still.cost, dict(still.ends)
        if again:
            ran = run(base, again)
            cost += ran.cost
            ends |= {number: ran.ends[order] for order, number in enumerate(numbers)}
        with torch.no_grad():
            states = torch.stack([ends[number] for number in range(len(jobs))])
            values, head = measured_states(work, still.head, states, jobs)
        return values, cost + head

    def _still(self, work: Work, job: Job, branches: Mapping[ModelBranch, Branch]) -> StillRow:
        """The sender's row, with what its receivers read."""
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
                    return StillRow(Row(prompt, row.edits, read), free)
                continue
            if positions and self.rank[receiver][0] >= first:
                reads.append(Read(receiver.place, tuple(positions)))
        return StillRow(Row(prompt, row.edits, None, tuple(reads)), free)

    @staticmethod
    def _read(work: Work, prompt: int) -> int:
        return work.plan.metric.metric.position % work.plan.corrupted.lengths("decoder")[prompt]
