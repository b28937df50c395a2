"""Other questions about the cells of a sweep's plan (attribution, path patching), in units of whole prompts."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nnsplice import engine
from nnsplice.results import PART, Cell, Run, SweepResult, Table, taken
from nnsplice.results.merging import together
from nnsplice.sweeps.identity import labels_of
from nnsplice.sweeps.jobs import Jobs
from nnsplice.sweeps.plan import Plan
from nnsplice.sweeps.plan_files import cells_of, plain_plan, read_plan, write_tensors
from nnsplice.units import Outcomes, UnitPlan, packed_text, prompts_in, rows_of, text_in
from nnsplice.work import Arrays


def unit_plan(kind: str, model: engine.Model, plan: Plan, costs: Sequence[float], **more: Any) -> UnitPlan[Any]:
    """A question about the cells of a plan, in units of whole prompts.

    Args:
        kind: the name `module:NAME` of the `units.Kind` of question.
        costs: `[prompt]`, the approximate work of each prompt.
        more: plain data that the question needs besides the plan.
    """
    question = {
        "weights": plan.asked["weights"],
        "plan": plain_plan(plan),
        "exists": Jobs.of_mask(plan.exists()).ranges,
        "labels": labels_of(model, plan),
        **more,
    }
    with tempfile.TemporaryDirectory() as folder:
        write_tensors(plan, Path(folder))
        files = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    return UnitPlan.of(kind, question, costs, files)


def plan_in(plan: UnitPlan[Any], model: engine.Model) -> Plan:
    """The sweep plan of a question, for this model."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in plan.files:
            (Path(folder) / name).write_bytes(content)
        return read_plan(plan.question["plan"], folder, model)


def arrays_of(table: Table) -> Arrays:
    """The outcome of a unit, from its table."""
    found = {name: getattr(table, name) for name in ("values", "done", "clean", "corrupted")}
    return {
        **found, "run": packed_text(dataclasses.asdict(table.run)),
        **({} if table.edges is None else {"edges": table.edges}),
    }  # fmt: skip


def result_of(plan: UnitPlan[Any], outcomes: Outcomes, **more: Any) -> SweepResult:
    """The result of the finished prompts of a plan that `unit_plan` made.

    Args:
        more: other fields of the table.
    """
    question = plan.question
    cells = cells_of(question["plan"])
    exists = np.zeros((len(plan), len(cells)), dtype=bool)
    exists[Jobs.of_ranges(question["exists"]).columns()] = True
    asked, tokens = question["plan"]["asked"], question["plan"]["tokens"]
    return joined_result(plan, outcomes, cells, exists, asked, tokens, question["labels"], **more)


def joined_result(
    plan: UnitPlan[Any],
    outcomes: Outcomes,
    cells: tuple[Cell, ...],
    exists: np.ndarray,
    asked: Mapping[str, Any],
    tokens: Sequence[Sequence[str]],
    labels: Mapping[str, Any],
    **more: Any,
) -> SweepResult:
    """The result of the finished prompts.

    Args:
        exists: `[prompt, cell]` of the whole plan, as `asked`, `tokens` and `labels` are.
        more: other fields of the table.
    """
    rows = prompts_in(outcomes)
    if len(rows) < len(plan):
        asked = taken(asked, rows, asked[PART]["of"] if PART in asked else len(plan))
        labels = {**labels, "clean": [labels["clean"][row] for row in rows]} if "clean" in labels else labels
    values, done, clean, corrupted = (rows_of(outcomes, name) for name in ("values", "done", "clean", "corrupted"))
    run = together([Run(**text_in(arrays["run"])) for _, arrays in outcomes])
    edges = rows_of(outcomes, "edges") if "edges" in outcomes[0][1] else None
    texts = tuple(tuple(tokens[row]) for row in rows) if tokens else ()
    table = Table(cells, values, done, exists[rows], clean, corrupted, texts, asked, run, edges=edges, labels=labels)
    return SweepResult(dataclasses.replace(table, **more))
