"""Does a sweep of random sites at random positions give the numbers that plain hooks give, by every executor?"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import nnsplice as ns
from activations.oracle import run, values
from families.build import prompt
from families.subject import MIDDLE, SHORT, Finding, Subject, own, site_of
from families.values_of import Served

_SITES = 14


def _along(logits: Tensor) -> Tensor:
    """Where logits point, along a fixed direction of all of them."""
    generator = torch.Generator().manual_seed(5)
    direction = torch.randn(logits.shape[-1], generator=generator, dtype=torch.float64)
    return logits.double() @ (direction / direction.norm())


def judge_sweeps(subject: Subject, served: dict[str, Served], executors: tuple[str, ...]) -> tuple[str, str]:
    """Judge them; which executor ran last, and why no faster one."""
    rng = random.Random(subject.name)
    by_kind = [list(one.values) for one in served.values() if one.values and not one.derived]
    by_kind = [kind for kind in by_kind if str(kind[0]) not in ("unembed.output", "final_norm.output")]
    if not by_kind:
        return "", ""
    chosen = [rng.choice(rng.choice(by_kind)) for _ in range(_SITES)]
    asked = dict.fromkeys((place, rng.randrange(-MIDDLE, MIDDLE)) for place in chosen)
    pairs = [(subject.ids[:, :MIDDLE], subject.other[:, :MIDDLE]), (subject.ids, subject.other)]
    truth = [_truths(subject, list(asked), clean, corrupted) for clean, corrupted in pairs]
    clean, corrupted = ([pair[side][0].tolist() for pair in pairs] for side in (0, 1))
    paths, metric = [str(place.at(at)) for place, at in asked], ns.Metric.of(_along)
    ran = note = ""
    for executor in executors:
        check = f"sweep by {executor}{' in float32' if subject.dtype == torch.float32 else ''}"
        with subject.check(check):
            try:
                if executor == "auto":
                    # Whoever has tried a prompt that is shorter than the window knows nothing of longer ones yet.
                    short = [str(place.at(-1)) for place in chosen]
                    ns.sweep(subject.model, prompt(SHORT), prompt(SHORT, 23), short, metric, progress=False)
                result = ns.sweep(subject.model, clean, corrupted, paths, metric, executor=executor, progress=False)
            except NotImplementedError as error:  # an executor that was asked for by its name says so with this
                reason = str(error).partition("\n")[0].removeprefix("packed rows do not give this job's numbers: ")
                subject.findings.append(Finding(check, "refused" if reason else "crash", None, reason))
                continue
            subject.found(check, *_compare(result, truth))
            ran, note = result.run.executor, result.run.note
    return ran, note


@dataclass(frozen=True)
class _Truth:
    """What plain hooks make of one pair: the metric of every cell by its path, "" for the run without a change."""

    cells: dict[str, float]
    #: The largest logit, which errors are relative to.
    size: float


def _truths(subject: Subject, asked: list[tuple[ns.Path, int]], clean: Tensor, corrupted: Tensor) -> _Truth:
    length = clean.shape[1]
    source = values(subject.bare, {"input_ids": clean}, list(dict.fromkeys(site_of(place) for place, _ in asked)))

    def patched(place: ns.Path, at: int) -> Tensor:
        def edit(value: Tensor) -> Tensor:
            own(value, length)[:, at] = own(source[site_of(place)], length)[:, at]
            return value

        return run(subject.bare, {"input_ids": corrupted}, {site_of(place): edit})

    plain = subject.logits(corrupted)
    found = {str(place.at(at)): float(_along(patched(place, at)[0, -1])) for place, at in asked}
    found[""] = float(_along(plain[0, -1]))
    return _Truth(found, float(plain[0, -1].double().abs().max()))


def _compare(result: ns.SweepResult, truth: list[_Truth]) -> tuple[float, str]:
    """The cell that is farthest off."""
    worst, where = 0.0, ""
    for row, expected in enumerate(truth):
        cells = {cell.path: float(result.table.values[row, column]) for column, cell in enumerate(result.table.cells)}
        for path, value in {**cells, "": float(result.table.corrupted[row])}.items():
            off = abs(value - expected.cells[path]) / expected.size if np.isfinite(value) else float("inf")
            if off > worst:
                worst, where = (
                    off,
                    f"{path or 'no change'} of prompt {row}: {value:.6g}, not {expected.cells[path]:.6g}",
                )
    return worst, where
