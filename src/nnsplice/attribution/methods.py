"""The methods of `attribute`: a table of them, and how one scores the prompts of a plan."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nnsplice import closures, engine
from nnsplice.activations.access import site_of
from nnsplice.attribution import edges, nodes, relevance, routes, star
from nnsplice.attribution.gradients import Flow, Spent, batches, differentiable, halving
from nnsplice.attribution.nodes import Batch
from nnsplice.attribution.selecting import Choice
from nnsplice.errors import BadArgument, RefusedPlace, ShapeError
from nnsplice.packed.cost import Cost, Law
from nnsplice.progress import bar
from nnsplice.results import Run, SweepResult, Table
from nnsplice.sweeps.identity import labels_of
from nnsplice.sweeps.ledger import check_baselines
from nnsplice.sweeps.plan import Plan


def _plain(_model: engine.Model) -> AbstractContextManager[None]:
    """Gradients as they are."""
    return nullcontext()


@dataclass(frozen=True)
class Method:
    """How scores are made."""

    #: For cells: a batch -> its corrupted run and `[row, cell]`. None where edges are scored.
    nodes: Callable[[Batch], tuple[Flow, Tensor]] | None
    #: Whether gradients are taken along a way, of so many `steps`.
    stepwise: bool = False
    #: Whether edges are measured, and not estimated.
    measured: bool = False
    #: What gradients are taken in.
    rules: Callable[[engine.Model], AbstractContextManager[None]] = _plain
    #: For edges without gradients: the graph and a batch -> `[row, cell, receiver]`.
    edges: Callable[[edges.Graph, Batch], Tensor] | None = None


#: The methods by name; `auto` tries them in this order.
METHODS: dict[str, Method] = {
    "atp": Method(nodes.at_corrupted),
    "atp*": Method(star.with_both_fixes),
    "ig": Method(nodes.along_the_way, stepwise=True),
    "eap": Method(None),
    "eap-ig": Method(None, stepwise=True),
    "relp": Method(None, rules=relevance.rules),
    "ifr": Method(None, edges=routes.shares),
    "exact": Method(None, measured=True),
}
#: What one gradient tells little of: a patch of the stream replaces all that was computed before it, which takes the
#: model far from where the gradient was taken. Measured on a pretrained model in docs/real.md.
_STREAM = (
    'one gradient is a rough guess for the residual stream, in size and in order; method="ig", or verify= for numbers '
    "that are exact"
)
#: What a share is no estimate of.
_SHARES = (
    "scores are shares of what receivers read in the clean run, which order edges; verify= compares their order with "
    "that of the metric's changes"
)
#: Gradients on the way between two runs, where nobody says how many.
STEPS = 5


def steps_of(method: Method, steps: int | None) -> int:
    return (STEPS if steps is None else steps) if method.stepwise else 0


@dataclass(frozen=True)
class Scored:
    """What a method says of some prompts; zeros for the others."""

    #: `[prompt, cell]`, and of edges `[prompt, cell, receiver]`.
    scores: np.ndarray
    edges: np.ndarray | None
    clean: np.ndarray
    corrupted: np.ndarray
    spent: Spent


@dataclass(frozen=True)
class Estimator:
    """A method, and all that it needs."""

    model: engine.Model
    plan: Plan
    name: str
    method: Method
    graph: edges.Graph | None
    steps: int
    at_once: int
    progress: bool

    def __call__(self, prompts: Sequence[int]) -> tuple[np.ndarray, Cost]:
        """The scores of these prompts, of edges where there are some, and what they cost."""
        found = self.scored(prompts)
        return found.scores if found.edges is None else found.edges, found.spent.cost

    def scored(self, chosen: Sequence[int]) -> Scored:
        """Estimate the cells of these prompts."""
        model, plan, graph, method = self.model, self.plan, self.graph, self.method
        _check_kinds(plan, self.name)
        if plan.align == "role" and self.name != "atp":
            raise BadArgument(
                f'{self.name} takes points between two prompts, token by token, and align="role" pairs them otherwise',
                expected='method="atp"',
            )
        spent, prompts = Spent(Law.of(model)), len(plan.corrupted)
        scores = np.zeros((prompts, len(plan.targets)))
        made_of = None if graph is None else np.zeros((*scores.shape, len(graph.receivers)))
        clean, corrupted = np.zeros(prompts), np.zeros(prompts)
        (entry,) = engine.expand(model, "encoder.embed" if engine.is_encoder_decoder(model) else "embed")

        def work(rows: list[int]) -> None:
            wanted = nodes.wanted_of(plan, rows)
            paths = [one.place for one in wanted]
            if method.stepwise:
                _check_way(plan, rows, self.name)
                paths.append(entry)
            values, logits = nodes.clean_run(model, plan, rows, paths, spent)
            batch = Batch(model, plan, tuple(rows), wanted, values, logits, entry, self.steps, spent)
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
            for rows in batches(plan.corrupted, chosen, self.at_once):
                halving(rows, work)
        return Scored(scores, made_of, clean, corrupted, spent)

    def result(self, choice: Choice | None, start: float) -> SweepResult:
        """All prompts, as a result; what choosing the method has cost, and when it began, are part of its run."""
        plan, graph = self.plan, self.graph
        found = self.scored(range(len(plan.corrupted)))
        check_baselines(plan.metric, clean=found.clean, corrupted=found.corrupted)
        exists, scores = plan.exists(), found.scores
        if found.edges is not None and graph is not None:
            scores = found.edges.sum(-1)
            found.edges[~(exists[..., None] & graph.joined(plan).numpy()[None])] = np.nan
        spent, cost = found.spent, found.spent.cost
        passes = f"{_count(cost.forwards, 'forward')} and {_count(spent.backwards, 'backward')}"
        note = [f"estimated with {passes}", *dict.fromkeys(spent.notes), *_doubts(plan, self.name)]
        if choice is not None:
            cost, note = cost + choice.cost, [choice.note, *note]
        about = Run(
            self.name,
            time.perf_counter() - start,
            **cost.told(),
            known=len(plan.known),
            gate=closures.spent(self.model),
            note="; ".join(note),
        )
        cells = tuple(target.cell for target in plan.targets)
        return SweepResult(
            Table(
                cells, found.corrupted[:, None] + scores, exists, exists, found.clean, found.corrupted, plan.tokens,
                plan.asked, about, edges=found.edges, receivers=() if graph is None else graph.receivers,
                labels=labels_of(self.model, plan),
            )
        )  # fmt: skip


def _doubts(plan: Plan, name: str) -> list[str]:
    """What is known of estimates of such places, for the note."""
    stream = any(
        not path.native and path.steps[-1].name in ("layers", "embed") and path.value in ("input", "mid", "output")
        for path in nodes.places_of(plan)
    )
    return [_STREAM] if name == "atp" and stream else [_SHARES] if METHODS[name].edges is not None else []


def _count(number: int, what: str) -> str:
    return f"{number} {what} pass{'es' * (number != 1)}"


#: Kinds that no gradient is taken of, in words.
_DERIVED = {"pattern": "a pattern", "expert": "one expert", "ungated": "a slice before its gate"}


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


def _check_way(plan: Plan, rows: list[int], name: str) -> None:
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
