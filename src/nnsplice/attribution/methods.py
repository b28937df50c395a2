"""The methods of `attribute`: a table of them, and how one scores the prompts of a plan."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from nnsplice import closures, engine
from nnsplice.activations.access import site_of
from nnsplice.attribution import atp_star, edges, information_flow, nodes, relevance
from nnsplice.attribution.gradients import GradientCost, GradientRun, batches, differentiable, halving
from nnsplice.attribution.nodes import AttributionBatch, InterpolatedInput, value_key
from nnsplice.attribution.selecting import MethodChoice
from nnsplice.errors import BadArgument, RefusedPlace, ShapeError
from nnsplice.packed.cost import Cost, CostModel
from nnsplice.progress import bar
from nnsplice.results import Run, SweepResult, Table
from nnsplice.sweeps.collecting import check_baselines
from nnsplice.sweeps.identity import labels_of
from nnsplice.sweeps.plan import Plan
from nnsplice.sweeps.rounding import TOLERANCE


def _plain(_model: engine.Model) -> AbstractContextManager[None]:
    """Gradients as they are."""
    return nullcontext()


@dataclass(frozen=True)
class AttributionMethod:
    """A method of attribution."""

    #: For cells: a batch -> its corrupted run and `[row, cell]`. None where edges are scored.
    nodes: Callable[[AttributionBatch], tuple[GradientRun, Tensor]] | None
    #: Whether gradients are taken along a path of `steps` points.
    stepwise: bool = False
    #: Whether edges are measured, and not estimated.
    measured: bool = False
    #: What gradients are taken in.
    rules: Callable[[engine.Model], AbstractContextManager[None]] = _plain
    #: For edges without gradients: the graph and a batch -> `[row, cell, receiver]`.
    edges: Callable[[edges.EdgeGraph, AttributionBatch], Tensor] | None = None


#: The methods by name; `auto` tries them in this order.
METHODS: dict[str, AttributionMethod] = {
    "atp": AttributionMethod(nodes.at_corrupted),
    "atp*": AttributionMethod(atp_star.with_both_fixes),
    "ig": AttributionMethod(nodes.along_the_way, stepwise=True),
    "eap": AttributionMethod(None),
    "eap-ig": AttributionMethod(None, stepwise=True),
    "relp": AttributionMethod(None, rules=relevance.rules),
    "ifr": AttributionMethod(None, edges=information_flow.shares),
    "exact": AttributionMethod(None, measured=True),
}
#: The note about one gradient at the stream: a patch there replaces all that was computed before it, which takes the
#: model far from where the gradient was taken. Measured on a pretrained model in docs/real.md.
_STREAM = (
    'one gradient is a rough guess for the residual stream, in size and in order; method="ig", or verify= for numbers '
    "that are exact"
)
#: The note about scores that are shares.
_SHARES = (
    "scores are shares of what receivers read in the clean run, which order edges; verify= compares their order with "
    "that of the metric's changes"
)
#: The default number of gradients on the path between two runs.
STEPS = 5


def steps_of(method: AttributionMethod, steps: int | None) -> int:
    return (STEPS if steps is None else steps) if method.stepwise else 0


@dataclass(frozen=True)
class Scored:
    """The estimates of some prompts; zeros for the others."""

    #: `[prompt, cell]`, and of edges `[prompt, cell, receiver]`.
    scores: np.ndarray
    edges: np.ndarray | None
    clean: np.ndarray
    corrupted: np.ndarray
    spent: GradientCost


@dataclass(frozen=True)
class Estimator:
    """A method, and all that it needs."""

    model: engine.Model
    plan: Plan
    name: str
    method: AttributionMethod
    graph: edges.EdgeGraph | None
    steps: int
    at_once: int
    progress: bool

    def __call__(self, prompts: Sequence[int]) -> tuple[np.ndarray, Cost]:
        """The scores of these prompts, of edges if there are some, and their cost."""
        found = self.scored(prompts)
        return found.scores if found.edges is None else found.edges, found.spent.cost

    def check(self) -> None:
        """Raise for a plan that the method cannot score, of all its prompts, before anything runs.

        Raises:
            BadArgument: it pairs tokens otherwise, or two towers differ.
            RefusedPlace: a site without a gradient.
            ShapeError: a pair of prompts of different lengths.
        """
        self._check()
        if self.method.stepwise:
            _check_way(self.plan, range(len(self.plan.corrupted)), self.name)

    def _check(self) -> None:
        _check_kinds(self.plan, self.name)
        if self.plan.align == "role" and self.name != "atp":
            raise BadArgument(
                f'{self.name} takes points between two prompts, token by token, and align="role" pairs them otherwise',
                expected='method="atp"',
            )

    def scored(self, chosen: Sequence[int]) -> Scored:
        """Estimate the cells of these prompts."""
        model, plan, graph, method = self.model, self.plan, self.graph, self.method
        self._check()
        spent, prompts = GradientCost(CostModel.of(model)), len(plan.corrupted)
        scores = np.zeros((prompts, len(plan.targets)))
        made_of = None if graph is None else np.zeros((*scores.shape, len(graph.receivers)))
        clean, corrupted = np.zeros(prompts), np.zeros(prompts)
        (entry,) = engine.expand(model, "encoder.embed" if engine.is_encoder_decoder(model) else "embed")

        def work(rows: list[int]) -> None:
            wanted = nodes.entries_of(plan, rows)
            paths = [one.place for one in wanted]
            if method.stepwise:
                _check_way(plan, rows, self.name)
                paths.append(entry)
            values, logits = nodes.clean_run(model, plan, rows, paths, spent)
            batch = AttributionBatch(model, plan, tuple(rows), wanted, values, logits, entry, self.steps, spent)
            if method.stepwise and plan.corrupted.images is not None:
                _check_end(batch, logits, self.name)
            if method.edges is not None:
                assert graph is not None
                one, found = batch.run([], tied=False), method.edges(graph, batch)
            elif not wanted:  # no cell of these prompts can differ
                one, found = batch.run([], tied=False), None
            elif graph is not None:
                one, found = graph.scores(batch)
            else:
                assert method.nodes is not None
                one, found = method.nodes(batch)
            with torch.no_grad():
                plan.metric.check_answers(logits, rows)
                clean[rows] = plan.metric(logits, rows, logits).double().cpu().numpy()
                corrupted[rows] = plan.metric(one.logits, rows, logits).double().cpu().numpy()
            if found is not None:
                (scores if made_of is None else made_of)[rows] = found.cpu().numpy()
            shown.update(len(rows))

        with (
            differentiable(model),
            method.rules(model),
            bar("attribution", len(chosen), "prompt", self.progress) as shown,
        ):
            for rows in batches(model, plan.corrupted, chosen, self.at_once):
                halving(rows, work)
        return Scored(scores, made_of, clean, corrupted, spent)

    def whole(self) -> Scored:
        """All prompts, with NaN where there is no edge."""
        plan, graph = self.plan, self.graph
        found = self.scored(range(len(plan.corrupted)))
        check_baselines(plan.metric, clean=found.clean, corrupted=found.corrupted)
        if found.edges is None or graph is None:
            return found
        scores = found.edges.sum(-1)
        found.edges[~(plan.exists()[..., None] & graph.joined(plan).numpy()[None])] = np.nan
        return replace(found, scores=scores)

    def result(self, choice: MethodChoice | None, start: float) -> SweepResult:
        """All prompts, as a result; what choosing the method has cost, and when it began, are part of its run."""
        plan, graph = self.plan, self.graph
        found, exists = self.whole(), plan.exists()
        spent, cost = found.spent, found.spent.cost
        note = notes(cost.forwards, spent.backwards, spent.notes, doubts(plan, self.name))
        if choice is not None:
            cost, note = cost + choice.cost, f"{choice.note}; {note}"
        about = Run(
            self.name,
            time.perf_counter() - start,
            **cost.as_dict(),
            known=len(plan.known),
            gate=closures.passes_spent(self.model),
            note=note,
        )
        cells = tuple(target.cell for target in plan.targets)
        return SweepResult(
            Table(
                cells, found.corrupted[:, None] + found.scores, exists, exists, found.clean, found.corrupted,
                plan.tokens, plan.asked, about, edges=found.edges, receivers=() if graph is None else graph.receivers,
                labels=labels_of(self.model, plan),
            )
        )  # fmt: skip


def notes(forwards: int, backwards: int, noted: Sequence[str], doubts: Sequence[str]) -> str:
    """The note of a result about its estimates."""
    passes = f"{_count(forwards, 'forward')} and {_count(backwards, 'backward')}"
    return "; ".join([f"estimated with {passes}", *dict.fromkeys(noted), *doubts])


def doubts(plan: Plan, name: str) -> list[str]:
    """Known weaknesses of estimates at such sites, for the note."""
    stream = any(
        not path.native and path.steps[-1].name in ("layers", "embed") and path.value in ("input", "mid", "output")
        for path in nodes.places_of(plan)
    )
    return [_STREAM] if name == "atp" and stream else [_SHARES] if METHODS[name].edges is not None else []


def _count(number: int, what: str) -> str:
    return f"{number} {what} pass{'es' * (number != 1)}"


#: Kinds that no gradient is taken of, in words.
_DERIVED = {
    "pattern": "a pattern",
    "expert": "one expert",
    "ungated": "a slice before its gate",
    "transcoded": "a feature of a transcoder",
}


def _check_kinds(plan: Plan, name: str) -> None:
    joint = next((target for target in plan.targets if target.is_set), None)
    if joint is not None:
        raise BadArgument(
            f"{name} says what each site is worth by itself, and what a set does together is not the sum of these",
            path=joint.cell.path,
            expected="single sites",
            write="ns.sweep(...)   (exact)",
        )
    for path in nodes.places_of(plan):
        kind = site_of(path).kind
        if kind in _DERIVED:
            raise RefusedPlace(
                f"{_DERIVED[kind]} is derived from several values of a run, so {name} has no gradient of it",
                path=path,
                write="ns.sweep(...)   (exact)",
            )


def _check_end(batch: AttributionBatch, clean: Tensor, name: str) -> None:
    """Raise where the clean prompt's embeddings do not make its run, as parts of images enter elsewhere too."""
    end = batch.run(
        [], mixed=InterpolatedInput(batch.entry, batch.clean[value_key(site_of(batch.entry))]), tied=False
    ).logits
    if bool((end - clean).abs().max() > TOLERANCE.get(clean.dtype, 2e-1) * clean.abs().max()):
        raise BadArgument(
            f"{name} goes from the embeddings of one prompt to those of the other, and the images of these enter the "
            "model beside their embeddings too",
            expected='method="atp"',
        )


def _check_way(plan: Plan, rows: Sequence[int], name: str) -> None:
    assert plan.clean is not None
    if plan.clean.decoder_ids != plan.corrupted.decoder_ids:
        raise BadArgument(
            f"{name} goes from the embeddings of one prompt to those of the other, and here both towers differ",
            expected='one decoder prompt, or method="atp"',
        )
    for row in rows:
        here, there = plan.corrupted.lengths("encoder")[row], plan.clean.lengths("encoder")[row]
        if here != there:
            raise ShapeError(
                f"pair {row}: {name} goes from the embeddings of one prompt to those of the other, and they have "
                f"{here} and {there} tokens",
                expected='prompts of one length in a pair, or method="atp"',
            )
