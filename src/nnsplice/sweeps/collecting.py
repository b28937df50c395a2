"""The values of a sweep while it runs: those of its journal, and new ones."""

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
    """The values `[prompt, cell]` or `[prompt, cell, metric]`, and whether each cell is done `[prompt, cell]`."""

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
            # A journal has one number per cell, so each of several metrics counts as a cell: cell * metrics + metric.
            each = np.array(values, dtype=np.float64).reshape(len(jobs), -1)
            prompts, cells = np.array(jobs).reshape(-1, 2).T
            per_cell = each.shape[1]
            numbers = cells[:, None] * per_cell + np.arange(per_cell)
            self.log.append(
                np.repeat(prompts, per_cell).tolist(), numbers.reshape(-1).tolist(), each.reshape(-1).tolist()
            )

    def warn_of_nan(self) -> None:
        """Warn of cells whose metric is NaN."""
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
    """Collect the values of these jobs, starting with those in the journal of the same sweep.

    Args:
        metrics: the number of metrics; 0 for a single one, without an axis.
        group: the processes that share the model; the first one has the journal and the bar.
    """
    several, per_cell = ((metrics,) if metrics else ()), metrics or 1
    values, done = np.full((*shape, *several), np.nan), np.zeros(shape, dtype=bool)
    group = group or engine.ProcessGroup()
    log: Journal | None = None
    if journal is not None:
        log = group.on_first("opening the journal", lambda: Journal.open(journal, asked, len(jobs) * per_cell))
    try:
        for (prompt, number), value in group.broadcast(log.done() if log is not None else {}).items():
            cell = number // per_cell
            values[(prompt, cell, number % per_cell) if metrics else (prompt, cell)] = value
            done[prompt, cell] = True
        with bar(
            "sweep", len(jobs), "cell", progress and group.is_first, done=int(done[jobs.columns()].sum())
        ) as shown:
            yield CollectedValues(values, done, log, shown, group)
    finally:
        if log is not None:
            log.close()


def check_baselines(metric: Bound | Several, **unedited: np.ndarray) -> None:
    """Raise where the metric of an unedited run is NaN; `unedited` has the values of each run by its name."""
    for name, values in unedited.items():
        bad = np.flatnonzero(np.isnan(values.reshape(len(values), -1)).any(1))
        if len(bad):
            raise BadArgument(
                f"{metric.metric.name} of the {name} run is NaN for prompt {', '.join(map(str, bad[:5]))}",
                expected="a metric that is a number for the unedited runs",
            )
