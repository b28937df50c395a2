"""The values of a sweep as they come in: what is known without, what a journal holds, and what is measured now."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np

from nnsplice.errors import BadArgument
from nnsplice.metrics import Bound
from nnsplice.progress import bar
from nnsplice.results import Journal
from nnsplice.sweeps.plan import Job


@dataclass(frozen=True, eq=False)
class Ledger:
    """`[prompt, cell]`: the values, and which are there."""

    values: np.ndarray
    done: np.ndarray
    log: Journal | None
    shown: Any

    def note(self, jobs: Sequence[Job], values: Sequence[float]) -> None:
        """Write down what was measured; it is in the journal before the bar moves."""
        for job, value in zip(jobs, values, strict=True):
            self.values[job], self.done[job] = value, True
        if self.log is not None:
            self.log.append([prompt for prompt, _ in jobs], [cell for _, cell in jobs], values)
        self.shown.update(len(jobs))

    def warn_of_nan(self) -> None:
        """Say so where the metric of a cell was no number."""
        if count := int(np.isnan(self.values[self.done]).sum()):
            warnings.warn(f"the metric was NaN in {count} cells", stacklevel=3)


@contextmanager
def ledger(
    shape: tuple[int, int],
    jobs: Iterable[Job],
    asked: Mapping[str, Any],
    journal: str | PathLike[str] | None,
    progress: bool,
) -> Iterator[Ledger]:
    """A ledger for these jobs, with all that a journal of the same question has of them."""
    values, done, wanted = np.full(shape, np.nan), np.zeros(shape, dtype=bool), set(jobs)
    log = None if journal is None else Journal.open(journal, asked, len(wanted))
    try:
        for job, value in (log.done() if log is not None else {}).items():
            values[job], done[job] = value, True
        with bar("sweep", len(wanted), "cell", progress, done=sum(bool(done[job]) for job in wanted)) as shown:
            yield Ledger(values, done, log, shown)
    finally:
        if log is not None:
            log.close()


def check_baselines(metric: Bound, **unedited: np.ndarray) -> None:
    """Raise where the metric of an unedited run, by its name, is no number."""
    for name, values in unedited.items():
        bad = np.flatnonzero(np.isnan(values))
        if len(bad):
            raise BadArgument(
                f"{metric.metric.name} of the {name} run is NaN for prompt {', '.join(map(str, bad[:5]))}",
                expected="a metric that is a number for the unedited runs",
            )
