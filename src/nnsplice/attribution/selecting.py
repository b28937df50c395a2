"""`auto`: the best estimate for a question, measured on a sample of it.

Some prompts and some cells (or edges) are drawn with the plan's seed and computed exactly. Each method that fits
estimates the same; its recall is the share of the truly largest quarter of the slice that it puts first, and its price
the passes of the model, counted, so that the same question has the same answer on every machine. Taken is the most
recall for a pass, of those that find more than chance does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from nnsplice import engine
from nnsplice.attribution.edges import EdgeGraph
from nnsplice.attribution.path_patching import run_paths
from nnsplice.attribution.verifying import of_edges
from nnsplice.errors import BadArgument, NnspliceError
from nnsplice.packed.cost import Cost, CostModel
from nnsplice.results import SweepResult
from nnsplice.sweeps.plan import Plan
from nnsplice.sweeps.running import run_fresh

AUTO = "auto"
#: How many prompts, and how many cells or edges of these, are computed exactly at most.
PROMPTS, CELLS = 4, 48
#: Effects below this share of the largest do not count among the largest, nor do estimates that small.
SMALL, TINY = 0.01, 1e-6

#: Prompts -> their estimates `[prompt, cell]` or `[prompt, cell, receiver]`, and the cost.
Estimate = Callable[[Sequence[int]], tuple[np.ndarray, Cost]]


@dataclass(frozen=True)
class MethodScore:
    """One method on the slice."""

    name: str
    recall: float
    #: The cost in forward passes of the slice's prompts; a backward pass counts as one.
    passes: float
    seconds: float
    #: Why it does not fit, if so.
    refused: str = ""

    @property
    def worth(self) -> float:
        """Recall for each pass."""
        return self.recall / self.passes

    def __str__(self) -> str:
        return f"{self.name} {self.recall:.0%} in {self.passes:.1f} passes ({self.seconds:.2f} s)"


@dataclass(frozen=True)
class MethodChoice:
    """The method that is taken, and all that were measured."""

    taken: str
    note: str
    #: The cost of the measurement, with the exact values.
    cost: Cost


def choose(
    model: engine.Model,
    plan: Plan,
    graph: EdgeGraph | None,
    methods: Mapping[str, Estimate],
    *,
    executor: str,
    max_tokens: int | None,
    progress: bool,
) -> MethodChoice:
    """Measure methods on a slice of a plan.

    Raises:
        BadArgument: none fits, or none finds more than chance.
    """
    prompts, chosen = _slice(plan, graph)
    exact, cost = _exact(model, plan, graph, prompts, chosen, executor, max_tokens, progress)
    k = min(max(len(chosen) // 4, 1), int((exact > SMALL * exact.max()).sum()))
    if not k:
        raise BadArgument(
            f"none of the {len(chosen)} that were drawn moves {plan.metric.metric.name}, so no method is better",
            expected="sites that matter, or a method by name",
            write='method="ig", or another seed=',
        )
    one_pass = CostModel.of(model).whole(plan.corrupted, prompts, 1).flops
    table: list[MethodScore] = []
    for name, estimate in methods.items():
        start = time.process_time()
        try:
            moved, spent = estimate(prompts)
        except NnspliceError as error:
            table.append(MethodScore(name, 0.0, 1.0, 0.0, str(error).partition("\n")[0]))
            continue
        cost += spent
        found = _sizes(moved[list(prompts)], chosen)
        table.append(MethodScore(name, _recall(exact, found, k), spent.flops / one_pass, time.process_time() - start))
    return MethodChoice(*_taken(table, k, len(chosen), len(prompts), plan, graph), cost)


def _taken(
    table: Sequence[MethodScore], k: int, drawn: int, prompts: int, plan: Plan, graph: EdgeGraph | None
) -> tuple[str, str]:
    """The method that is taken, and the table in words."""
    chance = k / drawn if drawn > k else 0.0
    ran = [one for one in table if not one.refused]
    refused = [f"{one.name} ({one.refused})" for one in table if one.refused]
    usable = [one for one in ran if one.recall > chance]
    tried = "; ".join(map(str, ran))
    if not usable:
        raise BadArgument(
            f"no estimate fits: {'; '.join(refused)}" if not ran else
            f"no estimate finds more of the largest {k} of {drawn} than chance does ({chance:.0%}): {tried}",
            expected="sites, or prompts, of which an estimate says something",
            write='ns.sweep(...)   (exact)' if graph is None else 'method="exact"',
        )  # fmt: skip
    best = max(usable, key=lambda one: (one.worth, one.recall))
    what = "cells" if graph is None else "edges"
    note = (
        f"auto took {best.name}, the most recall for a pass: of the largest {k} of {drawn} {what} on {prompts} of "
        f"{len(plan.corrupted)} prompts (seed {plan.seed}), each computed exactly, were found by {tried}"
    )
    return best.name, "; ".join([note, *(["not fitting: " + ", ".join(refused)] if refused else [])])


def _slice(plan: Plan, graph: EdgeGraph | None) -> tuple[list[int], np.ndarray]:
    """The prompts, and the flat numbers of cells or edges that can differ in one of them."""
    rng = np.random.default_rng(plan.seed)
    able = np.unique([prompt for prompt, _ in plan.jobs])
    if not len(able):
        raise BadArgument("no cell can differ between the runs, so there is nothing to choose a method by")
    prompts = np.sort(rng.permutation(able)[:PROMPTS])
    inside = set(prompts.tolist())
    cells = np.zeros(len(plan.targets), dtype=bool)
    cells[[cell for prompt, cell in plan.jobs if prompt in inside]] = True
    there = cells if graph is None else cells[:, None] & graph.joined(plan).numpy()
    if not there.any():
        raise BadArgument("there is no edge to measure", expected="senders that run before the receivers")
    return prompts.tolist(), np.sort(rng.permutation(np.flatnonzero(there))[:CELLS])


def _exact(
    model: engine.Model,
    plan: Plan,
    graph: EdgeGraph | None,
    prompts: Sequence[int],
    chosen: np.ndarray,
    executor: str,
    max_tokens: int | None,
    progress: bool,
) -> tuple[np.ndarray, Cost]:
    """The exact change of the metric by each, `[number]`, as a mean over prompts."""
    inside = set(prompts)
    cells = chosen if graph is None else chosen // len(graph.receivers)
    wanted = set(cells.tolist())
    jobs, known = (
        tuple((prompt, cell) for prompt, cell in some if prompt in inside and cell in wanted)
        for some in (plan.jobs, plan.known)
    )
    part = replace(plan, jobs=jobs, known=known)
    if graph is None:
        result = run_fresh(part, model, executor=executor, max_tokens=max_tokens, progress=progress)
        values = result.table.values[:, chosen]
    else:
        pairs = [graph.receivers[number] for number in chosen % len(graph.receivers)]
        result = run_paths(model, of_edges(part, cells), pairs, max_tokens=max_tokens, progress=progress)
        values = result.table.values
    moved = (values - result.table.corrupted[:, None])[list(prompts)]
    return _mean(moved), _cost_of(result)


def _cost_of(result: SweepResult) -> Cost:
    run = result.run
    return Cost(run.tokens, run.forwards, run.block_calls, run.flops)


def _sizes(moved: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    return _mean(moved.reshape(len(moved), -1)[:, chosen])


def _mean(moved: np.ndarray) -> np.ndarray:
    """The size of the mean over the prompts that have a cell."""
    there = ~np.isnan(moved)
    return np.abs(np.where(there, moved, 0.0).sum(0) / np.maximum(there.sum(0), 1))


def _recall(exact: np.ndarray, found: np.ndarray, k: int) -> float:
    """The share of the truly largest k among the first k of an estimate."""
    largest, first = (np.argsort(-sizes, kind="stable")[:k] for sizes in (exact, found))
    return len(set(largest.tolist()) & set(first[found[first] > TINY * exact.max()].tolist())) / k
