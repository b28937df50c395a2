"""Cuts of a plan into units: several short prompts, one prompt, or some layers of a long prompt."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class PlanPiece:
    """Some prompts with all their cells, or one prompt with the targets from `start` up to `stop`."""

    prompts: tuple[int, ...]
    start: int = 0
    stop: int | None = None


def pieces(
    lengths: Sequence[int], unedited: np.ndarray, totals: np.ndarray, each: Callable[[int], np.ndarray], size: float
) -> list[PlanPiece]:
    """Cut prompts into pieces of about one size; the longest prompts first, so that the last units are short ones.

    Args:
        lengths: `[prompt]`, in tokens.
        unedited: `[prompt]`, the cost of its runs without an edit, which every piece of the prompt repeats.
        totals: `[prompt]`, the cost of all of its cells.
        each: a function of a prompt: the cost of each of its cells, `[target]`, in execution order.
    """
    found: list[PlanPiece] = []
    together: list[int] = []
    filled = 0.0
    for prompt in sorted(range(len(lengths)), key=lambda prompt: (-lengths[prompt], prompt)):
        total = float(totals[prompt])
        if total > size:
            found += [PlanPiece((prompt,), start, stop) for start, stop in _stretches(each(prompt), total, size)]
            continue
        total += float(unedited[prompt])
        if together and filled + total > size:
            found.append(PlanPiece(tuple(together)))
            together, filled = [], 0.0
        together.append(prompt)
        filled += total
    return [*found, PlanPiece(tuple(together))] if together else found


def _stretches(costs: np.ndarray, total: float, size: float) -> list[tuple[int, int | None]]:
    """Ranges of targets of about equal cost; the last one is open, so that no target is left out."""
    parts = min(math.ceil(total / size), max(int(np.count_nonzero(costs)), 1))
    until = np.cumsum(costs)
    bounds = np.searchsorted(until, until[-1] * np.arange(1, parts) / parts, side="left") + 1 if len(costs) else []
    starts = [0, *dict.fromkeys(int(bound) for bound in bounds if bound < len(costs))]
    return list(zip(starts, [*starts[1:], None], strict=True))
