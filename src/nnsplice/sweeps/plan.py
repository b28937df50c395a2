"""`Plan`: the cells of a sweep before it runs, as plain data."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from nnsplice.activations.prompts import Prompts
from nnsplice.activations.saved_activation import SavedActivation
from nnsplice.errors import BadArgument
from nnsplice.metrics import Bound, Several
from nnsplice.paths import Slice, Span
from nnsplice.results import PART, taken
from nnsplice.shown import counted
from nnsplice.sweeps.cells import Part, Target, has_tokens, own_tokens
from nnsplice.sweeps.cutting import Piece, pieces
from nnsplice.sweeps.jobs import Jobs
from nnsplice.sweeps.operations import Operation
from nnsplice.sweeps.targets import Corruption
from nnsplice.units import MAX_TOKENS, SIZE


@dataclass(frozen=True, repr=False)
class Plan:
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
        numbers: of a part, the numbers that its runs have in the whole plan.
        of: of a part, how many runs the whole plan has.
    """

    corrupted: Prompts
    clean: Prompts | None
    targets: tuple[Target, ...]
    metric: Bound | Several
    operation: Operation
    reference: SavedActivation | None
    align: str
    seed: int
    #: What has to be computed, and what is known to be the corrupted run's value.
    jobs: Jobs
    known: Jobs
    asked: Mapping[str, Any] = field(repr=False)
    corruption: Corruption | None = field(default=None, repr=False)
    tokens: tuple[tuple[str, ...], ...] = field(default=(), repr=False)
    owners: tuple[int, ...] = ()
    appended: tuple[int, ...] = ()
    foreign: bool = False
    #: Of a part with some of the prompts: the numbers that its runs have in the whole, and how many there are. What is
    #: drawn for a prompt (noise, samples of a reference) goes by its number, and is the same in every part.
    numbers: tuple[int, ...] = ()
    of: int = 0

    def __post_init__(self) -> None:
        # Any cells will do, in any order.
        object.__setattr__(self, "jobs", Jobs.of(self.jobs))
        object.__setattr__(self, "known", Jobs.of(self.known))

    def __len__(self) -> int:
        """The number of cells to compute."""
        return len(self.jobs)

    def __repr__(self) -> str:
        return f"Plan: {self.preview(0).splitlines()[0]}"

    @property
    def prompts(self) -> int:
        """The number of prompts."""
        return max(self.owners) + 1 if self.owners else len(self.corrupted)

    @property
    def runs(self) -> int:
        """How many runs the whole has that this is a part of."""
        return self.of or len(self.corrupted)

    def number(self, run: int) -> int:
        """The number of a run in the whole.

        Args:
            run: its index here.

        Returns:
            Its number.
        """
        return self.numbers[run] if self.numbers else run

    def preview(self, n: int = 10) -> str:
        """The first cells, and how many are computed and how many known in advance.

        Args:
            n: how many cells are listed.

        Returns:
            A text of one line for each cell.
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

        Returns:
            The part.

        Raises:
            BadArgument: a prompt that there is not, or the same twice.
        """
        rows = list(prompts)
        wrong = [row for row in rows if isinstance(row, bool) or not 0 <= row < self.prompts]
        if not rows or wrong or len(set(rows)) != len(rows):
            raise BadArgument(f"take({rows[:8]})", expected=f"numbers from 0 to {self.prompts - 1}, each once")
        if rows == list(range(self.prompts)):
            return self
        runs_of = self._runs_of
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
        """The plan in units of work for other processes: each a plan, together every cell once, the same ones always.

        Units are cut by the plan alone and never by how many workers there are, as a number is rounded otherwise beside
        others. A unit has whole prompts: short ones together, and of a long one a stretch of its layers.

        >>> plan = ns.plan_sweep(model, ["w3 w4", "w5"], ["w6 w4", "w9"], "layers[:].output[:]", ns.logit_diff(7, 8))
        >>> [(unit.number, unit.prompts, len(unit.plan)) for unit in plan.units(size=10)]
        [(0, (0,), 2), (1, (0,), 3), (2, (1,), 3)]

        Args:
            size: how much work a unit is about, in tokens times layers that are run; 2.5 million if left out, which
                take a model of 8 billion parameters some seconds on a GPU.
            executor: as for `ns.run`; with `"auto"` the workers of a run agree on one.
            max_tokens: how many tokens run at once, on every machine alike.

        Returns:
            The units, in the order in which they are taken.

        Raises:
            BadArgument: a size of 0 or less.
        """
        if size is not None and not size > 0:
            raise BadArgument(f"size={size}", expected="a number above 0, in tokens times layers")
        decoder = self.corrupted.lengths("decoder")
        lengths = [max(decoder[run] for run in runs) for runs in self._runs_of]
        found = pieces(lengths, *self._costs(), SIZE if size is None else size)
        return tuple(Unit(number, piece, executor, max_tokens, self) for number, piece in enumerate(found))

    def costs_of_prompts(self) -> np.ndarray:
        """`[prompt]`: the work of all of its cells, by which units are cut."""
        return self._costs()[1]

    def estimate(self, size: float | None = None) -> Estimate:
        """How much work the plan is, before anything runs.

        >>> plan = ns.plan_sweep(model, ["w3 w4", "w5"], ["w6 w4", "w9"], "layers[:].output[:]", ns.logit_diff(7, 8))
        >>> plan.estimate(size=10)
        Estimate(cells=8, known=1, units=3, work=52.0, naive=57.0)

        Args:
            size: of a unit, as for `units`.

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
        """In tokens times layers, about how much work each prompt is."""
        unedited, totals, _ = self._costs()
        return (unedited[: self.prompts] + totals).tolist()

    def _costs(self) -> tuple[np.ndarray, np.ndarray, Callable[[int], np.ndarray]]:
        """In tokens times layers, what each prompt costs without an edit, and with all, and each cell of one prompt."""
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
            for run in self._runs_of[prompt]:
                _, numbers = self.jobs.take([run]).columns()
                found[numbers] += cost[group[run], numbers]
            return found

        return unedited, totals, each

    @cached_property
    def _runs_of(self) -> list[list[int]]:
        """`[prompt]`: its runs, of which there are several where answers have several tokens."""
        if not self.owners:
            return [[run] for run in range(len(self.corrupted))]
        found: list[list[int]] = [[] for _ in range(self.prompts)]
        for run, owner in enumerate(self.owners):
            found[owner].append(run)
        return found

    @property
    def _whole(self) -> int:
        """How many prompts the whole has."""
        return self.asked[PART]["of"] if PART in self.asked else self.prompts

    def shared_start(self, target: Target, prompt: int) -> int:
        """The number of leading tokens that both prompts of a pair share; patching there changes nothing.

        0 for anything but a patch between a pair.

        Args:
            target: the cell.
            prompt: the number of the pair.

        Returns:
            The number of tokens.
        """
        start = self._starts[prompt]
        if start and self._spans_differ and any(isinstance(part.position, Span) for part in target.parts):
            return 0
        return start

    @cached_property
    def _starts(self) -> list[int]:
        """`[prompt]`: how many tokens the two runs of each pair share."""
        if self.operation.name != "patch" or self.clean is None or self.align != "position" or self.foreign:
            return [0] * len(self.corrupted)
        changed = self.corruption.positions if self.corruption is not None else ((),) * len(self.corrupted)
        each = [self.clean.shared_start(self.corrupted, row) for row in range(len(self.corrupted))]
        return [min([start, *tokens]) for start, tokens in zip(each, changed, strict=True)]

    @cached_property
    def _spans_differ(self) -> bool:
        return self.clean is not None and self.clean.spans != self.corrupted.spans

    @cached_property
    def alike(self) -> list[list[int]]:
        """Prompts in groups: all that this class tells of a target is the same for the prompts of a group.

        What a plan asks of its cells is asked once for each group and each of `positions_alike`, so that planning
        takes as long as there are lengths and spans, and not as long as there are cells.
        """
        positions = [at for target in self.targets for part in target.parts for at in (part.position, part.key)]
        names = {at.name for at in positions if isinstance(at, Span)} | ({"subject"} if self.align == "role" else set())
        both = [prompts for prompts in (self.corrupted, self.clean) if prompts is not None]
        told: list[Sequence[Hashable]] = [self._starts, self.appended or self._starts]
        told += [prompts.lengths(tower) for prompts in both for tower in ("encoder", "decoder")]
        told += [bounds for prompts in both for name, bounds in (prompts.spans or {}).items() if name in names]
        groups: dict[Hashable, list[int]] = {}
        for prompt, key in enumerate(zip(*told, strict=True)):
            groups.setdefault(key, []).append(prompt)
        return list(groups.values())

    @cached_property
    def positions_alike(self) -> list[list[int]]:
        """Targets in groups: those that are changed at the same tokens."""
        groups: dict[Hashable, list[int]] = {}
        for number, target in enumerate(self.targets):
            groups.setdefault(tuple((p.tower, p.position, p.key) for p in target.parts), []).append(number)
        return list(groups.values())

    def exists(self) -> np.ndarray:
        """Whether each prompt is long enough for each cell: `[prompt, target]`."""
        found = np.zeros((len(self.corrupted), len(self.targets)), dtype=bool)
        for prompts in self.alike:
            has = np.zeros(len(self.targets), dtype=bool)
            for numbers in self.positions_alike:
                has[numbers] = self.has(self.targets[numbers[0]], prompts[0])
            found[prompts] = has
        return found

    def has(self, target: Target, prompt: int) -> bool:
        """Whether a prompt has the tokens of a cell, and the other prompt of the pair their counterparts.

        Args:
            target: the cell.
            prompt: the number of the prompt.

        Returns:
            True or False.
        """
        return all(self._has(part, prompt) for part in target.parts)

    def _has(self, part: Part, prompt: int) -> bool:
        length, position = self._own(part, prompt), part.position
        if not has_tokens(position, length) or not has_tokens(part.key, length):
            return False
        if not isinstance(position, int | Slice):
            return True
        tokens = own_tokens(position, self.corrupted, prompt, length)
        return all(self._partner(part, prompt, token) is not None for token in tokens)

    def _own(self, part: Part, prompt: int) -> int:
        """How many tokens a prompt has that positions count; what is appended of its answer is none of them."""
        length = self.corrupted.length(part.tower, prompt)
        return length - self.appended[prompt] if self.appended else length

    def _partner(self, part: Part, prompt: int, token: int) -> int | None:
        """The clean prompt's token that an edited one's corresponds to, where values come from there."""
        if self.clean is None or self.align == "position" or self.operation.name != "patch":
            return token
        if self.align == "role":
            return partner(self.corrupted, self.clean, prompt, token)
        found = token + self.clean.length(part.tower, prompt) - self.corrupted.length(part.tower, prompt)
        return found if found >= 0 else None

    def positions(self, part: Part, prompt: int, *, of_clean: bool = False) -> list[int]:
        """The tokens of a prompt that a cell changes.

        Args:
            part: the site and position.
            prompt: the number of the prompt.
            of_clean: their counterparts in the clean prompt instead.

        Returns:
            The positions.
        """
        prompts = self.clean if of_clean and self.clean is not None else self.corrupted
        # All tokens are also those that are appended of an answer.
        every = part.position is None
        length = self.corrupted.length(part.tower, prompt) if every else self._own(part, prompt)
        own = own_tokens(part.position, prompts, prompt, length)
        if isinstance(part.position, Span):
            return own
        pairs = [(token, self._partner(part, prompt, token)) for token in own]
        return [there if of_clean else token for token, there in pairs if there is not None]

    def edges(self, part: Part, prompt: int) -> list[tuple[int, int]]:
        """The (query, key) pairs that a knockout removes.

        Args:
            part: the site and positions.
            prompt: the number of the prompt.

        Returns:
            The pairs.
        """
        assert part.key is not None
        keys = own_tokens(part.key, self.corrupted, prompt, self._own(part, prompt))
        return [(query, key) for query in self.positions(part, prompt) for key in keys]


@dataclass(frozen=True)
class Estimate:
    """How much work a plan is, in tokens times layers that are run."""

    #: To compute, and known without.
    cells: int
    known: int
    units: int
    #: On packed rows, in units: each cell from its layer and its token on, and the unedited runs of every unit.
    work: float
    #: With a run of the whole prompt for each cell.
    naive: float


@dataclass(frozen=True)
class Unit:
    """A piece of a plan that one process runs at a time: `ns.run(unit.plan, model, ...)`."""

    number: int
    piece: Piece
    executor: str
    max_tokens: int
    whole: Plan = field(repr=False)

    @property
    def prompts(self) -> tuple[int, ...]:
        """Its prompts, by their indices in the plan that was cut."""
        return self.piece.prompts

    @cached_property
    def plan(self) -> Plan:
        """Its cells, as a plan that runs its own prompts and no others."""
        part = self.whole.take(self.prompts)
        start, stop = self.piece.start, self.piece.stop
        if start == 0 and stop is None:
            return part
        last = len(self.whole.targets) if stop is None else stop
        jobs, known = (some.within(start, last) for some in (part.jobs, part.known))
        return replace(part, jobs=jobs, known=known)


def partner(edited: Prompts, source: Prompts, prompt: int, token: int) -> int | None:
    """The token of the other prompt that is by its subject what this one is by its own; None where there is none."""
    assert edited.spans is not None and source.spans is not None
    here, there = (
        _stretches(*prompts.spans["subject"][prompt], len(prompts.ids[prompt]))  # type: ignore[index]
        for prompts in (edited, source)
    )
    for (start, stop), (first, last) in zip(here, there, strict=True):
        if start <= token < stop:
            return first + token - start if stop - start == last - first else None
    return None


def _stretches(start: int, stop: int, length: int) -> list[tuple[int, int]]:
    """Before the subject, its first token, those between, its last, the first after it, those between, the last."""
    after, end = min(stop + 1, length - 1), length - 1
    inner = min(start + 1, stop - 1)
    return [
        (0, start), (start, inner), (inner, stop - 1), (stop - 1, stop),
        (stop, max(after, stop)), (max(after, stop), max(end, stop)), (max(end, stop), length),
    ]  # fmt: skip
