"""`faithfulness`: the share of the metric that circuits of every size keep."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from nnsplice import closures
from nnsplice.activations.prompts import PromptsLike
from nnsplice.circuits.ablations import Ablation
from nnsplice.circuits.addresses import part_of
from nnsplice.circuits.circuit import Circuit
from nnsplice.circuits.curves import Faithfulness, Point
from nnsplice.circuits.masks import EdgeMask, needed
from nnsplice.circuits.measuring import Question, measure
from nnsplice.circuits.origin import check_model
from nnsplice.circuits.scores import By, Scores, count_of, scores_of
from nnsplice.circuits.shape import Shape
from nnsplice.errors import BadArgument, BadType, circumstances, named
from nnsplice.metrics import Metrics
from nnsplice.paths import parse_path
from nnsplice.results import Run, SweepResult
from nnsplice.warn import warn_caller

#: The shares of all edges that MIB measures at.
SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
#: The orders of choosing edges: the area of the first is CPR, that of the second CMD.
ORDERS: tuple[By, ...] = ("signed", "absolute")


def faithfulness(
    model: Any,
    circuits: Circuit | SweepResult | Sequence[Circuit],
    clean: PromptsLike,
    corrupted: PromptsLike | None,
    metric: Metrics,
    *,
    ablation: Ablation = "patch",
    reference: PromptsLike | None = None,
    shares: Sequence[float] = SHARES,
    max_tokens: int | None = None,
    progress: bool = True,
) -> Faithfulness:
    """Faithfulness: the share of the metric that circuits keep, of one circuit, several, or a curve over sizes.

    For scores, circuits of each share of the edges (or nodes) are measured: by the highest scores, whose area is CPR,
    and by the largest absolute scores, whose area is CMD. Ties are in execution order. Each circuit is also measured
    `pruned`, without what is on no path from `embed` to `unembed`; where removed edges have the values of another run,
    pruning changes nothing and is not run.

    >>> metric = ns.logit_diff("w7", "w8")
    >>> pairs = ["w3 w4 w5", "w9 w4 w5"], ["w3 w4 w3", "w9 w4 w3"]
    >>> sites = ["embed", "layers[:].heads[:]", "layers[:].mlp"]
    >>> scores = ns.attribute(model, *pairs, sites, metric, method="eap-ig", progress=False)
    >>> report = ns.faithfulness(model, scores, *pairs, metric, shares=[0.1, 0.5, 1.0], progress=False)
    >>> report.frame()[["by", "share", "n"]].drop_duplicates().values.tolist()[:3]
    [['signed', 0.1, 26], ['signed', 0.5, 131], ['signed', 1.0, 262]]
    >>> float(report.f()[-1].round(6)), report.cpr < 10
    (1.0, True)

    Args:
        model: a model from `ns.load`, in eval mode.
        circuits: a circuit, several, or a result with scores of edges or nodes, such as that of `ns.attribute`.
        clean: the prompts on which circuits run; the model's own metric on them is 1.
        corrupted: the prompts that ablated values are taken from; None for an ablation that needs none.
        metric: one metric of single tokens, such as `ns.logit_diff(answer, wrong)`.
        ablation: `"patch"`, `"zero"`, `"mean"` or a `SavedActivation`, as for `Circuit.run`.
        reference: the prompts of `"mean"`, if not the corrupted ones.
        shares: the circuit sizes of the curve, as shares of all edges; those of the MIB benchmark if left out.
        max_tokens: the number of tokens that run at once; chosen for the device if left out.
        progress: show a progress bar.

    Returns:
        The metric of each circuit, with `.f()`, `.cpr`, `.cmd` and `.frame()`.

    Raises:
        BadType: neither circuits nor scores.
        BadArgument: shares that do not grow from 0 to 1, several metrics, or a metric that is NaN.
        ShapeError: prompts that are no pairs of one length, with `ablation="patch"`.
        RefusedPlace: a model in which the circuit of all edges is not the clean run.
        KeyMismatch: a circuit of another model.
    """
    start = time.perf_counter()
    with circumstances("ns.faithfulness"):
        question = Question.of(model, clean, corrupted, metric, ablation, reference, several=True)
        points, masks = circuits_of(circuits, question, shares)
        found = measure(question, masks, max_tokens=max_tokens, progress=progress)
        lost = _warn_of_lost(points) if ablation == "patch" else ""
        about = Run(
            "circuits",
            time.perf_counter() - start,
            **found.cost.as_dict(),
            gate=closures.passes_spent(question.model),
            note="; ".join(filter(None, (lost, found.note))),
        )
        return report(points, found.values, found.clean, question.metric.metric.name, question.metrics, about)


def circuits_of(
    circuits: Circuit | SweepResult | Sequence[Circuit], question: Question, shares: Sequence[float]
) -> tuple[list[Point], list[EdgeMask]]:
    """The circuits that are measured, and their edges, with those of the empty circuit before them."""
    shape = question.wiring.shape
    if isinstance(circuits, SweepResult):
        scores = scores_of(circuits)
        check_model(scores.provenance, question.model, scores.senders)
        question.check_parts(scores.senders)
        points, masks = _curve(scores, shape, shares)
    else:
        points, masks = _given(circuits, question)
    return points, [EdgeMask(np.zeros_like(shape.exists)), *masks]


def report(
    points: Sequence[Point], values: np.ndarray, clean: np.ndarray, metric: str, metrics: tuple[str, ...], run: Run
) -> Faithfulness:
    """The measurements, with a warning where the full and the empty circuit are close.

    Args:
        values: `[prompt, circuit]`, of the empty circuit first; of several metrics these are a last axis.
        clean: the metric of the whole model.

    Raises:
        BadArgument: a metric of an end that is NaN.
    """
    empty, full = values[:, 0], clean
    each = (ends.reshape(len(ends), -1).T for ends in (full, empty))
    said = [_check_ends(a, b, name) for name, a, b in zip(metrics or (metric,), *each, strict=True)]
    about = replace(run, note="; ".join(filter(None, (*said, run.note))))
    return Faithfulness(tuple(points), values[:, 1:], full, empty, metric, about, metrics)


def _curve(scores: Scores, shape: Shape, shares: Sequence[float]) -> tuple[list[Point], list[EdgeMask]]:
    if not len(shares) or any(not 0 <= share <= 1 for share in shares) or list(shares) != sorted(set(shares)):
        raise BadArgument(f"shares={list(shares)}", expected="growing numbers from 0 to 1")
    points: list[Point] = []
    masks: list[EdgeMask] = []
    for by in ORDERS:
        order = scores.order(by)
        for share in shares:
            n = count_of(share, len(order))
            mask = _mask(scores, order[:n], shape)
            connected = mask.only(needed(shape, mask.edges, from_embed=True)[0])
            counts = int(connected.edges.sum())
            masks += [mask, connected]
            points += [Point(by, pruned, float(share), n, counts) for pruned in (False, True)]
    return points, masks


def _mask(scores: Scores, chosen: np.ndarray, shape: Shape) -> EdgeMask:
    some: list[Any] = [scores.of[number] for number in chosen]
    edges = scores.kind == "edges"
    members: list[Any] = some if edges else [parse_path("embed"), *some]
    if any(part_of(one[0] if edges else one) is not None for one in members):
        kind, parts = ("edges", ((), tuple(members))) if edges else ("nodes", (tuple(members), ()))
        return Circuit(kind, *parts, shape=shape).parts(shape)  # type: ignore[arg-type]
    found = np.zeros(shape.exists.shape, dtype=bool)
    if not edges:
        found[:, [shape.sender_number[one] for one in members]] = True
    elif members:
        pairs = [(shape.receiver_number[r], shape.sender_number[s]) for s, r in members]
        found[tuple(np.array(pairs).T)] = True
    return EdgeMask(found & shape.exists)


def _given(circuits: Any, question: Question) -> tuple[list[Point], list[EdgeMask]]:
    each = [circuits] if isinstance(circuits, Circuit) else circuits
    if not isinstance(each, Sequence) or not each or not all(isinstance(one, Circuit) for one in each):
        raise BadType(
            f"{named(circuits)} is neither circuits nor scores",
            expected='a Circuit, a list of them, or a result of ns.attribute(..., method="eap-ig")',
        )
    shape = question.wiring.shape
    points: list[Point] = []
    masks: list[EdgeMask] = []
    for one in each:
        mask = one.checked_mask(question)
        of = shape.n_edges if one.kind == "edges" else len(shape.senders)
        connected, _ = needed(shape, mask.edges, from_embed=True)
        points.append(Point(None, False, len(one) / of, len(one), int(connected.sum())))
        masks.append(mask)
    return points, masks


def _warn_of_lost(points: Sequence[Point]) -> str:
    """Warn of a circuit in which nothing leads from the embeddings to the logits, so that it is the empty one."""
    lost = [point.n for point in points if point.by is None and point.n and not point.connected]
    if not lost:
        return ""
    said = (
        f"none of the {lost[0]} edges of a circuit is on a path from embed to unembed, so it keeps nothing of the "
        "metric; a larger circuit may"
    )
    warn_caller(said)
    return said


def _check_ends(full: np.ndarray, empty: np.ndarray, metric: str) -> str:
    """Warn where the two ends of the scale are no further apart than chance puts them.

    Raises:
        BadArgument: they are no numbers.
    """
    if np.isnan(full).any() or np.isnan(empty).any():
        raise BadArgument(
            f"{metric} of the model or of the empty circuit is NaN", expected="a metric that is a number for both"
        )
    apart = full - empty
    error = apart.std(ddof=1) / np.sqrt(len(apart)) if len(apart) > 1 else 0.0
    if abs(apart.mean()) <= 2 * error or apart.mean() == 0:
        said = (
            f"the model and the empty circuit are {apart.mean():.3g} apart in the mean {metric}, with a standard error "
            f"of {error:.3g}: shares of that say little"
        )
        warn_caller(said)
        return said
    return ""
