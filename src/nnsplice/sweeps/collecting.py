"""The values of a sweep: known ones, those of a journal, and new ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np

from nnsplice import engine
from nnsplice.errors import BadArgument
from nnsplice.metrics import Bound, Several
from nnsplice.progress import bar
from nnsplice.results import Journal
from nnsplice.shown import counted
from nnsplice.sweeps.jobs import Job, Jobs
from nnsplice.warn import warn_caller


@dataclass(frozen=True, eq=False)
class CollectedValues:
    """`[prompt, cell]`: the values, with an axis for several metrics, and which are there."""

    values: np.ndarray
    done: np.ndarray
    log: Journal | None
    shown: Any
    #: The processes that share the model; the first one writes the journal.
    group: engine.ProcessGroup

    def note(self, jobs: Sequence[Job], values: Sequence[Any]) -> None:
        """Add measured values; they are in the journal before the bar moves."""
        for job, value in zip(jobs, values, strict=True):
            self.values[job], self.done[job] = value, True
        self.group.on_first("writing the journal", lambda: self._log(jobs, values))
        self.shown.update(len(jobs))

    def _log(self, jobs: Sequence[Job], values: Sequence[Any]) -> None:
        if self.log is not None:
            # A journal has one number for each cell: several metrics are cells side by side.
            each = np.array(values, dtype=np.float64).reshape(len(jobs), -1)
            prompts, cells = np.array(jobs).reshape(-1, 2).T
            wide = each.shape[1]
            numbers = cells[:, None] * wide + np.arange(wide)
            self.log.append(np.repeat(prompts, wide).tolist(), numbers.reshape(-1).tolist(), each.reshape(-1).tolist())

    def warn_of_nan(self) -> None:
        """Say so where the metric of a cell was no number."""
        lacking = np.isnan(self.values)
        lacking = lacking.any(-1) if lacking.ndim > self.done.ndim else lacking
        if count := int((lacking & self.done).sum()):
            warn_caller(f"the metric was NaN in {counted(count, 'cell')}")


@contextmanager
def collecting(
    shape: tuple[int, int],
    jobs: Jobs,
    asked: Mapping[str, Any],
    journal: str | PathLike[str] | None,
    progress: bool,
    metrics: int = 0,
    group: engine.ProcessGroup | None = None,
) -> Iterator[CollectedValues]:
    """The values of these jobs while a sweep runs, with those that a journal of the same sweep has.

    Args:
        metrics: how many numbers a cell has, where it has several.
        group: the processes that share the model; the first one has the journal and the bar.
    """
    several, wide = ((metrics,) if metrics else ()), metrics or 1
    values, done = np.full((*shape, *several), np.nan), np.zeros(shape, dtype=bool)
    group = group or engine.ProcessGroup()
    log: Journal | None = None
    if journal is not None:
        log = group.on_first("opening the journal", lambda: Journal.open(journal, asked, len(jobs) * wide))
    try:
        for (prompt, number), value in group.broadcast(log.done() if log is not None else {}).items():
            cell = number // wide
            values[(prompt, cell, number % wide) if metrics else (prompt, cell)] = value
            done[prompt, cell] = True
        with bar(
            "sweep", len(jobs), "cell", progress and group.is_first, done=int(done[jobs.columns()].sum())
        ) as shown:
            yield CollectedValues(values, done, log, shown, group)
    finally:
        if log is not None:
            log.close()


def check_baselines(metric: Bound | Several, **unedited: np.ndarray) -> None:
    """Raise where the metric of an unedited run, by its name, is no number."""
    for name, values in unedited.items():
        bad = np.flatnonzero(np.isnan(values.reshape(len(values), -1)).any(1))
        if len(bad):
            raise BadArgument(
                f"{metric.metric.name} of the {name} run is NaN for prompt {', '.join(map(str, bad[:5]))}",
                expected="a metric that is a number for the unedited runs",
            )
