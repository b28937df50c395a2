"""`sweep_circuits`: the metric of many circuits as one result."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nnsplice import closures, engine
from nnsplice.activations.prompts import PromptsLike
from nnsplice.circuits.ablations import Ablation
from nnsplice.circuits.circuit import Circuit
from nnsplice.circuits.measuring import Question, measure
from nnsplice.circuits.sender_parts import saes_of
from nnsplice.errors import BadArgument, BadType, circumstances, named
from nnsplice.metrics import Metrics
from nnsplice.results import Cell, Run, SweepResult, Table
from nnsplice.sweeps.collecting import check_baselines

#: The kind of all cells of such a result.
CIRCUITS = "circuits"


def sweep_circuits(
    model: Any,
    circuits: Sequence[Circuit] | Mapping[str, Circuit],
    clean: PromptsLike,
    corrupted: PromptsLike | None,
    metric: Metrics,
    *,
    ablation: Ablation = "patch",
    reference: PromptsLike | None = None,
    max_tokens: int | None = None,
    progress: bool = True,
) -> SweepResult:
    """Run many circuits over the same prompts, in batches; each is a cell of the result, on the axis `set`.

    The whole model is `clean` and the empty circuit `corrupted`, so `effect()` is the faithfulness of each circuit.

    >>> circuits = {"direct": ns.Circuit.of(edges=[("embed", "unembed")]), "all": ns.Circuit.full(model)}
    >>> pair = "w3 w4 w5", "w3 w4 w3"
    >>> result = ns.sweep_circuits(model, circuits, *pair, ns.logit_diff("w7", "w8"), progress=False)
    >>> result.grid().dims, result.effect().sel(set="all").values.round(6).tolist()
    (('prompt', 'set'), [1.0])

    Args:
        model: a model from `ns.load`, in eval mode.
        circuits: several circuits, in a list or in a dictionary by name.
        clean: the prompts on which circuits run.
        corrupted: the prompts that ablated values are taken from; None for an ablation that needs none.
        metric: one metric of single tokens, such as `ns.logit_diff(answer, wrong)`.
        ablation: `"patch"`, `"zero"`, `"mean"` or a `SavedActivation`, as for `Circuit.run`.
        reference: the prompts of `"mean"`, if not the corrupted ones.
        max_tokens: how many tokens run at once, counting the streams of each circuit; chosen for the device if left
            out.
        progress: show a progress bar.

    Returns:
        The metric of each circuit and prompt.

    Raises:
        BadType: something other than several circuits.
        BadArgument: an entry that is no circuit, or several metrics.
        ShapeError: prompts that are no pairs of one length, with `ablation="patch"`.
        RefusedPlace: a model in which the circuit of all edges is not the clean run.
        KeyMismatch: a circuit of another model.
    """
    start = time.perf_counter()
    with circumstances("ns.sweep_circuits"):
        each = _named(circuits)
        question = Question.of(model, clean, corrupted, metric, ablation, reference, several=True)
        masks = [one.checked_mask(question) for one in each.values()]
        empty = np.zeros_like(question.wiring.shape.exists)
        found = measure(question, [empty, *masks], max_tokens=max_tokens, progress=progress)
        check_baselines(question.metric, clean=found.clean, corrupted=found.values[:, 0])
        cells = tuple(Cell(name, CIRCUITS, set=name) for name in each)
        there = np.ones((len(question.clean), len(cells)), dtype=bool)
        about = Run(
            "circuits",
            time.perf_counter() - start,
            **found.cost.as_dict(),
            gate=closures.passes_spent(question.model),
            note=found.note,
        )
        tokens = engine.token_texts(question.model, question.clean.ids)
        ends = found.clean, found.values[:, 0]
        asked = _asked(question, each)
        return SweepResult(
            Table(cells, found.values[:, 1:], there, there, *ends, tokens, asked, about, metrics=question.metrics)
        )


def _named(circuits: Any) -> dict[str, Circuit]:
    if isinstance(circuits, Circuit) or not isinstance(circuits, Sequence | Mapping) or not circuits:
        raise BadType(
            f"{named(circuits)} is no list of circuits",
            expected="several circuits, or a dictionary of them",
            write="circuit.run(model, clean, corrupted, metric)   (for one)",
        )
    each = dict(circuits) if isinstance(circuits, Mapping) else {f"circuit {n}": one for n, one in enumerate(circuits)}
    wrong = next((name for name, one in each.items() if not isinstance(one, Circuit)), None)
    if wrong is not None:
        raise BadArgument(f"{wrong} is {named(each[wrong])}", expected="an ns.Circuit")
    return {str(name): one for name, one in each.items()}


def _asked(question: Question, circuits: Mapping[str, Circuit]) -> dict[str, Any]:
    return {
        **question.identity,
        "operation": "circuits",
        "circuits": {name: {"kind": one.kind, "digest": one.digest} for name, one in circuits.items()},
        **saes_of(question.model, [node for one in circuits.values() for node in one.nodes]),
    }
