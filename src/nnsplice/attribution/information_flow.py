"""`ifr`: information flow routes, each sender's share of a receiver's input (Ferrando and Voita, 2024).

Of a receiver that reads the stream y at a token, to which a sender has added x, the proximity is
max(0, |y|_1 - |y - x|_1), and the sender's share its part of the proximities of all senders: `embed`, every head and
every MLP that ran before. An edge's score is the mean share over the receiver's tokens, so that those of all senders
into one receiver add up to 1. What biases of output projections add is part of y, and nobody's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nnsplice import engine
from nnsplice.activations.access import site_of
from nnsplice.atlas import Site, unwrap
from nnsplice.attribution.branches import Branch, branches_of, rounding_of
from nnsplice.attribution.edges import EdgeGraph, Receiver, norm_behind
from nnsplice.attribution.gradients import GradientRun, ValueKey, gradient_run, value_key
from nnsplice.attribution.nodes import AttributionBatch
from nnsplice.errors import RefusedPlace
from nnsplice.paths import Path
from nnsplice.sweeps.expansion import tokens_of


def shares(graph: EdgeGraph, batch: AttributionBatch) -> Tensor:
    """The scores of a batch's clean run: `[row, cell, receiver]`, zero where there is no edge."""
    model, plan = batch.model, batch.plan
    assert plan.clean is not None
    senders, branches = _senders(model), branches_of(model)
    cells = [target.places[0].place for target in plan.targets]
    numbers = _numbers(graph, senders)
    joined = graph.joined(plan)
    scores = torch.zeros(len(batch.rows), len(cells), len(graph.all), dtype=torch.float64)
    groups: dict[int, list[int]] = {}
    for row in batch.rows:
        groups.setdefault(plan.clean.lengths("decoder")[row], []).append(row)
    for length, rows in groups.items():
        paths = [*(path for sender in senders for path in sender.paths), *(one.reads for one in graph.all)]
        batch.spent.forward(plan.clean, rows)
        run = gradient_run(model, plan, rows, paths, clean=True, tied=False)
        with torch.no_grad():
            near = _proximities(model, senders, graph.all, run)
        at = [batch.rows.index(row) for row in rows]
        counted: dict[object, Tensor] = {}
        for number, receiver in enumerate(graph.all):
            at_end = receiver.branch is None and receiver.reads_at == branches.ends_at
            if (kind := (receiver.path.position, at_end)) not in counted:
                counted[kind] = _counted(batch, rows, length, receiver, at_end)
            proximity = near[value_key(site_of(receiver.reads))]
            found = torch.nan_to_num(proximity / proximity.sum(0))[[numbers[place] for place in cells]]
            found = torch.einsum("crt,crt->rc", found, counted[kind]) * joined[:, number]
            scores[at, :, number] = found
    return scores


def _counted(batch: AttributionBatch, rows: Sequence[int], length: int, receiver: Receiver, at_end: bool) -> Tensor:
    """`[cell, row, clean token]`: the weight of a cell's share at a token in the mean over a receiver's tokens.

    These are the tokens that the metric can depend on; of the logits it is the one that the metric reads.
    """
    plan = batch.plan
    found = torch.zeros(len(plan.targets), len(rows), length, dtype=torch.float64)
    every = tokens_of(receiver.path, plan.corrupted)
    for order, row in enumerate(rows):
        read = plan.metric.metric.position % plan.corrupted.lengths("decoder")[row]
        mine = {token for token in every[row] if token == read or (token < read and not at_end)}
        for cell, target in enumerate(plan.targets):
            if mine and plan.has(target, row):
                here, there = (plan.positions(target.parts[0], row, of_clean=clean) for clean in (False, True))
                tokens = [b for a, b in zip(here, there, strict=True) if a in mine]
                found[cell, order, tokens] = 1.0 / len(mine)
    return found


@dataclass(frozen=True)
class _StreamTerm:
    """A group of senders with one output: `embed`, an MLP, or all heads of an attention."""

    #: The sites that are read in a run: that of the output, and the senders'.
    paths: tuple[Path, ...]
    branch: Branch | None
    adds_at: int

    @property
    def sites(self) -> tuple[Site, ...]:
        """The site of each sender."""
        some = self.paths[:-1] if self.branch is not None and self.branch.name == "attn" else self.paths
        return tuple(map(site_of, some))


def _senders(model: engine.Model) -> list[_StreamTerm]:
    """All senders of a model, in the order in which they run.

    Raises:
        RefusedPlace: heads' own parts of what an attention adds are not told apart.
    """
    (embed,) = engine.expand(model, "embed")
    found = [_StreamTerm((embed,), None, 0)]
    for branch in branches_of(model).all:
        if branch.name == "mlp":
            found.append(_StreamTerm((branch.added,), branch, branch.adds_at))
            continue
        if norm_behind(branch) is not None:
            raise RefusedPlace(
                "ifr needs what each head adds to the stream, and a norm of all heads together stands before that",
                path=branch.added,
                write='method="eap-ig"',
            )
        heads = engine.expand(model, f"layers[{branch.block.index}].heads[:]")
        found.append(_StreamTerm((*heads, branch.added), branch, branch.adds_at))
    return found


def _numbers(graph: EdgeGraph, senders: Sequence[_StreamTerm]) -> dict[Path, int]:
    """The number of each requested site among all senders.

    Raises:
        RefusedPlace: a site is no sender.
    """
    every = {site: number for number, site in enumerate(site for one in senders for site in one.sites)}
    for place in graph.senders:
        if site_of(place) not in every:
            raise RefusedPlace(
                "ifr shares a stream among embed, heads and MLPs, and this site is none of them",
                path=place,
                expected="embed, layers[i].heads[j], layers[i].mlp",
            )
    return {place: every[site_of(place)] for place in graph.senders}


def _proximities(
    model: engine.Model, senders: Sequence[_StreamTerm], receivers: Sequence[Receiver], run: GradientRun
) -> dict[ValueKey, Tensor]:
    """For each stream that is read, `[sender, row, token]`; zero for senders that run later."""
    streams: dict[ValueKey, int] = {}
    for receiver in receivers:
        streams.setdefault(value_key(site_of(receiver.reads)), receiver.reads_at)
    widths = {key: run.values[key].double() for key in streams}
    near: dict[ValueKey, list[Tensor]] = {key: [] for key in streams}
    for sender in senders:
        for added in _added(model, sender, run):
            for key, reads_at in streams.items():
                stream = widths[key]
                if sender.adds_at > reads_at:
                    near[key].append(torch.zeros(stream.shape[:-1], dtype=torch.float64))
                    continue
                apart = stream.abs().sum(-1) - (stream - added.to(stream)).abs().sum(-1)
                near[key].append(apart.clamp_min(0.0).cpu())
    return {key: torch.stack(found) for key, found in near.items()}


def _added(model: engine.Model, sender: _StreamTerm, run: GradientRun) -> Iterator[Tensor]:
    """The senders' outputs to the stream: `[row, token, width]` each."""
    if sender.branch is None or sender.branch.name == "mlp":
        scale = 1.0 if sender.branch is None else sender.branch.block.scale
        yield run.values[value_key(site_of(sender.paths[0]))] * scale
        return
    block = sender.branch.block
    project = unwrap(model).get_submodule(str(block.o))
    z, whole = (run.values[value_key(site_of(path))] for path in (sender.paths[0], sender.paths[-1]))
    bias = project(torch.zeros_like(z[:1, :1]))
    rest = whole - bias
    for site in sender.sites:
        part = torch.zeros_like(z)
        columns = slice(*(site.columns or (0, None)))
        part[..., columns] = z[..., columns]
        added = project(part) - bias
        rest = rest - added
        yield added * block.scale
    if not float(rest.abs().max()) <= rounding_of(rest.dtype) * (1.0 + float(whole.abs().max())):
        raise RefusedPlace(f"more than {block.o} stands between the heads and the stream", path=sender.branch.added)
