"""`ns.faithfulness` in units: some prompts with all circuits."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple
from typing import Any

from nnsplice import engine
from nnsplice.activations import features
from nnsplice.activations.encoding import encode
from nnsplice.activations.saved_activation import SavedActivation
from nnsplice.circuits.ablations import Ablation, source_of
from nnsplice.circuits.circuit import Circuit
from nnsplice.circuits.constants import OptimalAblation
from nnsplice.circuits.curves import Faithfulness, Point
from nnsplice.circuits.faithfulness import SHARES, circuits_of, report
from nnsplice.circuits.measuring import Question, measure
from nnsplice.circuits.scores import scores_of
from nnsplice.circuits.wiring import wiring_of
from nnsplice.errors import BadArgument, circumstances
from nnsplice.packed.cost import CostModel
from nnsplice.results import Run, SweepResult
from nnsplice.results.merging import together
from nnsplice.sweeps.running import check_mode
from nnsplice.units import (
    Agree,
    Kind,
    Models,
    Outcomes,
    UnitPlan,
    bytes_of,
    metric_of,
    packed_text,
    plain_metric,
    plain_prompts,
    prompts_of,
    read_from,
    rows_of,
    text_in,
)
from nnsplice.work import Arrays

SCORES, VALUES = "scores.safetensors", "ablation.safetensors"


def plan(
    model: Any,
    circuits: Any,
    clean: Any,
    corrupted: Any,
    metric: Any,
    *,
    ablation: Ablation = "patch",
    reference: Any = None,
    shares: Sequence[float] = SHARES,
) -> UnitPlan[Any]:
    """The plan of a report, whose arguments these are."""
    with circumstances("ns.faithfulness"):
        if isinstance(ablation, str) and ablation == "optimal":
            raise BadArgument(
                'ablation="optimal" trains constants on all prompts for each circuit, so it is not run in units',
                expected="constants that are trained once",
                write="ablation=ns.optimal_ablation(model, circuit, clean, corrupted)",
            )
        question = Question.of(model, clean, corrupted, metric, ablation, reference, several=True)
        points, masks = circuits_of(circuits, question, shares)
    files: dict[str, bytes] = {}
    if isinstance(circuits, SweepResult):
        files[SCORES] = bytes_of(circuits.to_file)
        record: dict[str, Any] = {"circuits": SCORES}
        senders = [*scores_of(circuits).senders]
    else:
        each = [circuits] if isinstance(circuits, Circuit) else list(circuits)
        files |= {f"circuit{number}.json": bytes_of(one.to_file) for number, one in enumerate(each)}
        record = {"circuits": len(each)}
        senders = [node for one in each for node in one.nodes]
    if isinstance(ablation, SavedActivation | OptimalAblation):
        values = ablation.values if isinstance(ablation, OptimalAblation) else ablation
        files[VALUES] = bytes_of(values.to_file)
    encoded = None if reference is None else plain_prompts(encode(question.model, reference))
    record |= {
        "weights": question.identity["weights"],
        "saes": features.identities(question.model, senders),
        "clean": plain_prompts(question.clean),
        "corrupted": None if question.corrupted is None else plain_prompts(question.corrupted),
        "reference": encoded,
        "metric": plain_metric(question.metric),
        "name": question.metric.metric.name,
        "metrics": list(question.metrics),
        "ablation": ablation if isinstance(ablation, str) else VALUES,
        "shares": [float(share) for share in shares],
        "points": [astuple(point) for point in points],
    }
    depth = len(question.wiring.layers)
    costs = [length * depth * (len(masks) + 2) for length in question.clean.lengths("decoder")]
    return UnitPlan.of("nnsplice.circuits.units:FAITHFULNESS", record, costs, files)


def _ready(plan: UnitPlan[Any], models: Models, max_tokens: int, _agree: Agree) -> Callable[[Sequence[int]], Arrays]:
    record, model = plan.question, models.model
    check_mode(model)
    engine.refuse_edits(model)
    engine.refuse_changed_logits(model, bare=True)
    wiring = wiring_of(model)
    clean, corrupted, reference = (
        None if record[name] is None else prompts_of(record[name], model)
        for name in ("clean", "corrupted", "reference")
    )
    assert clean is not None
    ablation: Any = record["ablation"]
    if ablation == VALUES:
        ablation = read_from(plan.file(VALUES), SavedActivation.from_file)
    # Of all prompts: a mean is over all of them, and a unit has only some.
    source = source_of(model, wiring, clean, corrupted, ablation, reference, max_tokens)
    question = Question(model, wiring, clean, corrupted, metric_of(record["metric"]), source, CostModel.of(model))
    if record["circuits"] == SCORES:
        circuits: Any = read_from(plan.file(SCORES), SweepResult.from_file)
    else:
        files = [plan.file(f"circuit{number}.json") for number in range(record["circuits"])]
        circuits = [read_from(content, Circuit.from_file) for content in files]
    points, masks = circuits_of(circuits, question, record["shares"])
    if [list(astuple(point)) for point in points] != record["points"]:
        raise BadArgument("these circuits are others here than where they were planned", expected="the same versions")

    def unit(prompts: Sequence[int]) -> Arrays:
        start = time.perf_counter()
        found = measure(question, masks, max_tokens=max_tokens, prompts=prompts)
        run = Run("circuits", time.perf_counter() - start, **found.cost.as_dict(), note=found.note)
        return {"values": found.values, "clean": found.clean, "run": packed_text(asdict(run))}

    return unit


def _joined(plan: UnitPlan[Any], outcomes: Outcomes) -> Faithfulness:
    record = plan.question
    run = together([Run(**text_in(arrays["run"])) for _, arrays in outcomes])
    return report(
        [Point(*point) for point in record["points"]], rows_of(outcomes, "values"), rows_of(outcomes, "clean"),
        record["name"], tuple(record["metrics"]), run,
    )  # fmt: skip


FAITHFULNESS = Kind("ns.faithfulness", _ready, _joined)
