"""`eap` and `eap-ig`: scores of edges by edge attribution patching.

A sender's change, as it is added to the stream, times the gradient of the metric at the stream *as one receiver reads
it*: through that receiver and whatever comes after, but not past it. Summed over all receivers that is the sender's own
gradient, so the scores of a site are made of the scores of its edges.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from nnsplice import engine
from nnsplice.activations.access import site_of
from nnsplice.atlas import DERIVED, host, unwrap
from nnsplice.attribution.branches import Branch, Branches, branches_of, rounding_of
from nnsplice.attribution.gradients import GradientRun, value_key
from nnsplice.attribution.nodes import AttributionBatch, FeatureDifferences, points, scaled_features
from nnsplice.errors import BadArgument, NnspliceError, RefusedPlace
from nnsplice.paths import Path, Paths, parse_path
from nnsplice.sweeps.expansion import tokens_of
from nnsplice.sweeps.plan import Plan

#: Receivers whose gradients are held at once.
TOGETHER = 64


@dataclass(frozen=True)
class Sender:
    """A site whose change goes to the stream: at once, or through the projection at the end of its branch."""

    place: Path
    branch: Branch | None
    #: When its change is there to be read.
    adds_at: int
    projection: str | None


@dataclass(frozen=True)
class Receiver:
    """A site that reads the stream, at some tokens."""

    path: Path
    branch: Branch | None
    reads: Path
    reads_at: int


@dataclass(frozen=True)
class EdgeGraph:
    """The senders, the receivers, and the edges between them."""

    senders: Mapping[Path, Sender]
    #: Those that at least one sender reaches.
    all: tuple[Receiver, ...]

    @staticmethod
    def of(model: engine.Model, plan: Plan, receivers: Paths | None) -> EdgeGraph:
        """For a plan whose sites are senders, each a site by itself."""
        if plan.corrupted.images is not None:
            raise BadArgument(
                "edges between the parts of a model are not estimated for prompts with images, which may enter its "
                "stream between the layers",
                expected='method="atp" for sites',
                write="ns.path_patch(model, clean, corrupted, senders, receivers, metric)   (exact)",
            )
        branches, known = branches_of(model), engine.map_of(model)
        places = dict.fromkeys(place for target in plan.targets for place in target.places)
        senders = {place: _sender(place, branches) for place in places}
        wanted = list(_everything(model, branches)) if receivers is None else engine.listed(receivers)
        if not wanted:
            raise BadArgument("no receivers, so there are no edges", expected="at least one path")
        found: dict[Path, Receiver] = {}
        for pattern in map(parse_path, wanted):
            for place in engine.expand(model, pattern.place):
                path = place.at(pattern.position)
                tokens_of(path, plan.corrupted)
                found.setdefault(path, _receiver(path, branches))
        first = min(sender.adds_at for sender in senders.values())
        reached = [one for path, one in sorted(found.items(), key=lambda pair: known.rank(pair[0]))
                   if one.reads_at >= first]  # fmt: skip
        if not reached:
            raise BadArgument(
                "no sender comes before a receiver, so there is no edge between them",
                expected="senders that run before the receivers",
            )
        return EdgeGraph(senders, tuple(reached))

    @cached_property
    def receivers(self) -> tuple[str, ...]:
        """The receivers' paths, in execution order."""
        return tuple(str(one.path) for one in self.all)

    def joined(self, plan: Plan) -> Tensor:
        """`[cell, receiver]`: whether there is an edge."""
        at = torch.tensor([max(self.senders[p].adds_at for p in target.places) for target in plan.targets])
        return at[:, None] <= torch.tensor([one.reads_at for one in self.all])[None]

    def scores(self, batch: AttributionBatch) -> tuple[GradientRun, Tensor]:
        """The corrupted run of a batch, and `[row, cell, receiver]`; zero where there is no edge."""
        reads = [path.place for one in self.all for path in ((one.reads, one.path) if one.branch else (one.reads,))]
        if not batch.steps:
            here = batch.run([*batch.paths, *self._ends(batch), *reads])
            return here, self._along(batch, here, [(1.0, here)])
        here = batch.run([*batch.paths, *self._ends(batch), batch.entry], tied=False)
        entry = value_key(site_of(batch.entry))
        way = points(batch, here.values[entry], batch.clean[entry])
        # If an SAE scales its inputs, a feature's output has the scale at this point.
        reads += scaled_features(batch)
        runs = ((weight, batch.run(reads, mixed=mixed)) for weight, mixed in way)
        return here, self._along(batch, here, runs)

    def _along(self, batch: AttributionBatch, here: GradientRun, runs: Iterable[tuple[float, GradientRun]]) -> Tensor:
        """The senders' changes along each receiver's gradient, in the mean over the runs."""
        scores = torch.zeros(len(batch.rows), len(batch.plan.targets), len(self.all), dtype=torch.float64)
        parts, scaled = FeatureDifferences(batch, here), scaled_features(batch)
        # `[row and token, sender, width]`, so that many receivers are one product of matrices.
        stacked = torch.stack(self._sent(batch, here, parts), -2).flatten(0, 1)
        for weight, one in runs:
            for number, wanted in enumerate(batch.wanted):
                if wanted.place in scaled and one is not here:
                    stacked[:, number] = self._sent_by_part(batch, here, parts, number, one).flatten(0, 1)
            gradients = enumerate(self._read(batch, one))
            while block := list(islice(gradients, TOGETHER)):
                read = torch.stack([gradient.to(stacked).flatten(0, 1) for _, gradient in block], -1)
                worth = (stacked @ read * weight).cpu().unflatten(0, (len(batch.rows), -1))
                numbers = [number for number, _ in block]
                at = slice(numbers[0], numbers[-1] + 1)
                for sender, wanted in enumerate(batch.wanted):
                    joined = [self.senders[wanted.place].adds_at <= self.all[number].reads_at for number in numbers]
                    found = worth[wanted.rows, wanted.tokens, sender] * torch.tensor(joined)
                    scores[..., at].index_put_((wanted.rows, wanted.cells), found, accumulate=True)
        return scores

    def _read(self, batch: AttributionBatch, one: GradientRun) -> Iterator[Tensor]:
        """The metric's gradient at the stream as each receiver reads it: `[row, token, width]`."""
        metric = batch.metric(one)
        value_keys = dict.fromkeys(value_key(site_of(r.path if r.branch else r.reads)) for r in self.all)
        gradients = batch.pulled(metric, one, value_keys, again=True)
        masks = _TokenMasks(batch)
        for receiver in self.all:
            stream, site = value_key(site_of(receiver.reads)), site_of(receiver.path)
            shape = one.values[stream].shape
            at = value_key(site) if receiver.branch else stream
            gradient = gradients[at]
            if gradient is None:  # nothing that the metric reads comes from there
                yield torch.zeros_like(one.values[stream])
                continue
            width = one.values[at].shape
            masked = torch.zeros_like(gradient).reshape(width)
            columns = slice(*(site.columns or (0, None))) if receiver.branch else slice(None)
            read = masks.of(receiver.path, gradient.device, width[1])
            masked[..., columns] = torch.where(read, gradient.reshape(width)[..., columns], 0)
            if receiver.branch:
                masked = masked.reshape(gradient.shape)
                (masked,) = torch.autograd.grad(
                    one.tensors[at], one.tensors[stream], masked, retain_graph=True, allow_unused=True
                )
            yield torch.zeros_like(one.values[stream]) if masked is None else masked.reshape(shape)

    # --- the senders' outputs

    def _ends(self, batch: AttributionBatch) -> list[Path]:
        """The outputs of the branches that senders are inside of, with which their projections are compared."""
        chosen = [self.senders[path] for path in batch.paths]
        return [one.branch.added for one in chosen if one.projection is not None and one.branch is not None]

    def _sent(self, batch: AttributionBatch, here: GradientRun, parts: FeatureDifferences) -> list[Tensor]:
        """The change of the stream by each sender's change: `[row, token, width]`."""
        sent: list[Tensor] = []
        ends: dict[str, BranchEnd] = {}
        for number, wanted in enumerate(batch.wanted):
            sender, site = self.senders[wanted.place], site_of(wanted.place)
            if wanted.place.sae is not None:
                sent.append(self._sent_by_part(batch, here, parts, number, here))
                continue
            values = here.values[value_key(site)]
            rows, tokens, clean_tokens = batch.tokens_on(values.device)[number]
            moved = torch.zeros_like(values)
            columns = slice(*(site.columns or (0, None)))
            there = batch.clean[value_key(site)][rows, clean_tokens, columns]
            moved[rows, tokens, columns] = there - values[rows, tokens, columns]
            if sender.projection is not None:
                if sender.projection not in ends:
                    ends[sender.projection] = BranchEnd.of(batch, sender, values, here)
                moved = ends[sender.projection].through(moved)
            sent.append(self._added(batch, sender, moved))
        return sent

    def _sent_by_part(
        self, batch: AttributionBatch, here: GradientRun, parts: FeatureDifferences, number: int, scaled_at: GradientRun
    ) -> Tensor:
        """The same for a feature or an error: a part of the branch's output, with no projection behind it."""
        wanted = batch.wanted[number]
        values = here.values[value_key(site_of(wanted.place))]
        rows, tokens, _ = batch.tokens_on(values.device)[number]
        moved = torch.zeros_like(values)
        moved[rows, tokens] = parts.of(wanted, scaled_at).to(moved)
        return self._added(batch, self.senders[wanted.place], moved)

    @staticmethod
    def _added(batch: AttributionBatch, sender: Sender, moved: Tensor) -> Tensor:
        if sender.branch is not None:
            moved = moved * sender.branch.block.scale  # in code, behind the last module of the branch
        return moved.double().to(batch.model.device)


class _TokenMasks:
    """The tokens of each row that a receiver reads, on its device; equal ones share a mask."""

    def __init__(self, batch: AttributionBatch) -> None:
        self.batch = batch
        self._made: dict[Any, Tensor] = {}

    def of(self, path: Path, device: torch.device, width: int) -> Tensor:
        """`[row, token, 1]`"""
        tokens = tokens_of(path, self.batch.plan.corrupted)
        key = (device, width, tuple(tuple(tokens[prompt]) for prompt in self.batch.rows))
        if key not in self._made:
            mask = torch.zeros(len(self.batch.rows), width, 1, dtype=torch.bool)
            for row, chosen in enumerate(key[2]):
                mask[row, list(chosen)] = True
            self._made[key] = mask.to(device, non_blocking=True)
        return self._made[key]


@dataclass(frozen=True)
class BranchEnd:
    """The end of a branch: its projection and, in some families, a norm."""

    project: nn.Module
    norm: nn.Module | None
    #: The projection's output in the corrupted run, and for an input of zeros: its bias.
    before: Tensor
    bias: Tensor

    @staticmethod
    def of(batch: AttributionBatch, sender: Sender, values: Tensor, here: GradientRun) -> BranchEnd:
        """The end of a sender's branch.

        Raises:
            RefusedPlace: there is more to it.
        """
        assert sender.projection is not None and sender.branch is not None
        root, norm = unwrap(batch.model), norm_behind(sender.branch)
        project = root.get_submodule(sender.projection)
        with torch.no_grad():
            found = BranchEnd(
                project, None if norm is None else root.get_submodule(norm), project(values),
                project(torch.zeros_like(values[:1, :1])),
            )  # fmt: skip
            ends = found.before if found.norm is None else found.norm(found.before)
        own = here.values[value_key(site_of(sender.branch.added))]
        allowed = rounding_of(own.dtype)
        if not torch.allclose(ends, own, rtol=allowed, atol=allowed * float(own.abs().max())):
            raise RefusedPlace(
                f"more than {sender.projection} stands between this site and the stream",
                path=sender.place,
                write=str(sender.branch.added),
            )
        return found

    def through(self, moved: Tensor) -> Tensor:
        """The change of the branch's output, from the change of its projection's input."""
        with torch.no_grad():
            change = self.project(moved) - self.bias
            return change if self.norm is None else self.norm(self.before + change) - self.norm(self.before)


def norm_behind(branch: Branch) -> str | None:
    """The norm that a branch goes through before it is added, where the family has one."""
    module, block = site_of(branch.added).module, branch.block
    inner = (block.attn, block.o) if branch.name == "attn" else (block.mlp, block.down)
    return None if module in inner else module


# --- senders and receivers --------------------------------------------------------------------------------------------


def _sender(place: Path, branches: Branches) -> Sender:
    if site_of(place).kind == "transcoded":
        raise RefusedPlace(
            "a feature of a transcoder is derived from several values of a run, so no edge starts there",
            path=place,
            write="ns.sweep(...)   (exact)",
        )
    # A feature, or an error, sends its change of the site that it is a part of.
    branch, site = branches.of(place), site_of(host(place))
    if branch is None:
        at = branches.stream_at(place)
        assert at is not None
        return Sender(place, None, at, None)
    if site == site_of(branch.added):
        return Sender(place, branch, branch.adds_at, None)
    last = branch.block.o if branch.name == "attn" else branch.block.down
    if (site.module, site.end) == (last, "input") and site.kind == "plain":
        return Sender(place, branch, branch.adds_at, last)
    raise RefusedPlace(
        "an edge starts where something is added to the stream, and this site adds nothing by itself",
        path=place,
        expected="heads, attn.output, mlp.output, neurons, embed.output, layers[i].output",
    )


def _receiver(path: Path, branches: Branches) -> Receiver:
    if site_of(path).kind in DERIVED:
        raise RefusedPlace("this site is derived from several values of a run, so no gradient reaches it", path=path)
    branch = branches.of(path)
    if branch is not None:
        return Receiver(path, branch, branch.reads, branch.reads_at)
    at = branches.stream_at(path)
    assert at is not None
    ends = at == branches.ends_at
    return Receiver(path, None, branches.end if ends else path.place, at)


def _everything(model: engine.Model, branches: Branches) -> Iterator[str]:
    """Every site where a branch reads the stream, once, and the logits."""
    for block in branches.tower.blocks:
        start = f"layers[{block.index}]"
        if block.reads_beside is not None:  # what these names leave out is a part of attention too
            yield from (f"{start}.attn", f"{start}.mlp")
            continue
        parts = [f"{start}.heads[:].q", f"{start}.groups[:].k", f"{start}.groups[:].v"]
        try:
            for part in parts:
                engine.expand(model, part)
        except NnspliceError:  # heads that cannot be told apart
            parts = [f"{start}.attn"]
        yield from parts
        yield f"{start}.mlp"
    yield "unembed"
