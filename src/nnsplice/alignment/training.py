"""The training of the sites of one layer: packed rows that start there, gradients through the later blocks only.

Base runs are recorded once for each batch and kept while they fit, for all sites and epochs; what stands before a site
is never run again. Every site has an optimizer of its own, so what it finds does not depend on what is trained beside
it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from nnsplice import packed
from nnsplice.alignment.measuring import blocks, memo_of, within
from nnsplice.alignment.pairs import PairRuns, seeded
from nnsplice.alignment.parametrisations import METHODS, TrainableSubspace
from nnsplice.atlas import unwrap
from nnsplice.errors import BadArgument
from nnsplice.metrics import Bound
from nnsplice.packed import BaseRuns, Cost, Edit, Row
from nnsplice.sweeps.packing import row_of, tokens_of

#: Bytes of recorded runs that are kept from epoch to epoch; beyond it they are recorded anew.
KEPT = 1 << 31
#: By which share a loss has to fall to count as better, and below which it is low enough.
BETTER, LOW_ENOUGH = 0.01, 1e-4


@dataclass(frozen=True)
class AlignmentOptions:
    """The options of training a part."""

    method: str
    k: int
    epochs: int
    batch_size: int
    learning_rate: float
    patience: int
    seed: int


@dataclass(frozen=True)
class Trained:
    """The outcome of training at one site."""

    #: `[k, width]`, not yet orthonormal to the last digit.
    basis: Tensor
    #: The mean loss of every epoch.
    losses: tuple[float, ...]


@dataclass
class Recordings:
    """The base runs of a model's training pairs, batch by batch, each recorded once while they fit."""

    side: PairRuns
    batches: tuple[tuple[int, ...], ...]
    bases: dict[int, BaseRuns] = field(default_factory=dict)
    held: int = 0
    passes: int = 0

    @classmethod
    def of(cls, side: PairRuns, pairs: Sequence[int], setting: AlignmentOptions, room: int) -> Recordings:
        """Batches of the pairs in their order, smaller ones where a batch does not fit."""
        size = setting.batch_size
        batches = [pairs[start : start + size] for start in range(0, len(pairs), size)]
        return cls(side, tuple(tuple(block) for batch in batches for block in blocks(side, batch, room)))

    def base(self, number: int) -> BaseRuns:
        """The runs of a batch."""
        if number in self.bases:
            return self.bases[number]
        work = self.side.work
        base = BaseRuns(work.model, self.side.plan.corrupted, memo=memo_of(self.side))
        recording, _ = packed.recorded(base, self.batches[number])
        self.passes += 1
        size = sum(t.numel() * t.element_size() for t in recording.entering)
        size += sum(t.numel() * t.element_size() for pair in recording.attended.values() for t in pair)
        if self.held + size <= KEPT:
            self.bases[number], self.held = base, self.held + size
        return base


@dataclass(frozen=True)
class _BatchRows:
    """The rows of a site and a batch, made once for all epochs."""

    rows: Sequence[Row]
    pairs: Sequence[int]
    tokens: int


@dataclass
class _SiteTraining:
    """A site in training."""

    part: TrainableSubspace
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    #: By the number of the batch; those without a pair that differs at the site have none.
    ready: Mapping[int, _BatchRows]
    losses: list[float] = field(default_factory=list)
    best: float = math.inf
    waited: int = 0

    def finished(self, patience: int) -> bool:
        """Note an epoch, and whether there was nothing to gain for some of them."""
        loss = self.losses[-1]
        if not math.isfinite(loss):
            raise BadArgument("the loss of the training became NaN", expected="a lower learning rate")
        better = loss < self.best - BETTER * abs(self.best) if math.isfinite(self.best) else True
        self.waited = 0 if better else self.waited + 1
        self.best = min(self.best, loss)
        return self.waited >= patience or loss < LOW_ENOUGH


def train(
    recordings: Recordings,
    targets: Sequence[int],
    loss_of: Bound,
    setting: AlignmentOptions,
    room: int,
    finished: Callable[[int], Any] = lambda epochs: None,
) -> tuple[dict[int, Trained], Cost]:
    """Train the sites of one layer.

    Args:
        loss_of: the log-probability of the counterfactual answer.
        finished: called with the number of epochs of a site that are done.
    """
    side, cost = recordings.side, Cost()
    steps = setting.epochs * len(recordings.batches)
    sites = {target: _site(recordings, target, setting, steps) for target in targets}
    active = dict(sites)
    with _frozen(unwrap(side.work.model)):
        for epoch in range(setting.epochs):
            sums = {target: [0.0, 0] for target in active}
            order = torch.randperm(len(recordings.batches), generator=seeded(setting.seed, "order", epoch)).tolist()
            for step, number in enumerate(order):
                done = (epoch * len(order) + step) / max(steps - 1, 1)
                cost += _step(recordings, number, active, loss_of, done, room, sums)
            for target, site in list(active.items()):
                site.losses.append(sums[target][0] / sums[target][1])
                finished(1)
                if site.finished(setting.patience):
                    finished(setting.epochs - epoch - 1)
                    del active[target]
            if not active:
                break
    return {t: Trained(site.part.basis().cpu().contiguous(), tuple(site.losses)) for t, site in sites.items()}, cost


def _site(recordings: Recordings, target: int, setting: AlignmentOptions, steps: int) -> _SiteTraining:
    side, method = recordings.side, METHODS[setting.method]
    path = side.plan.targets[target].cell.path
    like = next(p for p in unwrap(side.work.model).parameters() if p.is_floating_point())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(setting.seed)
        part = method.make(side.width(target), setting.k, seeded(setting.seed, side.name, path))
    part = part.to(like.device, torch.promote_types(like.dtype, torch.float32))
    optimizer = torch.optim.Adam(part.parameters(), lr=setting.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(1 - step / steps, 0.0))
    ready: dict[int, _BatchRows] = {}
    for number, batch in enumerate(recordings.batches):
        jobs = side.jobs(target, batch)
        if jobs:
            rows = [_held(row_of(side.work, job, part.change), side.width(target)) for job in jobs]
            ready[number] = _BatchRows(rows, [pair for pair, _ in jobs], sum(tokens_of(side.work, jobs)))
    if not ready:
        raise BadArgument(
            "both runs of every training pair are one at this site, so nothing can be trained there",
            path=path,
            expected="more pairs that differ there, or other held-out ones",
        )
    return _SiteTraining(part, optimizer, schedule, ready)


def _held(row: Row, width: int) -> Row:
    """The row with the values of its edits looked up."""
    edits: list[Edit] = []
    for edit in row.edits:
        values = edit.values(width)
        edits.append(replace(edit, values=lambda _width, values=values: values))
    return replace(row, edits=tuple(edits))


def _step(
    recordings: Recordings,
    number: int,
    active: Mapping[int, _SiteTraining],
    loss_of: Bound,
    progress: float,
    room: int,
    sums: dict[int, list[float]],
) -> Cost:
    """One step of every site with pairs in the batch; as many sites at once as fit."""
    cost, batch = Cost(), recordings.batches[number]
    stepping = {target: site for target, site in active.items() if number in site.ready}
    sizes_of = [site.ready[number].tokens for site in stepping.values()]
    for pack in within(stepping.items(), sizes_of, room):
        some = dict(pack)
        for site in some.values():
            site.optimizer.zero_grad(set_to_none=True)
            site.part.begin(progress)
        rows = [row for site in some.values() for row in site.ready[number].rows]
        pairs = [pair for site in some.values() for pair in site.ready[number].pairs]
        ran = packed.run(recordings.base(number), rows, prompts=batch, keep_graph=True)
        losses = -loss_of(ran.head.logits(ran.states(), keep_graph=True), pairs)
        total: Tensor = torch.zeros((), device=losses.device)
        sizes = [len(site.ready[number].rows) for site in some.values()]
        for (target, site), own in zip(some.items(), losses.split(sizes), strict=True):
            sums[target][0] += float(own.detach().sum())
            sums[target][1] += len(own)
            total = total + own.mean() + site.part.penalty()
        total.backward()
        cost += ran.cost
        for site in some.values():
            site.optimizer.step()
            site.schedule.step()
    return cost


@contextmanager
def _frozen(root: nn.Module) -> Iterator[None]:
    """The model's own parameters need no gradients meanwhile, so none are computed or stored for."""
    before = [(parameter, parameter.requires_grad) for parameter in root.parameters()]
    for parameter, _ in before:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in before:
            parameter.requires_grad_(flag)
