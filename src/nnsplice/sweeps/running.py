"""A plan run in this process: its table of values, with a journal and a progress bar."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from os import PathLike
from typing import Any

import numpy as np

from nnsplice import closures, engine
from nnsplice.activations import features
from nnsplice.errors import BadArgument
from nnsplice.metrics import Several
from nnsplice.packed import Cost
from nnsplice.results import Run, SweepResult, Table
from nnsplice.sweeps import other_model
from nnsplice.sweeps.choosing import EXECUTORS, ChosenExecutor, choose
from nnsplice.sweeps.chunking import chunks, corrupted_batches, tokens_at_once
from nnsplice.sweeps.collecting import check_baselines, collecting
from nnsplice.sweeps.executors import Executor, Work
from nnsplice.sweeps.identity import labels_of
from nnsplice.sweeps.jobs import Jobs
from nnsplice.sweeps.plan import Plan
from nnsplice.sweeps.probing import PROBE_VALUES
from nnsplice.sweeps.sequences import summed
from nnsplice.sweeps.unedited import clean_run


def run(
    plan: Plan,
    model: Any,
    *,
    executor: str | Executor = "auto",
    max_tokens: int | None = None,
    journal: str | PathLike[str] | None = None,
    progress: bool = True,
    source: Any = None,
) -> SweepResult:
    """A plan in this process; its arguments are those of `ns.run`."""
    model = engine.as_model(model, sharded=source is None)
    engine.refuse_changed_logits(model)
    check_mode(model)
    digest = engine.weights_digest(model)
    if plan.asked.get("weights") != digest:
        raise BadArgument(
            f"the plan was made for {plan.asked.get('model')} with other weights than this model has",
            expected="the model that the plan was made with",
        )
    features.check_identities(model, plan.asked.get("saes", {}), "the plan")
    return run_fresh(
        plan, model, executor=executor, max_tokens=max_tokens, journal=journal, progress=progress, source=source
    )


def run_fresh(
    plan: Plan,
    model: engine.Model,
    *,
    executor: str | Executor = "auto",
    max_tokens: int | None = None,
    journal: str | PathLike[str] | None = None,
    progress: bool = True,
    source: Any = None,
) -> SweepResult:
    """`run` for a plan that was just made with this model, whose weights are not checked again."""
    check_mode(model)
    other = other_model.source_of(plan, source)
    group = engine.ProcessGroup.of(model)
    journal = group.broadcast(None if journal is None else os.fspath(journal))
    group.check_same((dict(plan.asked), plan.jobs.ranges, str(executor), max_tokens), "the sweep")
    # A journal is for exactly these weights, so all are read again: torch does not notice writes through `.data`.
    if journal is not None and plan.asked.get("weights") != engine.weights_digest(model, anew=True):
        raise BadArgument(
            "the model has other weights than the plan was made with: they were written through .data, or past torch, "
            "since they were last read",
            expected="a plan of the model as it is",
            write="the same call again, which sees them; with torch.no_grad(): weight[...] = ... is always seen",
        )
    with engine.locked(model):  # packed rows exchange the model's attention function
        return SweepResult(measured_table(plan, model, executor, max_tokens, journal, progress, other))


def measured_table(
    plan: Plan,
    model: engine.Model,
    executor: str | Executor | ChosenExecutor,
    max_tokens: int | None,
    journal: str | PathLike[str] | None = None,
    progress: bool = False,
    other: engine.Model | None = None,
) -> Table:
    """The table of a run. The caller has checked and locked the model."""
    start = time.perf_counter()
    group = engine.ProcessGroup.of(model)
    if group.size > 1:
        # Measuring a site's promise calls its block. Inside a trace this would free the block's weights for the run
        # around it, as fully_shard gathers them for one call at a time; so measure before the traces.
        places = [place for target in plan.targets for place in target.places]
        closures.require(model, [*places, *([plan.corruption.place] if plan.corruption else ())])
    first_tokens, at_once = tokens_at_once(model, max_tokens)
    trial_tokens = min(2 * first_tokens, at_once)
    clean_logits, source, cost = clean_run(model, plan, at_once, other)
    prompts = range(len(plan.corrupted))
    compares = clean_logits if plan.metric.metric.compares else None
    work = Work(model, plan, source, compares)
    if isinstance(executor, Executor):
        execute, note, spent = (executor, "", Cost()) if executor.choose is None else executor.choose(work)
        name, cost = execute.name, cost + spent
    elif isinstance(executor, ChosenExecutor):
        name, note, execute = executor.name, executor.note, executor.prepare(work)
    else:
        # With a journal some cells may be done, so the whole plan is not run in the trial.
        name, note, spent = choose(executor, work, trial_tokens if journal is None else 0)
        execute, cost = EXECUTORS[name], cost + spent
    if not plan.owners:
        plan.metric.check_answers(clean_logits, prompts)
    clean = plan.metric(clean_logits, prompts, compares).double().cpu().numpy()
    check_baselines(plan.metric, clean=clean)
    corrupted = np.zeros_like(clean)

    names = plan.metric.names if isinstance(plan.metric, Several) else ()
    shape = (len(prompts), len(plan.targets))
    with collecting(shape, plan.jobs, plan.asked, journal, progress, len(names), group) as collected:
        if PROBE_VALUES in work.memo:
            collected.note(*work.memo.pop(PROBE_VALUES))
        prompts_of, targets_of = plan.jobs.columns()
        left = ~collected.done[prompts_of, targets_of]
        left = Jobs.of_columns(prompts_of[left], targets_of[left])
        for rows, logits, spent in corrupted_batches(work, execute, at_once):
            beside = None if compares is None else compares[rows]
            corrupted[rows] = plan.metric(logits, rows, beside).double().cpu().numpy()
            check_baselines(plan.metric, corrupted=corrupted)
            cost += spent
            for jobs, found, spent in chunks(work, execute, left.of_prompts(rows), at_once, first_tokens):
                collected.note(jobs, found)
                cost, first_tokens = cost + spent, at_once
        known = plan.known.columns()
        collected.values[known], collected.done[known] = corrupted[known[0]], True
    collected.warn_of_nan()
    about = Run(
        name,
        time.perf_counter() - start,
        **cost.as_dict(),
        known=len(plan.known),
        gate=closures.passes_spent(model),
        note=note,
    )
    cells = tuple(target.cell for target in plan.targets)
    texts = () if plan.owners else plan.tokens
    labels = labels_of(model, plan)
    table = Table(
        cells,
        collected.values,
        collected.done,
        plan.exists(),
        clean,
        corrupted,
        texts,
        plan.asked,
        about,
        labels=labels,
    )
    return summed(table, plan.owners, plan.tokens) if plan.owners else replace(table, metrics=names)


def chosen_for(
    plan: Plan, model: engine.Model, executor: str, at_once: int, other: engine.Model | None = None
) -> ChosenExecutor:
    """The executor for all units of a plan, from a trial on its longest and its shortest prompt."""
    prompts = plan.jobs.prompts
    if executor in ("reference", "batched") or not prompts:
        return ChosenExecutor(executor if prompts else "batched")
    lengths = plan.corrupted.lengths("decoder")
    ends = {max(prompts, key=lambda run: lengths[run]), min(prompts, key=lambda run: lengths[run])}
    part = plan.take(sorted({plan.owners[run] if plan.owners else run for run in ends}))
    check_mode(model)
    with engine.locked(model):
        logits, source, _ = clean_run(model, part, at_once, other)
        found, _ = ChosenExecutor.of(
            executor, Work(model, part, source, logits if part.metric.metric.compares else None)
        )
    return found


def check_mode(model: engine.Model) -> None:
    """Raise for a model in train mode."""
    if engine.in_training(model):
        raise BadArgument(
            "the model is in train mode, so dropout would make every run another one", write="model.eval()"
        )
