"""`attribute`: estimates for every cell of a sweep from a few gradients, checked where it is asked for."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nnsplice import engine
from nnsplice.activations.access import site_of
from nnsplice.activations.prompts import PairSpanTexts, PromptsLike
from nnsplice.attribution import edges, exact, nodes, relevance, star, verifying
from nnsplice.attribution.gradients import Flow, Spent, batches, differentiable, halving
from nnsplice.attribution.nodes import Batch
from nnsplice.errors import BadArgument, RefusedPlace, ShapeError, circumstances
from nnsplice.metrics import MetricLike, Several
from nnsplice.packed.cost import Law
from nnsplice.paths import Paths
from nnsplice.progress import bar
from nnsplice.results import Run, SweepResult, Table
from nnsplice.sweeps.identity import labels_of
from nnsplice.sweeps.ledger import check_baselines
from nnsplice.sweeps.plan import Plan
from nnsplice.sweeps.planning import plan_sweep
from nnsplice.sweeps.running import check_mode


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


METHODS: dict[str, Method] = {
    "atp": Method(nodes.at_corrupted),
    "atp*": Method(star.with_both_fixes),
    "ig": Method(nodes.along_the_way, stepwise=True),
    "eap": Method(None),
    "eap-ig": Method(None, stepwise=True),
    "relp": Method(None, rules=relevance.rules),
    "exact": Method(None, measured=True),
}
#: What one gradient tells little of: a patch of the stream replaces all that was computed before it, which takes the
#: model far from where the gradient was taken. Measured on a pretrained model in docs/real.md.
_STREAM = (
    'one gradient is a rough guess for the residual stream, in size and in order; method="ig", or verify= for numbers '
    "that are exact"
)
#: Gradients on the way between two runs, where nobody says how many.
STEPS = 5


def attribute(
    model: Any,
    clean: PromptsLike | None,
    corrupted: PromptsLike | None,
    sites: Paths,
    metric: MetricLike,
    *,
    method: str = "atp",
    receivers: Paths | None = None,
    steps: int | None = None,
    verify: int = 0,
    spans: PairSpanTexts | None = None,
    align: str = "position",
    seed: int = 0,
    executor: str = "auto",
    max_tokens: int | None = None,
    journal: str | PathLike[str] | None = None,
    progress: bool = True,
) -> SweepResult:
    """Estimate what `ns.sweep` would measure, for all sites at once, from a few gradients.

    The result is a sweep's, on the same grid, and says of itself that it is an estimate (`result.method`): the value of
    a cell is the corrupted run's metric and the score on top.

    >>> metric = ns.logit_diff("w7", "w8")
    >>> result = ns.attribute(model, "w3 w4 w5", "w3 w6 w5", "layers[:].heads[:]", metric, verify=3, progress=False)
    >>> result.method, result.grid().dims
    ('atp', ('prompt', 'layer', 'head', 'position'))
    >>> result.verification.k
    3

    The methods:

    * `"atp"`: (clean - corrupted) times the gradient in the corrupted run. Two forward passes, one backward. Good for
      heads and MLPs; a rough guess for the residual stream, which the result's note says.
    * `"atp*"`: the same, but probabilities that a patched query or key would make are computed, and sizes are the mean
      over runs in which one layer passes no gradient back, so that effects do not cancel. One backward for each layer.
    * `"ig"`: the mean gradient at `steps` points between the two runs' embeddings, instead of the one in the corrupted.
    * `"eap"`, `"eap-ig"`: scores of edges, from sites to the `receivers`, as `result.edges()`; a cell is the sum of its
      edges. Here a site without positions is all its tokens at once, as in `ns.path_patch`, which is the exact answer.
    * `"relp"`: as `"eap"`, with gradients by rules of relevance propagation: norms' scales and attention patterns
      stand still, activations have the slope act(x) / x, the factors of a gate share theirs. Queries and keys get none.
    * `"exact"`: no estimate. Each edge by `ns.path_patch`: as many runs as there are edges.

    Args:
        receivers: for edges, where they end; if left out, at every query, key and value head, MLP and the logits.
        steps: how many gradients `"ig"` and `"eap-ig"` take on the way; 5 if left out.
        verify: compute so many of the largest exactly, and as many of the others drawn at random:
            `result.verification` says how well the estimates did, and `frame()` has the exact values beside them.
        spans: where named spans stand, as for `ns.sweep`.
        align: `"position"` or `"end"`, as for `ns.sweep`; `"role"` with `"atp"`.
        seed: of the draw of others.
        executor: of the sweep that verifies.
        max_tokens: how many tokens run at once.
        journal: a file that what is verified is appended to, as for `ns.run`.
        progress: show a bar.
    """
    model = engine.as_model(model)
    chosen = _method(method, receivers, steps, verify)
    with circumstances("ns.attribute"):
        together = chosen.nodes is None
        plan = plan_sweep(
            model, clean, corrupted, sites, metric, spans=spans, align=align, seed=seed, together=together
        )
        if isinstance(plan.metric, Several) or plan.owners:
            raise BadArgument(
                f"attribute takes the gradient of one metric at one position, and this is {plan.metric.metric.name}",
                expected="one metric of single tokens, such as ns.logit_diff",
            )
        if align == "role" and method != "atp":
            raise BadArgument(
                f'{method} takes points between two prompts, token by token, and align="role" pairs them otherwise',
                expected='method="atp"',
            )
        check_mode(model)
        steps = (STEPS if steps is None else steps) if chosen.stepwise else 0
        graph = edges.Graph.of(model, plan, receivers) if together else None
        plan = replace(plan, asked=_asked(plan, method, steps, graph))
        if chosen.measured:
            assert graph is not None
            return exact.measured(model, plan, graph, max_tokens=max_tokens, journal=journal, progress=progress)
        estimated = _estimated(model, plan, method, chosen, graph, steps, engine.room(model, max_tokens), progress)
    if not verify:
        return estimated
    return verifying.verified(
        model, plan, estimated, verify, executor=executor, max_tokens=max_tokens, journal=journal, progress=progress
    )


def asked_of(model: Any, plan: Plan, method: str, receivers: Paths | None, steps: int | None) -> dict[str, Any]:
    """What the estimates of a plan are asked for: their identity, but for what is verified."""
    chosen = _method(method, receivers, steps, 0)
    graph = edges.Graph.of(engine.as_model(model), plan, receivers) if chosen.nodes is None else None
    return _asked(plan, method, (STEPS if steps is None else steps) if chosen.stepwise else 0, graph)


def _asked(plan: Plan, method: str, steps: int, graph: edges.Graph | None) -> dict[str, Any]:
    told: dict[str, Any] = {"method": method, **({"steps": steps} if steps else {})}
    return {**plan.asked, **told, **({} if graph is None else {"receivers": list(graph.receivers)})}


def _method(name: str, receivers: Any, steps: int | None, verify: int) -> Method:
    if name not in METHODS:
        raise BadArgument(f"there is no method {name!r}", expected=", ".join(METHODS))
    chosen = METHODS[name]
    if receivers is not None and chosen.nodes is not None:
        raise BadArgument(f"{name} scores places, so receivers would do nothing", expected='method="eap" or "eap-ig"')
    if chosen.measured and verify:
        raise BadArgument(f"{name} is measured, so verify={verify} would do nothing", expected="no verify")
    if steps is not None and not chosen.stepwise:
        raise BadArgument(f"{name} takes no steps, so steps={steps} would do nothing", expected="ig or eap-ig")
    if steps is not None and (isinstance(steps, bool) or steps < 1):
        raise BadArgument(f"steps={steps}", expected="at least 1")
    if isinstance(verify, bool) or not isinstance(verify, int) or verify < 0:
        raise BadArgument(f"verify={verify!r}", expected="how many of the largest to compute exactly, or 0")
    return chosen


def _estimated(
    model: engine.Model,
    plan: Plan,
    name: str,
    method: Method,
    graph: edges.Graph | None,
    steps: int,
    at_once: int,
    progress: bool,
) -> SweepResult:
    start, spent = time.perf_counter(), Spent(Law.of(model))
    _check_kinds(plan, name)
    prompts = len(plan.corrupted)
    scores = np.zeros((prompts, len(plan.targets)))
    made_of = None if graph is None else np.zeros((*scores.shape, len(graph.receivers)))
    clean, corrupted = np.zeros(prompts), np.zeros(prompts)
    (entry,) = engine.expand(model, "encoder.embed" if engine.is_encoder_decoder(model) else "embed")

    def work(rows: list[int]) -> None:
        wanted = nodes.wanted_of(plan, rows)
        paths = [one.place for one in wanted]
        if method.stepwise:
            _check_way(plan, rows, name)
            paths.append(entry)
        values, logits = nodes.clean_run(model, plan, rows, paths, spent)
        batch = Batch(model, plan, tuple(rows), wanted, values, logits, entry, steps, spent)
        if not wanted:  # no cell of these prompts can differ
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

    with differentiable(model), method.rules(model), bar("attribution", prompts, "prompt", progress) as shown:
        for rows in batches(plan.corrupted, range(prompts), at_once):
            halving(rows, work)
    check_baselines(plan.metric, clean=clean, corrupted=corrupted)
    exists = plan.exists()
    if made_of is not None and graph is not None:
        scores = made_of.sum(-1)
        made_of[~(exists[..., None] & graph.joined(plan).numpy()[None])] = np.nan
    passes = f"{_count(spent.cost.forwards, 'forward')} and {_count(spent.backwards, 'backward')}"
    about = Run(
        name, time.perf_counter() - start, **spent.cost.told(), known=len(plan.known),
        note="; ".join([f"estimated with {passes}", *dict.fromkeys(spent.notes), *_doubts(plan, name)]),
    )  # fmt: skip
    cells = tuple(target.cell for target in plan.targets)
    table = Table(
        cells, corrupted[:, None] + scores, exists, exists, clean, corrupted, plan.tokens, plan.asked, about,
        edges=made_of, receivers=() if graph is None else graph.receivers, labels=labels_of(model, plan),
    )  # fmt: skip
    return SweepResult(table)


def _doubts(plan: Plan, name: str) -> list[str]:
    """What is known of estimates of such places, for the note."""
    stream = any(
        not path.native and path.steps[-1].name in ("layers", "embed") and path.value in ("input", "mid", "output")
        for path in nodes.places_of(plan)
    )
    return [_STREAM] if name == "atp" and stream else []


def _count(number: int, what: str) -> str:
    return f"{number} {what} pass{'es' * (number != 1)}"


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
        if kind in ("pattern", "expert"):
            raise RefusedPlace(
                f"{'a pattern' if kind == 'pattern' else 'one expert'} is derived from several values of a run, so "
                f"{name} has no gradient of it",
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
