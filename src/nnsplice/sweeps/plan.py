"""`Plan`: the cells of a sweep before it runs, as plain data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from nnsplice.errors import BadArgument
from nnsplice.results import PART, SweepResult, taken
from nnsplice.shown import counted
from nnsplice.sweeps.jobs import Jobs
from nnsplice.sweeps.pieces import PlanPiece, pieces
from nnsplice.sweeps.planned_cells import PlannedCells
from nnsplice.units import MAX_TOKENS, SIZE, Planned


@dataclass(frozen=True, repr=False)
class Plan(PlannedCells, Planned[SweepResult]):
    """The cells that `ns.run` will compute, as plain data without a reference to the model.

    >>> plan = ns.plan_sweep(model, "w3 w4 w5", "w3 w6 w5", "layers[:].output[:]", ns.logit_diff("w7", "w8"))
    >>> len(plan)     # of nine sites the first token's cannot differ, and the last layer matters at the last token only
    5
    >>> len(plan.shard(0, 2)), len(plan.shard(1, 2))
    (3, 2)

    Attributes:
        corrupted: the prompts that are edited.
        clean: the prompts that values are taken from; None for an operation that takes nothing from another run.
        targets: the cells, in execution order.
        metric: the metric, with its answers as token ids.
        operation: the operation.
        reference: the capture that values are taken from, or None.
        align: how tokens of a pair correspond.
        seed: the seed of `"resample"` and `"noise"`.
        jobs: the (prompt, target) pairs to compute.
        known: the pairs that have the corrupted run's value, and are not computed.
        asked: the question as plain data.
        corruption: a change of the embeddings in every edited run, or None.
        tokens: the texts of each prompt's tokens.
        owners: for answers of several tokens, the prompt of each run.
        appended: for answers of several tokens, how many of them are appended in each run.
        foreign: whether the clean run is another model's.
        numbers: for a part, the number of each of its runs in the whole plan. Noise and samples are drawn
            by this number, so they are the same in every part.
        of: for a part, the number of runs of the whole plan.
    """

    def __len__(self) -> int:
        """The number of cells to compute."""
        return len(self.jobs)

    def __repr__(self) -> str:
        return f"Plan: {self.preview(0).splitlines()[0]}"

    def preview(self, n: int = 10) -> str:
        """The number of cells to compute and of cells known in advance, and the first cells.

        Args:
            n: how many cells are listed.
        """
        lines = [
            f"{counted(len(self.jobs), 'cell')} to compute, {len(self.known)} known without; "
            f"{counted(self.prompts, 'prompt')}, {self.operation.name}, "
            f"{self.metric.metric.name}"
        ]
        some = [(self.owners[run] if self.owners else run, target) for run, target in self.jobs[:n]]
        lines += [f"  prompt {prompt}  {self.targets[target].cell.path}" for prompt, target in some]
        if len(self.jobs) > n:
            lines.append(f"  ... and {len(self.jobs) - n} more")
        return "\n".join(lines)

    def shard(self, i: int, n: int) -> Plan:
        """Every n-th cell from the i-th on, to split a sweep between n machines.

        Args:
            i: the number of the shard, from 0.
            n: how many shards there are.

        Returns:
            A plan with these cells; `SweepResult.merge` joins the results.

        Raises:
            BadArgument: not `0 <= i < n`.
        """
        if not (isinstance(i, int) and isinstance(n, int) and 0 <= i < n):
            raise BadArgument(f"shard({i}, {n})", expected="shard(i, n) with 0 <= i < n")
        if not self.owners:
            return replace(self, jobs=self.jobs[i::n], known=self.known[i::n])
        # The runs of a cell stay together, as its value is their sum.
        owners = np.array(self.owners)
        mine = np.zeros((self.prompts, len(self.targets)), dtype=bool)
        runs, targets = (self.jobs + self.known).columns()
        mine[Jobs.of_columns(owners[runs], targets)[i::n].columns()] = True
        jobs, known = (
            Jobs.of_columns(runs[kept], targets[kept])
            for runs, targets in (self.jobs.columns(), self.known.columns())
            for kept in [mine[owners[runs], targets]]
        )
        return replace(self, jobs=jobs, known=known)

    def take(self, prompts: Sequence[int]) -> Plan:
        """The part with these prompts, by their indices here; `SweepResult.merge` joins the results of parts.

        A prompt keeps the number that it has in the whole, so its noise and its samples are the same in every part.

        >>> metric = ns.logit_diff("w7", "w8")
        >>> plan = ns.plan_sweep(model, ["w3 w4", "w5 w4"], ["w6 w4", "w9 w4"], "layers[:].output[0]", metric)
        >>> ns.run(plan.take([1]), model, progress=False).grid().prompt.values
        array([1])

        Args:
            prompts: the numbers of the prompts.

        Raises:
            BadArgument: a prompt that does not exist, or the same twice.
        """
        rows = list(prompts)
        wrong = [row for row in rows if isinstance(row, bool) or not 0 <= row < self.prompts]
        if not rows or wrong or len(set(rows)) != len(rows):
            raise BadArgument(f"take({rows[:8]})", expected=f"numbers from 0 to {self.prompts - 1}, each once")
        if rows == list(range(self.prompts)):
            return self
        runs_of = self.runs_of
        runs = [run for row in rows for run in runs_of[row]]
        if self.owners and self.corruption is not None:
            raise BadArgument("a part of prompts with answers of several tokens and a corruption")
        part = replace(
            self,
            corrupted=(edited := self.corrupted.take(runs)),
            clean=edited if self.clean is self.corrupted else None if self.clean is None else self.clean.take(runs),
            metric=self.metric.take(runs),
            jobs=self.jobs.take(runs),
            known=self.known.take(runs),
            asked=taken(self.asked, rows, self._whole),
            corruption=None if self.corruption is None else self.corruption.take(runs),
            tokens=tuple(self.tokens[row] for row in rows) if self.tokens else (),
            owners=tuple(place for place, row in enumerate(rows) for _ in runs_of[row]) if self.owners else (),
            appended=tuple(self.appended[run] for run in runs) if self.appended else (),
            numbers=tuple(self.number(run) for run in runs),
            of=self.runs,
        )
        part.__dict__["positions_alike"] = self.positions_alike  # of the same targets
        return part

    def units(
        self, size: float | None = None, *, executor: str = "auto", max_tokens: int = MAX_TOKENS
    ) -> tuple[Unit, ...]:
        """Split the plan into units of work for other processes. Each cell is in one unit, and each unit is a plan.

        The units depend on the plan and never on the number of workers, as batching affects rounding. A unit has
        several short prompts, one prompt, or some layers of a long prompt.

        >>> plan = ns.plan_sweep(model, ["w3 w4", "w5"], ["w6 w4", "w9"], "layers[:].output[:]", ns.logit_diff(7, 8))
        >>> [(unit.number, unit.prompts, len(unit.plan)) for unit in plan.units(size=10)]
        [(0, (0,), 2), (1, (0,), 3), (2, (1,), 3)]

        Args:
            size: the approximate work of a unit, in tokens times layers; 2.5 million if left out, which takes a model
                of 8 billion parameters some seconds on a GPU.
            executor: as for `ns.run`; with `"auto"` the workers of a run agree on one.
            max_tokens: the number of tokens that run at once, the same on every machine.

        Returns:
            The units, in the order in which workers take them.

        Raises:
            BadArgument: a size of 0 or less.
        """
        if size is not None and not size > 0:
            raise BadArgument(f"size={size}", expected="a number above 0, in tokens times layers")
        decoder = self.corrupted.lengths("decoder")
        lengths = [max(decoder[run] for run in runs) for runs in self.runs_of]
        found = pieces(lengths, *self._costs(), SIZE if size is None else size)
        return tuple(Unit(number, piece, executor, max_tokens, self) for number, piece in enumerate(found))

    def costs_of_prompts(self) -> np.ndarray:
        """`[prompt]`: the work of all cells of each prompt, in tokens times layers."""
        return self._costs()[1]

    def estimate(self, size: float | None = None) -> Estimate:
        """The work of the plan, before anything runs.

        >>> plan = ns.plan_sweep(model, ["w3 w4", "w5"], ["w6 w4", "w9"], "layers[:].output[:]", ns.logit_diff(7, 8))
        >>> plan.estimate(size=10)
        Estimate(cells=8, known=1, units=3, work=52.0, naive=57.0)

        Args:
            size: the work of a unit, as for `units`.

        Returns:
            The number of cells and units, and the work.
        """
        unedited, totals, _ = self._costs()
        layers = 1 + max(part.cell.layer or 0 for target in self.targets for part in target.parts)
        runs, _ = self.jobs.columns()
        whole = layers * np.array(self.corrupted.lengths("decoder"))
        units, naive = self.units(size), float(whole[runs].sum() + unedited.sum())
        work = sum(float(unedited[list(unit.prompts)].sum()) for unit in units) + float(totals.sum())
        return Estimate(len(self.jobs), len(self.known), len(units), work, naive)

    def costs(self) -> list[float]:
        """The approximate work of each prompt with its unedited runs, in tokens times layers."""
        unedited, totals, _ = self._costs()
        return (unedited[: self.prompts] + totals).tolist()

    def _costs(self) -> tuple[np.ndarray, np.ndarray, Callable[[int], np.ndarray]]:
        """In tokens times layers: the unedited runs of each prompt, all its cells, and a function for single cells."""
        layer = np.array([min((part.cell.layer or 0) for part in target.parts) for target in self.targets])
        layers = int(layer.max()) + 1
        tokens = np.zeros((len(self.alike), len(self.targets)), dtype=np.float32)
        group = np.zeros(len(self.corrupted), dtype=int)
        for number, runs in enumerate(self.alike):
            group[runs] = number
            for members in self.positions_alike:
                if self.has(target := self.targets[members[0]], runs[0]):
                    first = min(min(self.positions(part, runs[0])) for part in target.parts)
                    read = self.metric.metric.position % self.corrupted.length("decoder", runs[0])
                    tokens[number, members] = max(read + 1 - max(first, self.shared_start(target, runs[0])), 1)
        cost = tokens * (layers - layer)
        runs, targets = self.jobs.columns()
        owners = np.array(self.owners) if self.owners else np.arange(len(self.corrupted))
        unedited = np.bincount(owners, 2.0 * layers * np.array(self.corrupted.lengths("decoder")))
        totals = np.bincount(owners[runs], cost[group[runs], targets], self.prompts)

        def each(prompt: int) -> np.ndarray:
            found = np.zeros(len(self.targets))
            for run in self.runs_of[prompt]:
                _, numbers = self.jobs.take([run]).columns()
                found[numbers] += cost[group[run], numbers]
            return found

        return unedited, totals, each

    @property
    def _whole(self) -> int:
        """The number of prompts of the whole plan."""
        return self.asked[PART]["of"] if PART in self.asked else self.prompts


@dataclass(frozen=True)
class Estimate:
    """The work of a plan, in tokens times layers."""

    #: The cells to compute, and those known in advance.
    cells: int
    known: int
    units: int
    #: With packed rows, in units: each cell from its first changed layer and token on, and each unit's unedited runs.
    work: float
    #: With a full forward pass for each cell.
    naive: float


@dataclass(frozen=True)
class Unit:
    """A piece of a plan that one process runs at a time: `ns.run(unit.plan, model, ...)`."""

    number: int
    piece: PlanPiece
    executor: str
    max_tokens: int
    whole: Plan = field(repr=False)

    @property
    def prompts(self) -> tuple[int, ...]:
        """Its prompts, by their indices in the plan that was cut."""
        return self.piece.prompts

    @cached_property
    def plan(self) -> Plan:
        """Its cells, as a plan of its own prompts."""
        part = self.whole.take(self.prompts)
        start, stop = self.piece.start, self.piece.stop
        if start == 0 and stop is None:
            return part
        last = len(self.whole.targets) if stop is None else stop
        jobs, known = (some.within(start, last) for some in (part.jobs, part.known))
        return replace(part, jobs=jobs, known=known)
