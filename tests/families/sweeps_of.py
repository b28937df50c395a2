"""Does a sweep of random sites at random positions give the numbers that plain hooks give, by every executor?"""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor

import nnsplice as ns
from activations.oracle import run, values
from families.build import prompt
from families.subject import Finding, LONG, MIDDLE, SHORT, Subject, gap, site_of
from families.values_of import Served

_SITES = 14


def _along(logits: Tensor) -> Tensor:
    """Where logits point, along a fixed direction of all of them."""
    generator = torch.Generator().manual_seed(5)
    direction = torch.randn(logits.shape[-1], generator=generator, dtype=torch.float64)
    return logits.double() @ (direction / direction.norm())


def judge_sweeps(subject: Subject, served: dict[str, Served]) -> tuple[str, str]:
    """Judge them; which executor `auto` chose, and why no faster one."""
    rng = random.Random(subject.name)
    by_kind = [list(one.values) for one in served.values() if one.values and not one.derived]
    by_kind = [kind for kind in by_kind if str(kind[0]) not in ("unembed.output", "final_norm.output")]
    if not by_kind:
        return "", ""
    chosen = [rng.choice(rng.choice(by_kind)) for _ in range(_SITES)]
    paths = list(dict.fromkeys(str(path.at(rng.randrange(-MIDDLE, MIDDLE))) for path in chosen))
    first = subject.ids[:, :MIDDLE], subject.other[:, :MIDDLE]
    pairs = [first, (subject.ids, subject.other)]
    with subject.check("sweep by auto, first a short prompt"):
        # Whoever has tried a prompt that is shorter than the window knows nothing of longer ones yet.
        short = [str(path.at(-1)) for path in chosen]
        ns.sweep(subject.model, prompt(SHORT), prompt(SHORT, 23), short, ns.Metric.of(_along), progress=False)
    ran, note = "", ""
    for executor in ("auto", "packed"):
        with subject.check(f"sweep by {executor}"):
            clean, corrupted = ([pair[side][0].tolist() for pair in pairs] for side in (0, 1))
            try:
                result = ns.sweep(subject.model, clean, corrupted, paths, ns.Metric.of(_along), executor=executor,
                                  progress=False)  # fmt: skip
            except NotImplementedError as error:  # an executor that was asked for by name says so with this
                subject.findings.append(Finding(f"sweep by {executor}", "refused" if str(error) else "crash", None, str(error)))
                continue
            _compare(subject, result, pairs, executor)
            if executor == "auto":
                ran, note = result.run.executor, result.run.note
    return ran, note


def _compare(subject: Subject, result: ns.SweepResult, pairs: list, executor: str) -> None:
    table = result.table
    worst, where = 0.0, ""
    for row, (clean, corrupted) in enumerate(pairs):
        plain = subject.logits(corrupted)[0, -1]
        size = float(plain.double().abs().max())
        for column, cell in enumerate(table.cells):
            path = ns.parse_path(cell.path)
            (place,) = ns.expand(subject.model, path.place)
            at = path.position
            assert isinstance(at, int)
            source = values(subject.bare, {"input_ids": clean}, [site_of(place)])[site_of(place)]

            def edit(value: Tensor, source: Tensor = source, at: int = at) -> Tensor:
                value[:, at] = source[:, at]
                return value

            truth = float(_along(run(subject.bare, {"input_ids": corrupted}, {site_of(place): edit})[0, -1]))
            found = float(table.values[row, column])
            off = abs(found - truth) / size if np.isfinite(found) else float("inf")
            if off > worst:
                worst, where = off, f"{cell.path} of prompt {row}: {found:.6g} instead of {truth:.6g}"
    off = max(abs(float(table.corrupted[row]) - float(_along(subject.logits(pair[1])[0, -1]))) for row, pair in enumerate(pairs))
    subject.found(f"sweep by {executor}", max(worst, off), where)


__all__ = ["LONG", "gap", "judge_sweeps"]
