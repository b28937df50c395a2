"""Timing several ways of doing the same thing: CPU seconds of this process, rounds interleaved, medians, ratios.

A shared machine makes wall time a lottery. CPU time of one process is steadier, and interleaving the ways round by
round lets whatever disturbs one of them disturb the others too.
"""

from __future__ import annotations

import gc
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Times:
    """CPU milliseconds of each way, one number a round."""

    rounds: Mapping[str, list[float]]

    def median(self, way: str) -> float:
        """The middle round."""
        return statistics.median(self.rounds[way])

    def ratio(self, way: str, base: str) -> float:
        """How many times the CPU time of `base` a way takes: the median of the rounds' own ratios."""
        return statistics.median(a / b for a, b in zip(self.rounds[way], self.rounds[base], strict=True))


def race(ways: Mapping[str, Callable[[], object]], *, rounds: int, repeats: int) -> Times:
    """Time the ways, each `repeats` times a round, after two rounds that do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 2):
        # Turned by one each round, so that no way always comes after the same other.
        names = list(ways)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            gc.collect()
            start = time.process_time()
            for _ in range(repeats):
                ways[name]()
            spent = (time.process_time() - start) / repeats
            if number >= 2:
                seconds[name].append(spent * 1000)
    return Times(seconds)


def table(times: Times, base: str) -> str:
    """The medians, and each way's ratio to `base`."""
    width = max(map(len, times.rounds))
    lines = [f"{'':{width}}  {'cpu ms':>9}  {'x':>6}"]
    for name in times.rounds:
        lines.append(f"{name:{width}}  {times.median(name):9.3f}  {times.ratio(name, base):6.3f}")
    return "\n".join(lines)


def machine() -> str:
    """What the numbers were measured on."""
    import nnsight
    import torch
    import transformers

    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, nnsight {nnsight.__version__}"
    return f"{platform.machine()}, {torch.get_num_threads()} thread, Python {sys.version.split()[0]}, {versions}"
