"""`attribute`: estimates for every cell of a sweep from a few gradients, with optional verification."""

from __future__ import annotations

import time
from dataclasses import replace
from os import PathLike
from typing import Any

from nnsplice import engine
from nnsplice.activations.prompts import PairSpanTexts, PromptsLike
from nnsplice.attribution import edges, exact, selecting, verifying
from nnsplice.attribution.methods import METHODS, AttributionMethod, Estimator, steps_of
from nnsplice.attribution.selecting import AUTO, MethodChoice
from nnsplice.errors import BadArgument, circumstances
from nnsplice.metrics import MetricLike, Several
from nnsplice.paths import Paths
from nnsplice.results import SweepResult
from nnsplice.sweeps.plan import Plan
from nnsplice.sweeps.planning import plan_sweep
from nnsplice.sweeps.running import check_mode

#: How `auto` chooses; part of a result's identity.
_AUTO_ASKED: dict[str, Any] = {"auto": {"prompts": selecting.PROMPTS, "cells": selecting.CELLS}}


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
    """Attribution patching: estimate the effects of `ns.sweep` for all sites at once, from gradients.

    The result has the grid of a sweep, with the corrupted metric plus the estimated effect in each cell;
    `result.method` is the method.

    >>> metric = ns.logit_diff("w7", "w8")
    >>> result = ns.attribute(model, "w3 w4 w5", "w3 w6 w5", "layers[:].heads[:]", metric, verify=3, progress=False)
    >>> result.method, result.grid().dims
    ('atp', ('prompt', 'layer', 'head', 'position'))
    >>> result.verification.k
    3

    The methods:

    * `"atp"`: (clean - corrupted) times the gradient in the corrupted run. Two forward passes, one backward. Good for
      heads and MLPs; a rough guess for the residual stream, which the result's note says.
    * `"atp*"`: AtP with both of its fixes: attention probabilities are recomputed for patched queries and keys, and
      sizes are averaged over runs in which one layer passes no gradient back. One backward pass for each layer.
    * `"ig"`: integrated gradients: the mean gradient at `steps` points between the embeddings of the two runs. Of
      a feature of an SAE that scales its inputs, each gradient has the scale of its point.
    * `"eap"`, `"eap-ig"`: edge attribution patching: scores of edges from sites to `receivers`, as `result.edges()`; a
      cell is the sum of its edges. A site without a position is all its tokens at once. `ns.path_patch` is exact.
    * `"relp"`: `"eap"` with the gradient rules of layer-wise relevance propagation: the scales of norms and attention
      patterns are constants, an activation has the slope act(x) / x, and a gate's two factors share the gradient.
      Queries and keys get none.
    * `"ifr"`: edges without gradients: which share of what a receiver reads in the clean run comes from the sender, as
      the mean over its tokens. Shares know neither the metric nor the corrupted run, and are never below 0: they order
      edges, and are no change of the metric, also where the model is a straight line. The logits count where the metric
      reads.
    * `"auto"`: the one of these that is best here. Some cells of some prompts (with `receivers`, some edges) are
      computed exactly, each method that fits estimates them too, and the one with the most recall for a pass of the
      model is taken. `run.note` has the table, `result.method` the one that was taken.
    * `"exact"`: no estimate: each edge is measured with `ns.path_patch`, one run for each edge.

    Args:
        model: a model from `ns.load`, in eval mode.
        clean: the prompts that values are taken from. Prompt i is paired with prompt i of `corrupted`.
        corrupted: the prompts of the run that effects are estimated for.
        sites: a path or several; for methods of nodes, each token is a cell where a path has no position.
        metric: one metric of single tokens, such as `ns.logit_diff(answer, wrong)`, or a function of the logits.
        method: one of the methods above.
        receivers: paths where edges end; if left out, the query, key and value of every head, every MLP, and the
            logits.
        steps: the number of gradients on the path for `"ig"` and `"eap-ig"`; 5 if left out.
        verify: how many of the largest estimates to compute exactly, and as many others drawn at random;
            `result.verification` compares them, and `frame()` has the exact values.
        spans: token spans by name, as for `ns.sweep`.
        align: `"position"` or `"end"`, as for `ns.sweep`; `"role"` with `"atp"`.
        seed: the seed of the random cells that `verify` draws.
        executor: the executor of the sweep that verifies.
        max_tokens: the number of tokens that run at once; chosen for the device if left out.
        journal: a file that verified cells are appended to, as for `ns.run`.
        progress: show a progress bar.

    Returns:
        The estimates on the grid of a sweep; `result.edges()` for methods of edges.

    Raises:
        BadArgument: a method that does not exist, an option that the method does not have, several metrics, or a model
            in train mode.
        ShapeError: prompts of different lengths, for a method that interpolates between their embeddings.
        RefusedPlace: a site without a gradient, such as a pattern or one expert.
    """
    start = time.perf_counter()
    model = engine.as_model(model)
    check_numbers(steps, verify)
    chosen = None if method == AUTO else method_named(method, receivers, steps, verify)
    with circumstances("ns.attribute"):
        together = receivers is not None if chosen is None else chosen.nodes is None
        plan = planned(model, clean, corrupted, sites, metric, spans=spans, align=align, seed=seed, together=together)
        graph = edges.EdgeGraph.of(model, plan, receivers) if together else None
        at_once = engine.tokens_at_once(model, max_tokens)
        choice: MethodChoice | None = None
        if chosen is None:
            each = {
                name: Estimator(model, plan, name, one, graph, steps_of(one, steps), at_once, progress=False)
                for name, one in METHODS.items()
                if (one.nodes is None) == together and not one.measured
            }
            choice = selecting.choose(
                model, plan, graph, each, executor=executor, max_tokens=max_tokens, progress=progress
            )
            method, chosen = choice.taken, METHODS[choice.taken]
        asked = estimate_identity(plan, method, steps_of(chosen, steps), graph)
        plan = replace(plan, asked=asked if choice is None else {**asked, **_AUTO_ASKED})
        if chosen.measured:
            assert graph is not None
            return exact.measured(model, plan, graph, max_tokens=max_tokens, journal=journal, progress=progress)
        work = Estimator(model, plan, method, chosen, graph, steps_of(chosen, steps), at_once, progress)
        estimated = work.result(choice, start)
    if not verify:
        return estimated
    return verifying.verified(
        model, plan, estimated, verify, executor=executor, max_tokens=max_tokens, journal=journal, progress=progress
    )


def asked_of(model: Any, plan: Plan, method: str, receivers: Paths | None, steps: int | None) -> dict[str, Any]:
    """The identity of the estimates of a plan, without the verified cells and the choice of `auto`."""
    check_numbers(steps, 0)
    if method == AUTO:
        graph = None if receivers is None else edges.EdgeGraph.of(engine.as_model(model), plan, receivers)
        return {**plan.asked, **_AUTO_ASKED, **({} if graph is None else {"receivers": list(graph.receivers)})}
    chosen = method_named(method, receivers, steps, 0)
    graph = edges.EdgeGraph.of(engine.as_model(model), plan, receivers) if chosen.nodes is None else None
    return estimate_identity(plan, method, steps_of(chosen, steps), graph)


def planned(
    model: engine.Model,
    clean: PromptsLike | None,
    corrupted: PromptsLike | None,
    sites: Paths,
    metric: MetricLike,
    *,
    spans: PairSpanTexts | None,
    align: str,
    seed: int,
    together: bool,
) -> Plan:
    """The plan of a sweep whose cells are estimated.

    Raises:
        BadArgument: several metrics, one of several tokens, or a model in train mode.
    """
    plan = plan_sweep(model, clean, corrupted, sites, metric, spans=spans, align=align, seed=seed, together=together)
    if isinstance(plan.metric, Several) or plan.owners:
        raise BadArgument(
            f"attribute takes the gradient of one metric at one position, and this is {plan.metric.metric.name}",
            expected="one metric of single tokens, such as ns.logit_diff",
        )
    check_mode(model)
    return plan


def estimate_identity(plan: Plan, method: str, steps: int, graph: edges.EdgeGraph | None) -> dict[str, Any]:
    """The identity of an estimate: that of the plan, the method and its options."""
    receivers = {} if graph is None else {"receivers": list(graph.receivers)}
    return {**plan.asked, "method": method, **({"steps": steps} if steps else {}), **receivers}


def method_named(name: str, receivers: Any, steps: int | None, verify: int) -> AttributionMethod:
    """A method by its name, which has to take these options.

    Raises:
        BadArgument: there is no such method, or it does not take these options.
    """
    if name not in METHODS:
        raise BadArgument(f"there is no method {name!r}", expected=", ".join((*METHODS, AUTO)))
    chosen = METHODS[name]
    if receivers is not None and chosen.nodes is not None:
        raise BadArgument(f"{name} scores sites, so receivers would do nothing", expected='method="eap" or "eap-ig"')
    if chosen.measured and verify:
        raise BadArgument(f"{name} is measured, so verify={verify} would do nothing", expected="no verify")
    if steps is not None and not chosen.stepwise:
        raise BadArgument(f"{name} takes no steps, so steps={steps} would do nothing", expected="ig or eap-ig")
    return chosen


def check_numbers(steps: int | None, verify: int) -> None:
    """Raise for numbers of steps and of verified cells that are none."""
    if steps is not None and (isinstance(steps, bool) or steps < 1):
        raise BadArgument(f"steps={steps}", expected="at least 1")
    if isinstance(verify, bool) or not isinstance(verify, int) or verify < 0:
        raise BadArgument(f"verify={verify!r}", expected="how many of the largest to compute exactly, or 0")
