"""`sweep_weights`: the effect of a tuned model's weights, one address at a time.

For each site the base model runs with the tuned model's weights there, and its own everywhere else. The baselines are
the base model (`corrupted`, effect 0) and the tuned model (`clean`, effect 1).
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from nnsplice import engine
from nnsplice.activations.prompts import PromptsLike
from nnsplice.atlas import Atlas, Selection, unwrap
from nnsplice.deprecated import renamed_to
from nnsplice.digests import digest_of
from nnsplice.errors import BadArgument, circumstances
from nnsplice.metrics import Bound, Metric, MetricLike
from nnsplice.packed.cost import Cost
from nnsplice.paths import Path, Paths, parse_path
from nnsplice.results import Cell, Run, SweepResult, Table
from nnsplice.sweeps.collecting import check_baselines, collecting
from nnsplice.sweeps.identity import prompts_record
from nnsplice.sweeps.jobs import Job, Jobs
from nnsplice.sweeps.prefix import Prefix
from nnsplice.sweeps.targets import cell_of
from nnsplice.sweeps.weight_runs import WeightRuns
from nnsplice.weights import select, swap
from nnsplice.weights.regions import counterpart, regions

F = TypeVar("F", bound=Callable[..., SweepResult])


def _accept_old_order(function: F) -> F:
    """Accept `(base, tuned, sites, metric, prompts)`, the argument order of version 0.1, with a warning."""

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> SweepResult:
        if len(args) > 3 and (isinstance(args[3], Metric) or callable(args[3])):
            base, tuned, sites, metric, *prompts = args
            renamed_to(
                "sweep_weights(base, tuned, sites, metric, prompts)",
                "sweep_weights(base, tuned, prompts, sites, metric)",
            )
            kwargs |= {"sites": sites, "metric": metric, **({"prompts": prompts[0]} if prompts else {})}
            args = (base, tuned)
        return function(*args, **kwargs)

    return cast("F", called)


@_accept_old_order
def sweep_weights(
    base: Any,
    tuned: Any,
    prompts: PromptsLike,
    sites: Paths,
    metric: MetricLike,
    *,
    batch_size: int | None = None,
    journal: str | PathLike[str] | None = None,
    progress: bool = True,
) -> SweepResult:
    """Weight patching: run the base model with the tuned model's weights at one site at a time, and record the metric.

    >>> import copy
    >>> tuned = copy.deepcopy(ns.models.unwrap(model))
    >>> with torch.no_grad():
    ...     _ = tuned.transformer.h[1].attn.c_proj.weight.mul_(2.0)
    >>> metric = ns.logit_diff("w7", "w8")
    >>> result = ns.sweep_weights(model, tuned, "w3 w4 w5", "layers[:].attn", metric, progress=False)
    >>> result.effect().sel(prompt=0).values.tolist()
    [0.0, 1.0, 0.0]

    Where heads share a key/value head, a head stands for its own weights (q and o); the shared keys and values are
    swapped by `"layers[:].groups[:]"`, with all heads of the group.

    Args:
        base: the model that runs; afterwards its weights are restored exactly.
        tuned: a model of the same shape, or a mapping from parameter names to tensors.
        prompts: a text, a list of texts, token ids or chat messages.
        sites: addresses of weights: `"layers[:].heads[:]"`, `"layers[:].mlp"`, `["embed", "layers[:]"]`.
        metric: `ns.logit_diff(answer, wrong)`, another metric, or a function `logits[row, vocab] -> [row]`.
        batch_size: how many prompts run at once; all prompts of one length if left out.
        journal: a file that finished cells are appended to; the same call resumes from it after an interruption.
        progress: show a progress bar.

    Returns:
        The metric of every cell; `corrupted` is the base model's and `clean` the tuned model's, so an effect of 1 is
        all of the change.

    Raises:
        BadArgument: models of different shapes, a model in train mode, or no sites.
        UnknownPath: a site without weights in this model.
        FileError: the journal is of another sweep, or damaged.
    """
    base = engine.as_model(base)
    start = time.perf_counter()
    request = weight_request(base, tuned, prompts, sites, metric, batch_size=batch_size, anew=journal is not None)
    runs, asked = request.runs, request.asked
    with circumstances("ns.sweep_weights"), engine.locked(base), torch.no_grad():
        baselines = _baselines(runs, tuned)
    shape = len(runs.given), len(request.cells)
    cost, jobs = Cost(), Jobs.of(np.ndindex(shape))
    # The weights of the model are changed meanwhile, so runs in other threads wait.
    with (
        engine.locked(base),
        collecting(shape, jobs, asked, journal, progress) as collected,
        torch.no_grad(),
    ):
        for done, found, spent in _measured(runs, tuned, request.selections, baselines.logits, collected.done):
            collected.note(done, found)
            cost += spent
    collected.warn_of_nan()
    about = Run("weights", time.perf_counter() - start, **cost.as_dict())
    exists = np.ones(shape, dtype=bool)
    return SweepResult(
        Table(
            request.cells,
            collected.values,
            collected.done,
            exists,
            baselines.clean,
            baselines.corrupted,
            runs.tokens,
            asked,
            about,
        )
    )


@dataclass(frozen=True)
class WeightRequest:
    """A sweep of weights with checked arguments."""

    runs: WeightRuns
    cells: tuple[Cell, ...]
    #: The weights of each cell.
    selections: Sequence[Selection]
    asked: Mapping[str, Any]


def weight_request(
    base: engine.Model,
    tuned: Any,
    prompts: PromptsLike,
    sites: Paths,
    metric: MetricLike | Bound,
    *,
    batch_size: int | None,
    anew: bool = False,
) -> WeightRequest:
    """The checked request; the arguments are those of `sweep_weights`.

    Args:
        anew: read all weights for the digest, also if torch has not noticed a change.
    """
    with circumstances("ns.sweep_weights"), engine.locked(base), torch.no_grad():
        if batch_size is not None and batch_size < 1:
            raise BadArgument(f"batch_size={batch_size}", expected="at least 1")
        places = _weights_of_sites(base, sites)
        _check_pair(base, tuned, places.values())
        runs = WeightRuns.of(base, tuned, prompts, metric, batch_size)
    cells = tuple(cell_of(place) for place in places)
    return WeightRequest(runs, cells, list(places.values()), _asked(tuned, runs, places, cells, anew=anew))


def measured_part(request: WeightRequest, tuned: Any, prompts: Sequence[int], batch_size: int) -> Table:
    """The table of some of the prompts, without the descriptions of cells."""
    start, runs, cost = time.perf_counter(), request.runs.take(prompts, batch_size), Cost()
    shape = len(prompts), len(request.cells)
    values, done = np.full(shape, np.nan), np.zeros(shape, dtype=bool)
    with engine.locked(runs.base), torch.no_grad():
        baselines = _baselines(runs, tuned)
        for jobs, found, spent in _measured(runs, tuned, request.selections, baselines.logits, done.copy()):
            at = tuple(np.array(jobs).T)
            values[at], done[at] = found, True
            cost += spent
    about = Run("weights", time.perf_counter() - start, **cost.as_dict())
    return Table((), values, done, np.ones(shape, dtype=bool), baselines.clean, baselines.corrupted, run=about)


@dataclass(frozen=True)
class _Baselines:
    """The tuned model's logits where the metric reads, `[prompt, vocab]`, and the metric of both models."""

    logits: Tensor
    clean: np.ndarray
    corrupted: np.ndarray


def _baselines(runs: WeightRuns, tuned: Any) -> _Baselines:
    logits, every = _tuned_logits(runs, tuned), range(len(runs.given))
    clean = runs.measured(every, logits, logits)
    corrupted = runs.measured(every, runs.all_logits(unwrap(runs.base)), logits)
    check_baselines(runs.metric, tuned=clean, base=corrupted)
    return _Baselines(logits, clean, corrupted)


def _measured(
    runs: WeightRuns, tuned: Any, places: Sequence[Selection], clean_logits: Tensor, done: np.ndarray
) -> Iterator[tuple[list[Job], list[float], Cost]]:
    """The remaining jobs, with their values and costs."""
    module = unwrap(runs.base)
    for rows in runs.batches():
        if done[rows].all():
            continue
        prefix = Prefix.of(runs.base, lambda rows=rows: runs.logits(module, rows))
        for number, selection in enumerate(places):
            left = [row for row in rows if not done[row, number]]
            if not left:
                continue
            with swap(runs.base, tuned, selection), prefix.before(selection) as skipped:
                logits = runs.logits(module, rows)
            found = dict(zip(rows, runs.measured(rows, logits, clean_logits).tolist(), strict=True))
            spent = runs.cost_model.whole(runs.given, rows, runs.computed(module, rows), skipped)
            yield [(row, number) for row in left], [found[row] for row in left], spent


def _tuned_logits(runs: WeightRuns, tuned: Any) -> Tensor:
    module = unwrap(runs.base)
    if not isinstance(tuned, Mapping):
        return runs.all_logits(unwrap(tuned)).to(next(module.parameters()).device)
    with swap(runs.base, tuned, "full"):
        return runs.all_logits(module)


def _weights_of_sites(base: engine.Model, sites: Paths) -> dict[Path, Selection]:
    """Each single site with its weights."""
    atlas = Atlas.of(base)
    paths = [parse_path(path) for path in ([sites] if isinstance(sites, str | Path) else sites)]
    found = {place: select(base, place, own=True) for path in paths for place in atlas.split(path)}
    if not found:
        raise BadArgument("no sites, so there is nothing to sweep", expected="at least one path")
    return found


def _check_pair(base: engine.Model, tuned: Any, places: Iterable[Selection]) -> None:
    models = {"base": base} if isinstance(tuned, Mapping) else {"base": base, "tuned": tuned}
    for name, model in models.items():
        if any(module.training for module in unwrap(model).modules()):
            raise BadArgument(
                f"the {name} model is in train mode, so dropout would make every run another one",
                write=f"{name}.eval()",
            )
    for selection in places:
        counterpart(base, tuned, regions(base, selection))  # raises if the models do not fit


def _asked(
    tuned: Any, runs: WeightRuns, places: Mapping[Path, Selection], cells: Sequence[Cell], anew: bool
) -> dict[str, Any]:
    base, given = runs.base, runs.given
    atlas = Atlas.of(base)
    name, revision = engine.name_of(base)
    base_parameters = dict(unwrap(base).named_parameters(remove_duplicate=False))
    tuned_parameters = tuned
    if not isinstance(tuned, Mapping):
        tuned_parameters = dict(unwrap(tuned).named_parameters(remove_duplicate=False))
    # For heads that share keys and values, the identity says that only their own weights were swapped.
    own = any(atlas.resolve(place) != selection for place, selection in places.items())
    touched = list(dict.fromkeys(name for selection in places.values() for name in selection))
    return {
        "model": name,
        "revision": revision,
        "weights": engine.weights_digest(base, anew=anew),
        "from": digest_of({name: base_parameters[name] for name in touched}),
        "to": digest_of({name: tuned_parameters[name] for name in touched}),
        "prompts": prompts_record(given),
        "sites": [cell.path for cell in cells],
        "metric": runs.metric.identity,
        "operation": {"name": "swap weights", **({"heads": "own"} if own else {})},
    }
