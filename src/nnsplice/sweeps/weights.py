"""`sweep_weights`: what of a change of weights changes the answer? The weight analogue of a patching sweep.

For each place the base model runs with the tuned model's weights there, and its own everywhere else. The two ends of
the scale are the base model (`corrupted`) and the tuned model (`clean`), so an effect of 1 is all that tuning did.
"""

from __future__ import annotations

import hashlib
import inspect
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nnsplice import engine
from nnsplice.activations.prompts import Prompts, PromptsLike, encode
from nnsplice.atlas import Atlas, Selection, peel
from nnsplice.errors import BadArgument, circumstances
from nnsplice.metrics import Bound, Metric, MetricLike
from nnsplice.paths import Path, Slice, parse_path
from nnsplice.results import AXES, Cell, Journal, Run, SweepResult, Table
from nnsplice.sweeps.prefix import Prefix
from nnsplice.weights import swap
from nnsplice.weights.regions import counterpart, regions

Sites = str | Path | Iterable[str | Path]


def sweep_weights(
    base: Any,
    tuned: Any,
    sites: Sites,
    metric: MetricLike,
    prompts: PromptsLike,
    *,
    batch_size: int | None = None,
    journal: str | PathLike[str] | None = None,
    progress: bool = True,
) -> SweepResult:
    """Give the base model the tuned model's weights at every place by itself, and record the metric.

    >>> import copy
    >>> tuned = copy.deepcopy(model._module)
    >>> with torch.no_grad():
    ...     _ = tuned.transformer.h[1].attn.c_proj.weight.mul_(2.0)
    >>> metric = ns.logit_diff("w7", "w8")
    >>> result = ns.sweep_weights(model, tuned, "layers[:].attn", metric, "w3 w4 w5", progress=False)
    >>> result.effect().sel(prompt=0).values.tolist()
    [0.0, 1.0, 0.0]

    Where heads share a key/value head, each head brings it along.

    Args:
        base: the model that runs; between the runs it has its own weights, to the bit.
        tuned: a model of the same shape, or a mapping from parameter names to tensors.
        sites: addresses of weights: `"layers[:].heads[:]"`, `"layers[:].mlp"`, `["embed", "layers[:]"]`.
        metric: `ns.logit_diff(answer, wrong)`, another metric, or a function `logits[row, vocab] -> [row]`.
        prompts: texts or token ids.
        batch_size: how many prompts run at once; all of one length, if left out.
        journal: a file that every finished cell is appended to; the same call after a stop goes on from there.
        progress: show a bar.
    """
    base = engine.as_model(base)
    start = time.perf_counter()
    with circumstances("ns.sweep_weights"), torch.no_grad():
        if batch_size is not None and batch_size < 1:
            raise BadArgument(f"batch_size={batch_size}", expected="at least 1")
        places = _places(base, sites)
        _check_pair(base, tuned, places.values())
        runs = _Runs.of(base, prompts, metric, batch_size)
        clean_logits, every = _tuned_logits(runs, tuned), range(len(runs.given))
        clean = runs.measured(every, clean_logits, clean_logits)
        corrupted = runs.measured(every, runs.all_logits(peel(base)), clean_logits)
        _check_ends(runs.metric, clean, corrupted)
    cells = tuple(_cell(place) for place in places)
    asked = _asked(tuned, runs, places, cells)
    values = np.full((len(every), len(cells)), np.nan)
    done = np.zeros(values.shape, dtype=bool)
    forwards = block_calls = 0
    with ExitStack() as stack:
        log = None if journal is None else stack.enter_context(Journal.open(journal, asked, values.size))
        for at, value in (log.done() if log is not None else {}).items():
            values[at], done[at] = value, True
        bar = stack.enter_context(_bar(values.size, int(done.sum()), progress))
        stack.enter_context(torch.no_grad())
        for rows, number, found, blocks in _measured(runs, tuned, list(places.values()), clean_logits, done):
            values[rows, number], done[rows, number] = found, True
            if log is not None:
                log.append(rows, [number] * len(rows), found)
            forwards, block_calls = forwards + 1, block_calls + blocks
            bar.update(len(rows))
    about = Run("weights", time.perf_counter() - start, forwards=forwards, block_calls=block_calls)
    exists = np.ones(values.shape, dtype=bool)
    return SweepResult(Table(cells, values, done, exists, clean, corrupted, runs.tokens, asked, about))


def _measured(
    runs: _Runs, tuned: Any, places: Sequence[Selection], clean_logits: Tensor, done: np.ndarray
) -> Iterator[tuple[list[int], int, list[float], int]]:
    """What is not done: prompts, the number of the place, their values, and how many blocks ran for that."""
    module = peel(runs.base)
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
            yield left, number, [found[row] for row in left], runs.n_blocks - skipped


@dataclass(frozen=True)
class _Runs:
    """Forward passes of some prompts, and what the metric makes of them."""

    base: engine.Model
    given: Prompts
    metric: Bound
    batch_size: int | None
    #: What every call is given beside the prompts.
    arguments: Mapping[str, Any]

    @classmethod
    def of(cls, base: engine.Model, prompts: Any, metric: Any, batch_size: int | None) -> _Runs:
        given = encode(base, prompts)
        if given.values is not None:
            raise BadArgument("a sweep is over tokens, and these prompts are values", expected="texts or token ids")
        bound = Metric.of(metric).bind(engine.tokenizer_of(base), len(given))
        taken = inspect.signature(type(peel(base)).forward).parameters
        return cls(base, given, bound, batch_size, {"use_cache": False} if "use_cache" in taken else {})

    @property
    def n_blocks(self) -> int:
        return sum(tower.n_layers for tower in Atlas.of(self.base).towers.values())

    @property
    def tokens(self) -> tuple[tuple[str, ...], ...]:
        """The prompts' tokens as texts."""
        tokenizer = engine.tokenizer_of(self.base)
        ids = self.given.decoder_ids or self.given.ids
        return tuple(tuple(str(i) if tokenizer is None else tokenizer.decode([i]) for i in row) for row in ids)

    def batches(self) -> list[list[int]]:
        return self.given.batches(self.batch_size)

    def logits(self, module: Any, rows: Sequence[int]) -> Tensor:
        """`[row, vocab]`, at the position that the metric reads."""
        inputs = self.given.inputs(rows, next(module.parameters()).device)
        assert isinstance(inputs, Mapping)
        length = self.given.lengths("decoder")[rows[0]]
        at = self.metric.metric.position % length - length
        logits = module(**inputs, **self.arguments)
        logits = logits.logits if hasattr(logits, "logits") else logits[0]
        return logits[:, at].clone()

    def all_logits(self, module: Any) -> Tensor:
        """The same of every prompt, in their order."""
        found: dict[int, Tensor] = {}
        for rows in self.batches():
            found |= dict(zip(rows, self.logits(module, rows), strict=True))
        return torch.stack([found[row] for row in range(len(self.given))])

    def measured(self, rows: Sequence[int], logits: Tensor, reference: Tensor) -> np.ndarray:
        compared = reference[list(rows)] if self.metric.metric.compares else None
        return self.metric(logits, rows, compared).double().cpu().numpy()


def _tuned_logits(runs: _Runs, tuned: Any) -> Tensor:
    module = peel(runs.base)
    if not isinstance(tuned, Mapping):
        return runs.all_logits(peel(tuned)).to(next(module.parameters()).device)
    with swap(runs.base, tuned, "full"):
        return runs.all_logits(module)


def _places(base: engine.Model, sites: Sites) -> dict[Path, Selection]:
    """Every single place with its weights."""
    atlas = Atlas.of(base)
    paths = [parse_path(path) for path in ([sites] if isinstance(sites, str | Path) else sites)]
    found = {place: atlas.resolve(place) for path in paths for place in atlas.split(path)}
    if not found:
        raise BadArgument("no sites, so there is nothing to sweep", expected="at least one path")
    return found


def _cell(place: Path) -> Cell:
    numbers = {step.name.removesuffix("s"): step.index for step in place.steps if isinstance(step.index, int)}
    open_ = tuple(replace(step, index=None if step.index is None else Slice()) for step in place.steps)
    known: dict[str, Any] = {axis: numbers.get(axis) for axis in AXES}
    if place.native:  # a native path counts its layers by whatever list they stand in
        known["layer"] = next(iter(numbers.values()), None)
    return Cell(str(place), str(replace(place, steps=open_)), **known)


def _check_pair(base: engine.Model, tuned: Any, places: Iterable[Selection]) -> None:
    models = {"base": base} if isinstance(tuned, Mapping) else {"base": base, "tuned": tuned}
    for name, model in models.items():
        if any(module.training for module in peel(model).modules()):
            raise BadArgument(
                f"the {name} model is in train mode, so dropout would make every run another one",
                write=f"{name}.eval()",
            )
    for selection in places:
        counterpart(base, tuned, regions(base, selection))  # raises where the two do not fit


def _check_ends(metric: Bound, clean: np.ndarray, corrupted: np.ndarray) -> None:
    for name, values in (("tuned", clean), ("base", corrupted)):
        bad = np.flatnonzero(np.isnan(values))
        if len(bad):
            raise BadArgument(
                f"{metric.metric.name} of the {name} model is NaN for prompt {', '.join(map(str, bad[:5]))}",
                expected="a metric that is a number for both models",
            )


def _asked(tuned: Any, runs: _Runs, places: Mapping[Path, Selection], cells: Sequence[Cell]) -> dict[str, Any]:
    base, given = runs.base, runs.given
    name, revision = engine.name_of(base)
    held = dict(peel(base).named_parameters(remove_duplicate=False))
    other = dict(tuned) if isinstance(tuned, Mapping) else dict(peel(tuned).named_parameters(remove_duplicate=False))
    touched = list(dict.fromkeys(name for selection in places.values() for name in selection))
    return {
        "model": name,
        "revision": revision,
        "weights": engine.weights_digest(base),
        "from": _digest(held[name] for name in touched),
        "to": _digest(other[name] for name in touched),
        "prompts": {
            "tokens": [list(row) for row in given.ids],
            "decoder": None if given.decoder_ids is None else [list(row) for row in given.decoder_ids],
        },
        "sites": [cell.path for cell in cells],
        "metric": runs.metric.identity,
        "operation": {"name": "swap weights"},
    }


def _digest(tensors: Iterable[Tensor]) -> str:
    """All of the numbers, as tuned models may differ in few of them."""
    summed = hashlib.sha256()
    for tensor in tensors:
        summed.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
        summed.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return summed.hexdigest()[:16]


def _bar(total: int, done: int, progress: bool) -> Any:
    from tqdm.auto import tqdm

    return tqdm(total=total, initial=done, desc="sweep", unit="cell", disable=not progress)
