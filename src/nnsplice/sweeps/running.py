"""`run`: a plan's jobs in chunks, with a bar, a journal, and less at once when memory is short."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nnsplice import closures, engine
from nnsplice.activations import features
from nnsplice.activations.prompts import PairSpanTexts, PromptsLike
from nnsplice.activations.saved_activation import SavedActivation
from nnsplice.errors import BadArgument, BadType, NnspliceError, named
from nnsplice.metrics import Metrics, Several
from nnsplice.packed import Cost, CostModel
from nnsplice.results import Run, SweepResult, Table
from nnsplice.subspaces import Subspace
from nnsplice.sweeps import foreign
from nnsplice.sweeps.choosing import EXECUTORS, Chosen, choose
from nnsplice.sweeps.executors import Executor, Work, fitting, whole_prompts
from nnsplice.sweeps.identity import labels_of
from nnsplice.sweeps.jobs import Job, Jobs
from nnsplice.sweeps.ledger import check_baselines, ledger
from nnsplice.sweeps.plan import Plan
from nnsplice.sweeps.planning import plan_sweep
from nnsplice.sweeps.probing import RAN
from nnsplice.sweeps.sequences import summed
from nnsplice.sweeps.sets import Sites
from nnsplice.sweeps.unedited import clean_run, corrupted_run

#: Operations of a chunk on a CPU, and of the first one: some ten seconds and some two, so that the bar moves.
CHUNK, FIRST = 1e12, 1.5e11
#: Fewer tokens than this take as long: every chunk reads the weights once.
LEAST = 128


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
    if not isinstance(plan, Plan):
        raise BadType(f"{named(plan)} is no plan", expected="what ns.plan_sweep returns", write="ns.run(plan, model)")
    model = engine.as_model(model, spread=source is None)
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
    """`run`, of a plan that was made of this model a moment ago: its weights need not be looked at again."""
    check_mode(model)
    other = foreign.source_of(plan, source)
    team = engine.Team.of(model)
    journal = team.told(None if journal is None else os.fspath(journal))
    team.check_same((dict(plan.asked), plan.jobs.ranges, str(executor), max_tokens), "the sweep")
    # A file tells its question from others by every number of the model, also by those written past torch's notice.
    if journal is not None and plan.asked.get("weights") != engine.weights_digest(model, anew=True):
        raise BadArgument(
            "the model has other weights than the plan was made with: they were written through .data, or past torch, "
            "since they were last read",
            expected="a plan of the model as it is",
            write="the same call again, which sees them; with torch.no_grad(): weight[...] = ... is always seen",
        )
    with engine.turn(model):  # its attention is another one while packed rows run
        return SweepResult(measured_table(plan, model, executor, max_tokens, journal, progress, other))


def measured_table(
    plan: Plan,
    model: engine.Model,
    executor: str | Executor | Chosen,
    max_tokens: int | None,
    journal: str | PathLike[str] | None = None,
    progress: bool = False,
    other: engine.Model | None = None,
) -> Table:
    """What `run` finds, as a table; whoever calls holds the model's turn, and has checked the model."""
    start = time.perf_counter()
    team = engine.Team.of(model)
    if team.size > 1:
        # What is measured of a site runs its block by itself; inside a trace that would take the weights of the block
        # away from the run around it, as fully_shard keeps them for one call at a time.
        places = [place for target in plan.targets for place in target.places]
        closures.require(model, [*places, *([plan.corruption.place] if plan.corruption else ())])
    first, at_once = _rooms(model, max_tokens)
    whole = min(2 * first, at_once)
    clean_logits, source, cost = clean_run(model, plan, at_once, other)
    prompts = range(len(plan.corrupted))
    compares = clean_logits if plan.metric.metric.compares else None
    work = Work(model, plan, source, compares)
    if isinstance(executor, Executor):
        execute, note, spent = (executor, "", Cost()) if executor.choose is None else executor.choose(work)
        name, cost = execute.name, cost + spent
    elif isinstance(executor, Chosen):
        name, note, execute = executor.name, executor.note, executor.handed(work)
    else:
        # What a journal holds already need not run again for a trial.
        name, note, spent = choose(executor, work, whole if journal is None else 0)
        execute, cost = EXECUTORS[name], cost + spent
    if not plan.owners:
        plan.metric.check_answers(clean_logits, prompts)
    clean = plan.metric(clean_logits, prompts, compares).double().cpu().numpy()
    check_baselines(plan.metric, clean=clean)
    corrupted = np.zeros_like(clean)

    names = plan.metric.names if isinstance(plan.metric, Several) else ()
    shape = (len(prompts), len(plan.targets))
    with ledger(shape, plan.jobs, plan.asked, journal, progress, len(names), team) as book:
        if RAN in work.memo:
            book.note(*work.memo.pop(RAN))
        prompts_of, targets_of = plan.jobs.columns()
        left = ~book.done[prompts_of, targets_of]
        left = Jobs.of_columns(prompts_of[left], targets_of[left])
        for rows, logits, spent in _corrupted(work, execute, at_once):
            beside = None if compares is None else compares[rows]
            corrupted[rows] = plan.metric(logits, rows, beside).double().cpu().numpy()
            check_baselines(plan.metric, corrupted=corrupted)
            cost += spent
            for jobs, found, spent in _chunks(work, execute, left.of_prompts(rows), at_once, first):
                book.note(jobs, found)
                cost, first = cost + spent, at_once
        known = plan.known.columns()
        book.values[known], book.done[known] = corrupted[known[0]], True
    book.warn_of_nan()
    about = Run(
        name,
        time.perf_counter() - start,
        **cost.as_dict(),
        known=len(plan.known),
        gate=closures.spent(model),
        note=note,
    )
    cells = tuple(target.cell for target in plan.targets)
    texts = () if plan.owners else plan.tokens
    labels = labels_of(model, plan)
    table = Table(
        cells, book.values, book.done, plan.exists(), clean, corrupted, texts, plan.asked, about, labels=labels
    )
    return summed(table, plan.owners, plan.tokens) if plan.owners else replace(table, metrics=names)


def chosen_for(
    plan: Plan, model: engine.Model, executor: str, at_once: int, other: engine.Model | None = None
) -> Chosen:
    """The executor of a plan that others will run in parts: tried on its longest prompt and its shortest, once."""
    prompts = plan.jobs.prompts
    if executor in ("reference", "batched") or not prompts:
        return Chosen(executor if prompts else "batched")
    lengths = plan.corrupted.lengths("decoder")
    ends = {max(prompts, key=lambda run: lengths[run]), min(prompts, key=lambda run: lengths[run])}
    part = plan.take(sorted({plan.owners[run] if plan.owners else run for run in ends}))
    check_mode(model)
    with engine.turn(model):
        logits, source, _ = clean_run(model, part, at_once, other)
        found, _ = Chosen.of(executor, Work(model, part, source, logits if part.metric.metric.compares else None))
    return found


def sweep(
    model: Any,
    clean: PromptsLike | None,
    corrupted: PromptsLike | None,
    sites: Sites,
    metric: Metrics,
    *,
    operation: str | Callable[[Tensor], Tensor] = "patch",
    reference: SavedActivation | None = None,
    subspace: Subspace | None = None,
    window: int = 1,
    spans: PairSpanTexts | None = None,
    align: str = "position",
    executor: str = "auto",
    max_tokens: int | None = None,
    journal: str | PathLike[str] | None = None,
    progress: bool = True,
    seed: int = 0,
    source: Any = None,
    together: bool = False,
) -> SweepResult:
    """Activation patching: run `corrupted` with one site's value from `clean` at a time, and record the metric.

    >>> metric = ns.logit_diff("w7", "w8")
    >>> result = ns.sweep(model, "w3 w4 w5", "w3 w6 w5", "layers[:].output[:]", metric, progress=False)
    >>> result.grid().sizes
    Frozen({'prompt': 1, 'layer': 3, 'position': 3})

    A list of paths inside the list is a set: one cell, in which all of its sites are changed together.

    >>> pair = ["layers[0].heads[1]", "layers[1].heads[0]"]
    >>> result = ns.sweep(model, "w3 w4 w5", "w3 w6 w5", [pair, pair[:1], pair[1:]], metric, progress=False)
    >>> result.grid().sel(prompt=0).set.values.tolist()[0]
    'layers[0].heads[1].output + layers[1].heads[0].output'

    With another model as `source`, the values come from its run of the same prompts, and the ends of the scale are the
    two models: each cell says how much of their difference a site carries.

    >>> import copy
    >>> tuned = ns.load(copy.deepcopy(ns.models.unwrap(model)), tokenizer=model.tokenizer)
    >>> with torch.no_grad():
    ...     _ = ns.models.unwrap(tuned).transformer.h[1].mlp.c_proj.weight.mul_(2.0)
    >>> result = ns.sweep(model, "w3 w4 w5", None, "layers[:].mlp[-1]", metric, source=tuned, progress=False)
    >>> result.effect().values.squeeze().round(6).tolist()[0]
    0.0

    `ns.plan_sweep` and `ns.run` do the same in two steps.

    Args:
        model: a model from `ns.load`, in eval mode.
        clean: the prompts that values are taken from: a text, a list of texts, token ids or chat messages. Prompt i is
            paired with prompt i of `corrupted`. None where the operation takes nothing from a clean run.
        corrupted: the prompts whose run is edited; None edits the clean run, for operations other than `"patch"`.
        sites: a path or several. Without a position, or with `[:]`, each token is a cell of its own.
        metric: `ns.logit_diff(answer, wrong)`, another metric, or a function `logits[row, vocab] -> [row]`; several in
            a list or a dictionary give the grid an axis `metric`.
        operation: `"patch"`, `"zero"`, `"mean"`, `"resample"`, `"noise"`, `"add"`, a function of the value, or
            `"knockout"` of edges of attention (`"layers[:].heads[:].pattern[-1][3]"`).
        reference: the capture that `"mean"`, `"resample"` and `"add"` take values from.
        subspace: change only the part of each value that lies in this subspace.
        window: the number of neighbouring layers that are changed together.
        spans: token spans by name, `{"subject": ["Eiffel Tower", ...]}`, a text or (start, stop) for each prompt;
            `{"clean": {...}, "corrupted": {...}}` where the prompts differ.
        align: how tokens of a pair correspond: `"position"`, `"end"` (counted from the last token), or `"role"`
            (counted from the span `"subject"`).
        executor: `"auto"`, `"packed"`, `"batched"` or `"reference"`, as for `ns.run`.
        max_tokens: how many tokens run at once; chosen for the device if left out.
        journal: a file that finished cells are appended to; the same call resumes from it after an interruption.
        progress: show a progress bar.
        seed: the seed of `"resample"` and `"noise"`.
        source: another model, whose run of the same prompts the values come from; `corrupted` is None then.
        together: True makes a site without a position one cell, in which all tokens are changed at once.

    Returns:
        The metric of every cell, with `.grid()`, `.effect()`, `.frame()` and `.plot()`.

    Raises:
        PathError: a site is no path, is out of range (`OutOfRange`) or has no exact value (`RefusedPlace`).
        UnknownPath: a site that this model does not have.
        BadArgument: nothing differs between the runs, options that do not fit together, or a model in train mode.
        ShapeError: the numbers of prompts differ, or the lengths of a pair with `align="position"`.
        ShortRow: a prompt has no token at a position of a site or of the metric.
        SpanError: a span that is not found, or has another length in the other prompt.
        RefusedExecutor: the executor named has no exact values for this sweep.
        FileError: the journal is of another sweep, or damaged.
    """
    plan = plan_sweep(
        model, clean, corrupted, sites, metric, operation=operation, reference=reference, subspace=subspace,
        window=window, spans=spans, align=align, seed=seed, source=source, together=together,
    )  # fmt: skip
    unseen = plan.operation.name != "patch" and not plan.metric.metric.compares
    if unseen and clean is not None and corrupted is not None:
        warnings.warn(
            f"{plan.operation.name} takes nothing from the clean prompts: the corrupted run is edited, and the clean "
            "one is only the upper end of its scale. corrupted=None edits the clean run, clean=None leaves out the "
            "scale",
            stacklevel=2,
        )
    return run_fresh(
        plan, engine.as_model(model, spread=source is None), executor=executor, max_tokens=max_tokens,
        journal=journal, progress=progress, source=source,
    )  # fmt: skip


# --- checks -----------------------------------------------------------------------------------------------------------


def check_mode(model: engine.Model) -> None:
    """Raise for a model in train mode."""
    if engine.in_training(model):
        raise BadArgument(
            "the model is in train mode, so dropout would make every run another one", write="model.eval()"
        )


def _corrupted(work: Work, executor: Executor, at_once: int) -> Iterator[tuple[list[int], Tensor, Cost]]:
    """Corrupted prompts, whose jobs are run together, and their logits: from a run that is made for these anyway."""
    every, about = list(range(len(work.plan.corrupted))), work.plan.jobs.prompts
    shared = [] if executor.corrupted is None else _recorded_together(work, about, at_once)
    alone = sorted(set(every).difference(*shared))
    if alone:
        yield alone, *corrupted_run(work.model, work.plan, at_once, alone)
    for rows in shared:
        assert executor.corrupted is not None
        try:
            logits, spent = executor.corrupted(work, rows)
        except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
            if not engine.is_memory(error):
                raise
            engine.Team.of(work.model).refuse_memory(error)
            if executor.forget is not None:
                executor.forget(work)
            logits, spent = corrupted_run(work.model, work.plan, at_once, rows)
        yield rows, logits, spent


def _recorded_together(work: Work, prompts: Sequence[int], at_once: int) -> list[list[int]]:
    """Neighbouring prompts that fit into one recorded pass; none that does not fit by itself."""
    lengths = work.plan.corrupted.lengths("decoder")
    groups: list[list[int]] = []
    tokens = 0
    for prompt in (prompt for prompt in prompts if lengths[prompt] <= at_once):
        tokens += lengths[prompt]
        if not groups or tokens > at_once:
            groups.append([])
            tokens = lengths[prompt]
        groups[-1].append(prompt)
    return groups


# --- chunks -----------------------------------------------------------------------------------------------------------


def _rooms(model: engine.Model, max_tokens: int | None) -> tuple[int, int]:
    """How many tokens run at once, in the first chunk and later: what suits the machine, or what was asked for."""
    room = engine.Team.of(model).least(engine.room(model, max_tokens))  # memory is not free alike everywhere
    if max_tokens is not None or (model.device is not None and model.device.type != "cpu"):
        return room, room
    each = CostModel.of(model).token
    return min(room, max(int(FIRST / each), LEAST)), min(room, max(int(CHUNK / each), LEAST))


def _chunks(
    work: Work, executor: Executor, jobs: Sequence[Job], at_once: int, first: int | None = None
) -> Iterator[tuple[Sequence[Job], list[float], Cost]]:
    """Jobs that run together, at most so many tokens at once, and half of it after running out of memory.

    Args:
        first: how many tokens the first chunk has, where a few chunks follow it.
    """
    room = at_once if first is None else first
    for members in _together(work, executor, jobs):
        sizes, prompts = executor.tokens(work, members), whole_prompts(work, members)
        if sum(sizes) <= 2 * room:
            room = min(2 * room, at_once)  # what would be left is not worth another reading of all weights
        at = 0
        while at < len(members):
            chunk = members[at : at + fitting(members, sizes, prompts, room, at)]
            try:
                values, cost = executor(work, chunk)
            except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
                if len(chunk) == 1 or isinstance(error, NnspliceError) or not engine.is_memory(error):
                    raise
                engine.Team.of(work.model).refuse_memory(error)
                if executor.forget is not None:
                    executor.forget(work)
                room = at_once = min(room, sum(sizes[at : at + len(chunk)])) // 2
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                continue
            yield chunk, values, cost
            at, room = at + len(chunk), at_once


def _together(work: Work, executor: Executor, jobs: Sequence[Job]) -> list[list[Job]]:
    """Jobs by the shape of their prompts, where that matters; sorted by prompt, so that a chunk is about few."""
    prompts = work.plan.corrupted
    shapes = [() if executor.mixed else prompts.shape(row) for row in range(len(prompts))]
    groups: dict[object, list[Job]] = {}
    for job in sorted(jobs):
        groups.setdefault(shapes[job[0]], []).append(job)
    return list(groups.values())
