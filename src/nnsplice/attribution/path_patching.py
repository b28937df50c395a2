"""`path_patch`: the exact effect of a site through chosen receivers alone.

Three runs in one pass. Its rows are, for each cell: a run in which the sender has its clean value and every branch
after it stands still, so that only what the receivers read is changed; and a run in which the receivers have what the
first run gave them, and everything goes on from there. Beside these each prompt runs once as it is: what the branches
stand still at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nnsplice import closures, engine, wire
from nnsplice.activations import derived, features
from nnsplice.activations.access import Access, accesses, live_value, site_of
from nnsplice.activations.prompts import PromptsLike
from nnsplice.atlas import DERIVED
from nnsplice.attribution.branches import Branch, Branches, branches_of
from nnsplice.attribution.packed_paths import PackedPaths, PathExecution, chosen, remembered
from nnsplice.errors import BadArgument, RefusedPlace, circumstances
from nnsplice.metrics import Metrics
from nnsplice.packed.cost import Cost
from nnsplice.paths import Path, Paths, parse_path
from nnsplice.results import SweepResult
from nnsplice.sweeps.executors import Executor, Work, check_length, measured, whole_prompts
from nnsplice.sweeps.expansion import tokens_of
from nnsplice.sweeps.jobs import Job
from nnsplice.sweeps.options import RUNNING, check_options, known_of
from nnsplice.sweeps.plan import Plan
from nnsplice.sweeps.planning import plan_sweep
from nnsplice.sweeps.reading import only_read, read_at
from nnsplice.sweeps.running import run_fresh
from nnsplice.sweeps.targets import Target

#: Options of `ns.sweep` that are refused: a path patch takes clean values, at the tokens of its senders.
SET_HERE = ("operation", "reference", "corruption", "seed", "source")


def path_patch(
    model: Any,
    clean: PromptsLike | None,
    corrupted: PromptsLike | None,
    senders: Paths,
    receivers: Paths,
    metric: Metrics,
    *,
    together: bool = True,
    **options: Any,
) -> SweepResult:
    """Path patching: patch one sender at a time, and let its new value reach the receivers only.

    First the corrupted run is made with the sender's clean value and all attention and MLP outputs after it held fixed,
    which gives the receivers' new values. These are then written into a corrupted run in which nothing else is fixed,
    and the metric is measured. A receiver does not see another receiver's new value in the first run: each gets the
    sender's direct contribution.

    The receiver `"unembed"` gives the direct effect on the logits.

    >>> metric = ns.logit_diff("w7", "w8")
    >>> pair = "w3 w4 w5", "w3 w6 w5"
    >>> ns.path_patch(model, *pair, "layers[0].heads[:]", "layers[2].heads[1].q", metric, progress=False).grid().sizes
    Frozen({'prompt': 1, 'layer': 1, 'head': 4})

    Args:
        model: a model from `ns.load`, in eval mode.
        clean: the prompts that the senders' values are taken from. Prompt i is paired with prompt i of `corrupted`.
        corrupted: the prompts whose run is edited.
        senders: a path or several; each site is a cell. Without a position all its tokens are patched at once, with
            `[:]` each token is a cell.
        receivers: paths to queries, keys, values, heads, attention or MLP outputs, or the stream; without a position,
            at all tokens.
        metric: `ns.logit_diff(answer, wrong)`, another metric, or a function `logits[row, vocab] -> [row]`.
        together: False makes each token of a sender without a position a cell, as `[:]` does.
        **options: `spans`, `align` and `window` (of whole branches) of `ns.plan_sweep`; `max_tokens`, `journal` and
            `progress` of `ns.run`.

    Returns:
        The metric with each sender patched.

    Raises:
        BadType: an option that does not exist.
        BadArgument: senders together that reach each other, a metric of several tokens, or no sender before a receiver.
        RefusedPlace: a sender or receiver that is derived from several values, such as a pattern or one expert, or the
            logits of a router.
    """
    if "executor" in options:
        raise BadArgument("path_patch has one way of running", expected="no executor=")
    check_options("ns.path_patch", options, known_of(path_patch, plan_sweep, SET_HERE))
    running = {name: options.pop(name) for name in RUNNING if name in options}
    model = engine.as_model(model)
    with circumstances("ns.path_patch"):
        plan = planned(model, clean, corrupted, senders, metric, together=together, **options)
        return run_paths(model, plan, [receivers] * len(plan.targets), **running)


def planned(
    model: engine.Model,
    clean: PromptsLike | None,
    corrupted: PromptsLike | None,
    senders: Paths,
    metric: Metrics,
    *,
    together: bool = True,
    **options: Any,
) -> Plan:
    """The plan of a sweep whose sites are senders; the arguments are those of `path_patch`.

    Raises:
        BadArgument: senders together that reach each other, or a metric of several tokens.
    """
    plan = plan_sweep(model, clean, corrupted, senders, metric, together=together, **options)
    if plan.owners:
        raise BadArgument(
            f"path_patch reads one position, and {plan.metric.metric.name} reads several",
            expected="a metric of single tokens, or several of them",
        )
    branches = branches_of(model)
    joint = next((target for target in plan.targets if target.is_set or _is_mixed(target, branches)), None)
    if joint is not None:
        # An earlier sender's effect on a later sender's branch would reach the receivers too.
        raise BadArgument(
            "senders that are patched together would reach each other's branches, and these the receivers",
            path=joint.cell.path,
            expected="single senders, each a cell; or a window of what whole branches add, attention at all tokens",
        )
    return plan


def _is_mixed(target: Target, branches: Branches) -> bool:
    """Whether an earlier sender of a window changes what a later one leaves of its branch."""
    (part,) = target.parts
    later = [(place, branch) for place in part.places[1:] if (branch := branches.of(place)) is not None]
    return any(
        site_of(place) != site_of(branch.added) or (branch.name == "attn" and part.position is not None)
        for place, branch in later
    )


def run_paths(model: engine.Model, plan: Plan, receivers: Sequence[Paths], **running: Any) -> SweepResult:
    """Run a plan whose sites are senders, each with its own receivers."""
    plan, paths = routed(model, plan, receivers)
    return run_fresh(plan, model, executor=paths.executor, **running)


def routed(model: engine.Model, plan: Plan, receivers: Sequence[Paths]) -> tuple[Plan, ReceiversBySender]:
    """A plan with the receivers that its senders reach, and the paths there.

    Raises:
        BadArgument: no sender reaches a receiver.
    """
    if plan.operation.name != "patch":
        raise BadArgument(f"operation={plan.operation.name!r}", expected="patching from the clean run")
    paths = ReceiversBySender.of(model, plan, receivers)
    named = [[str(path) for path in each] for each in paths.receivers]
    asked = {**plan.asked, "receivers": named[0] if all(names == named[0] for names in named) else named}
    reached = plan.jobs.of_targets(number for number in range(len(plan.targets)) if paths.reached(plan, number))
    if plan.jobs and not reached:
        raise BadArgument(
            "no sender comes before a receiver, so nothing can reach one",
            expected="senders that run before the receivers",
        )
    beside = plan.jobs.of_targets(number for number in range(len(plan.targets)) if not paths.reached(plan, number))
    return replace(plan, jobs=reached, known=plan.known + beside, asked=asked), paths


@dataclass(frozen=True)
class ReceiversBySender:
    """From each sender of a plan to its own receivers."""

    branches: Branches
    #: For each target of the plan.
    receivers: tuple[tuple[Path, ...], ...]
    rank: Mapping[Path, engine.Rank]

    @staticmethod
    def of(model: engine.Model, plan: Plan, receivers: Sequence[Paths]) -> ReceiversBySender:
        """For the receivers of each target; every mistake in them is found here."""
        branches, known = branches_of(model), engine.map_of(model)
        expanded: dict[tuple[str | Path, ...], tuple[Path, ...]] = {}
        for listed in map(engine.listed, receivers):
            if listed not in expanded:
                wanted = [parse_path(path) for path in listed]
                found = [place.at(path.position) for path in wanted for place in engine.expand(model, path.place)]
                expanded[listed] = tuple(sorted(dict.fromkeys(found), key=known.rank))
            if not expanded[listed]:
                raise BadArgument("no receivers, so nothing is reached", expected="at least one path")
        senders = [place for target in plan.targets for place in target.places]
        places = dict.fromkeys([*senders, *(path for paths in expanded.values() for path in paths)])
        received = dict.fromkeys(path for paths in expanded.values() for path in paths)
        for path in places:
            _check(path, branches, receives=path in received)
        derived.refuse_routers(model, received)
        closures.warn_of_joint_norms(model, places)
        for path in received:
            tokens_of(path, plan.corrupted)
        each = tuple(expanded[engine.listed(paths)] for paths in receivers)
        return ReceiversBySender(branches, each, {path: known.rank(path) for path in places})

    def reached(self, plan: Plan, target: int) -> bool:
        """Whether any receiver runs after this target's change."""
        first = min(self.rank[place][0] for place in plan.targets[target].places)
        return any(self.rank[path][0] >= first for path in self.receivers[target])

    @property
    def executor(self) -> Executor:
        """The executor for sweeps: packed rows if they agree with the three runs here, else these runs."""
        return Executor(
            self.run, self._tokens, name="paths", choose=lambda work: chosen(work, self._packed, self._three_runs)
        )

    def agreed(self, execution: PathExecution) -> Executor:
        """The executor that was chosen for the whole plan, for one of its parts."""
        return replace(self.executor, choose=lambda work: remembered(work, execution, self._packed, self._three_runs))

    @property
    def _packed(self) -> PackedPaths:
        return PackedPaths(self.branches, self.receivers, self.rank)

    @property
    def _three_runs(self) -> Executor:
        return Executor(self.run, self._tokens, name="paths")

    @staticmethod
    def _tokens(work: Work, jobs: Sequence[Job]) -> list[int]:
        """A cell has two rows, and each prompt may have one more."""
        return [3 * size for size in whole_prompts(work, jobs)]

    def run(self, work: Work, jobs: Sequence[Job]) -> tuple[list[float], Cost]:
        """Jobs -> the metric of each, and what it cost."""
        if not engine.has_code_by_row(work.model):
            return self._together(work, jobs)
        values: list[float] = []
        cost = Cost()
        for job in jobs:
            found, spent = self._one_by_one(work, job)
            values += found
            cost += spent
        return values, cost

    def _together(self, work: Work, jobs: Sequence[Job]) -> tuple[list[float], Cost]:
        """The three runs of each job as rows of one pass."""
        prompts = list(dict.fromkeys(prompt for prompt, _ in jobs))
        rows = [*prompts, *(prompt for prompt, _ in jobs), *(prompt for prompt, _ in jobs)]
        pass_ = _PathPass(self, work, jobs, prompts)
        logits, cost = self._logits(work, rows, jobs, pass_.changed)
        return measured(work, logits[len(prompts) + len(jobs) :], jobs), cost

    def _one_by_one(self, work: Work, job: Job) -> tuple[list[float], Cost]:
        """The three runs of a job one after the other, as code of the user's may tell rows of a batch apart."""
        pass_, cost = _PathPass(self, work, [job], [job[0]]), Cost()
        #: By the value's name, as the runs before this one computed it: `[1, token, width]` each.
        before: dict[str, list[Tensor]] = {}
        for number in range(3):

            def changed(access: Access, tensor: Tensor, number: int = number) -> Tensor:
                known = before.setdefault(str(access.paths), [])
                new = pass_.changed(access, torch.cat([*known, *[tensor] * (3 - number)]))
                known.append(tensor.clone())
                return new[number : number + 1]

            logits, spent = self._logits(work, [job[0]], [job], changed)
            cost += spent
        return measured(work, logits, [job]), cost

    def _logits(
        self, work: Work, rows: Sequence[int], jobs: Sequence[Job], changed: Callable[[Access, Tensor], Tensor]
    ) -> tuple[Tensor, Cost]:
        """A pass over prompts in which every value that matters is changed: `[row, vocab]`, where the metric reads."""
        plan, model = work.plan, work.model
        known = engine.map_of(model)
        still = [branch.added for branch in self.branches.all]
        senders = list(dict.fromkeys(place for _, cell in jobs for place in plan.targets[cell].places))
        receivers = [path for _, cell in jobs for path in self.receivers[cell]]
        stops = sorted(dict.fromkeys(path.place for path in (*senders, *receivers, *still)), key=known.rank)
        inputs = plan.corrupted.inputs(rows, model.device)
        assert isinstance(inputs, Mapping)
        batch, at = plan.corrupted.batch(rows), read_at(plan, rows[0])
        found: list[Tensor] = []

        def body() -> None:
            mediator = engine.worker(model, "ns.path_patch")
            for access in accesses(model, stops):
                held = live_value(access, mediator, batch.rows(access.tower))
                check_length(access, held.tensor, plan.corrupted.lengths(access.tower)[rows[0]])
                held.write(changed(access, held.tensor))
            found.append(wire.logits_of(model)[:, at].clone())

        with torch.no_grad():
            engine.run(model, {**inputs, **(fewer := only_read(model, at, stops))}, body)
        logits = fewer.get("logits_to_keep", plan.corrupted.length("decoder", rows[0]))
        return found[0], work.cost_model.whole(plan.corrupted, rows, logits)


class _PathPass:
    """The edits at each site of one pass."""

    def __init__(self, paths: ReceiversBySender, work: Work, jobs: Sequence[Job], prompts: Sequence[int]) -> None:
        self.work, self.jobs = work, jobs
        self.own = [prompts.index(prompt) for prompt, _ in jobs]
        self.still = slice(len(prompts), len(prompts) + len(jobs))
        self.free = slice(len(prompts) + len(jobs), None)
        self.branches = {site_of(branch.added): branch for branch in paths.branches.all}
        plan = work.plan
        self.inside = [self._inside(paths.branches, plan.targets[cell].places) for _, cell in jobs]
        #: Receiver -> the rows that it is one of.
        self.receivers: dict[Path, dict[Path, list[int]]] = {}
        for row, (_, cell) in enumerate(jobs):
            for path in paths.receivers[cell]:
                self.receivers.setdefault(path.place, {}).setdefault(path, []).append(row)

    @staticmethod
    def _inside(branches: Branches, places: Iterable[Path]) -> list[Branch | None]:
        return [branches.of(place) for place in places]

    def changed(self, access: Access, tensor: Tensor) -> Tensor:
        """The value that the run goes on with."""
        new = tensor.clone()
        for path in access.paths:
            start, stop = site_of(path).columns or (0, tensor.shape[-1])
            part = new[..., start:stop]
            self._send(path, part)
            for receiver, rows in self.receivers.get(path.place, {}).items():
                self._receive(receiver, rows, part)
        for path in access.paths:
            branch = self.branches.get(site_of(path))
            if branch is not None:
                self._hold_still(branch, new)
        return new

    def _send(self, path: Path, part: Tensor) -> None:
        plan, source = self.work.plan, self.work.source
        for row, job in enumerate(self.jobs):
            for sender in plan.targets[job[1]].parts:
                if path.place not in [place.place for place in sender.places]:
                    continue
                positions, width = plan.positions(sender, job[0]), part.shape[-1]
                values = [source.value(job[0], sender, path, order, p, width) for order, p in enumerate(positions)]
                current = part[self.still.start + row, positions]
                new = torch.stack([v for v in values if v is not None]).to(part)
                if path.sae is not None:
                    sae, site = features.sae_of(self.work.model, path), site_of(path)
                    own = plan.operation.apply(features.part(sae, site, current), new)
                    part[self.still.start + row, positions] = features.changed(sae, site, current, own)
                else:
                    part[self.still.start + row, positions] = plan.operation.apply(current, new)

    def _receive(self, receiver: Path, rows: Sequence[int], part: Tensor) -> None:
        if receiver.position is None:
            part[[self.free.start + row for row in rows]] = part[[self.still.start + row for row in rows]]
            return
        own = tokens_of(receiver, self.work.plan.corrupted)
        for row in rows:
            tokens = own[self.jobs[row][0]]
            part[self.free.start + row, tokens] = part[self.still.start + row, tokens]

    def _hold_still(self, branch: Branch, new: Tensor) -> None:
        # Not the branch that the sender is in: its output carries the sender's change.
        rows = [row for row, inside in enumerate(self.inside) if branch not in inside]
        if rows:
            new[[self.still.start + row for row in rows]] = new[[self.own[row] for row in rows]]


def _check(path: Path, branches: Branches, *, receives: bool) -> None:
    site = site_of(path)
    if site.kind in DERIVED and (receives or site.kind not in features.KINDS):
        raise RefusedPlace(
            f"a site of the kind {site.kind} is derived from several values of a run",
            path=path,
            expected="a site with a value of its own: queries, keys, values, heads, branches, the stream",
        )
    branches.of(path)
