"""`acdc`: remove edges from the logits backwards while the metric stays."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from os import PathLike
from typing import Any

import numpy as np

from nnsplice.activations.prompts import PromptsLike
from nnsplice.circuits.ablations import Ablation, refuse_training
from nnsplice.circuits.circuit import Circuit
from nnsplice.circuits.masks import needed
from nnsplice.circuits.measuring import Question, measure
from nnsplice.errors import BadArgument, BadType, circumstances, named
from nnsplice.metrics import MetricLike
from nnsplice.progress import bar
from nnsplice.results import Journal

#: Edges tried in one batch. Journals depend on it, as their numbers count the edges of batches.
AT_ONCE = 16


def acdc(
    model: Any,
    clean: PromptsLike,
    corrupted: PromptsLike | None,
    metric: MetricLike,
    *,
    threshold: float,
    start: Circuit | None = None,
    ablation: Ablation = "patch",
    reference: PromptsLike | None = None,
    max_tokens: int | None = None,
    journal: str | PathLike[str] | None = None,
    progress: bool = True,
) -> Circuit:
    """ACDC: remove each edge whose removal moves the mean metric by less than a threshold, exactly and in order.

    Receivers are visited from the logits backwards, and the senders of each from the last to the first. A removed edge
    stays removed; a receiver that no longer leads to the logits loses all its edges. The score of an edge is the change
    of the metric when its removal was tried.

    The edges of a receiver are tried in batches; the result is that of one run for each edge. The number of runs grows
    with the number of edges, so start from the best edges of an estimate (`start=`) on large models.

    >>> metric, pair = ns.logit_diff("w7", "w8"), ("w3 w4 w5", "w3 w4 w3")
    >>> circuit = ns.acdc(model, *pair, metric, threshold=0.2, progress=False)
    >>> 0 < len(circuit) < len(ns.Circuit.full(model))
    True
    >>> kept, full = (one.run(model, *pair, metric) for one in (circuit, ns.Circuit.full(model)))

    Args:
        model: a model from `ns.load`, in eval mode.
        clean: the prompts on which the circuit runs.
        corrupted: the prompts that ablated values are taken from; None for an ablation that needs none.
        metric: one metric of single tokens, such as `ns.logit_diff(answer, wrong)`.
        threshold: the change of the mean metric from which on an edge stays.
        start: the edges to begin with; all edges of the model if left out.
        ablation: `"patch"`, `"zero"`, `"mean"` or a `SavedActivation`, as for `Circuit.run`.
        reference: the prompts of `"mean"`, if not the corrupted ones.
        max_tokens: the number of tokens that run at once; chosen for the device if left out.
        journal: a file that finished batches are appended to; the same call resumes from it after an interruption.
        progress: show a progress bar.

    Returns:
        The circuit of the edges that stay, with their scores.

    Raises:
        BadArgument: a threshold that is not above 0, several metrics, or an ablation without the prompts that it needs.
        BadType: `start` is no circuit of edges.
        ShapeError: prompts that are no pairs of one length, with `ablation="patch"`.
        RefusedPlace: a model in which the circuit of all edges is not the clean run.
        FileError: the journal is of another search, or damaged.
    """
    with circumstances("ns.acdc"):
        refuse_training(ablation, "acdc")
        if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not threshold > 0:
            raise BadArgument(f"threshold={threshold!r}", expected="a number above 0, in units of the metric")
        if start is not None and (not isinstance(start, Circuit) or start.kind != "edges"):
            raise BadType(f"start is {named(start)}", expected="a circuit of edges")
        question = Question.of(model, clean, corrupted, metric, ablation, reference)
        begin = Circuit.full(model) if start is None else start
        mask = begin.whole_mask(question, "acdc takes out edges of whole senders")
        asked = _asked(question, mask, threshold)
        opened = nullcontext() if journal is None else Journal.open(journal, asked, int(mask.sum()))
        with opened as log:
            mask, moved = _pruned(question, mask, threshold, _measuring(question, log, max_tokens), progress)
        shape = question.wiring.shape
        edges = shape.edges(mask)
        scores = tuple(moved[shape.receiver_number[r], shape.sender_number[s]] for s, r in edges)
        about = {"method": "acdc", "threshold": float(threshold), "metric": question.metric.identity}
        return Circuit("edges", (), edges, scores, shape, {**begin.on(model).provenance, **about})


Means = Callable[[Sequence[np.ndarray]], np.ndarray]


def _pruned(
    question: Question, mask: np.ndarray, threshold: float, means: Means, progress: bool
) -> tuple[np.ndarray, dict[tuple[int, int], float]]:
    """The edges that stay, and how far the metric moved without each: `(receiver, sender)` -> that."""
    shape = question.wiring.shape
    moved: dict[tuple[int, int], float] = {}
    (now,) = means([mask])
    with bar("acdc", int(mask.sum()), "edge", progress) as shown:
        for receiver in reversed(range(len(shape.receivers))):
            before = int(mask[receiver].sum())
            live, _ = needed(shape, mask, from_embed=False)
            mask[receiver] &= live[receiver]
            left = np.flatnonzero(mask[receiver])[::-1].tolist()
            while left:
                tried = left[:AT_ONCE]
                masks = [mask.copy() for _ in tried]
                for number, one in enumerate(masks):
                    one[receiver, tried[: number + 1]] = False
                values = means(masks)
                for number, sender in enumerate(tried):
                    apart = abs(float(values[number] - now))
                    left = left[1:]
                    if apart >= threshold:
                        # It stays, and the others of this batch were measured without it.
                        moved[receiver, sender] = apart
                        break
                    mask[receiver, sender] = False
                    now = float(values[number])
            shown.update(before)
    # Later removals may have cut kept edges off from the logits or the embeddings.
    mask, _ = needed(shape, mask, from_embed=question.source.is_run)
    return mask, moved


def _measuring(question: Question, log: Journal | None, max_tokens: int | None) -> Means:
    """The mean metric of circuits; those in the journal are not run again."""
    known = {} if log is None else log.done()
    prompts, at = len(question.clean), [0]

    def means(masks: Sequence[np.ndarray]) -> np.ndarray:
        numbers = range(at[0], at[0] + len(masks))
        at[0] = numbers.stop
        pairs = [(prompt, number) for number in numbers for prompt in range(prompts)]
        if all(pair in known for pair in pairs):
            values = np.array([known[pair] for pair in pairs]).reshape(len(masks), prompts)
        else:
            values = measure(question, masks, max_tokens=max_tokens).values.T
            if log is not None:
                log.append([p for p, _ in pairs], [n for _, n in pairs], values.reshape(-1).tolist())
        if np.isnan(values).any():
            raise BadArgument(f"{question.metric.metric.name} is NaN on the way", expected="a metric that is a number")
        return values.mean(1)

    return means


def _asked(question: Question, mask: np.ndarray, threshold: float) -> Mapping[str, Any]:
    return {
        **question.identity,
        "search": "acdc",
        "start": np.packbits(mask).tobytes().hex(),
        "threshold": float(threshold),
        "at once": AT_ONCE,
    }
