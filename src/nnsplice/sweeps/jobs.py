"""The cells of a plan: (prompt, target) pairs, stored as ranges of targets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import numpy as np

#: A cell to compute: the numbers of its prompt and its target.
Job = tuple[int, int]


class Jobs(Sequence[Job]):
    """Cells ordered by prompt, then by target, each once.

    >>> from nnsplice.sweeps.jobs import Jobs
    >>> jobs = Jobs.of([(0, 3), (0, 4), (1, 3), (0, 5)])
    >>> jobs, list(jobs[1::2])
    (Jobs(prompt 0: 3-5; prompt 1: 3), [(0, 4), (1, 3)])
    """

    __slots__ = ("_prompts", "_starts", "_stops", "_until")

    def __init__(self, prompts: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> None:
        """Ranges of targets, ordered by prompt and then by their starts; use one of the class methods."""
        self._prompts, self._starts, self._stops = prompts, starts, stops
        #: `[range]`: the number of jobs up to the end of each range.
        self._until = np.cumsum(stops - starts)

    @classmethod
    def of(cls, jobs: Iterable[Job]) -> Jobs:
        """Any cells, in any order."""
        if isinstance(jobs, Jobs):
            return jobs
        pairs = np.array(list(jobs), dtype=np.int64).reshape(-1, 2)
        return cls.of_columns(pairs[:, 0], pairs[:, 1])

    @classmethod
    def of_columns(cls, prompts: np.ndarray, targets: np.ndarray) -> Jobs:
        """The cells with these numbers of prompts and targets, `[job]` each."""
        if not len(prompts):
            empty = np.zeros(0, dtype=np.int32)
            return cls(empty, empty, empty)
        stride = int(targets.max()) + 2  # one more than needed, so that no range continues into the next prompt
        numbers = np.sort(prompts.astype(np.int64) * stride + targets, kind="stable")
        numbers = numbers[np.append(True, np.diff(numbers) > 0)]
        first = np.flatnonzero(np.diff(numbers, prepend=numbers[0] - 2) != 1)
        last = np.append(first[1:], len(numbers)) - 1
        starts, stops = numbers[first] % stride, numbers[last] % stride + 1
        return cls(*(part.astype(np.int32) for part in (numbers[first] // stride, starts, stops)))

    @classmethod
    def of_mask(cls, mask: np.ndarray) -> Jobs:
        """The cells that are true in `[prompt, target]`."""
        return cls.of_columns(*np.nonzero(mask))

    @classmethod
    def of_ranges(cls, ranges: Iterable[Sequence[int]]) -> Jobs:
        """The jobs of these `ranges`."""
        rows = np.array(list(ranges), dtype=np.int32).reshape(-1, 3)
        return cls(rows[:, 0].copy(), rows[:, 1].copy(), rows[:, 2].copy())

    @property
    def ranges(self) -> list[list[int]]:
        """`[prompt, first target, one after the last target]` of each range, as plain data."""
        return np.stack([self._prompts, self._starts, self._stops], 1).tolist()

    @property
    def prompts(self) -> list[int]:
        """The prompts that have a cell here."""
        return np.unique(self._prompts).tolist()

    def columns(self) -> tuple[np.ndarray, np.ndarray]:
        """The numbers of the prompts and of the targets, `[job]` each."""
        sizes = self._stops - self._starts
        within = np.arange(len(self)) - np.repeat(self._until - sizes, sizes)
        return np.repeat(self._prompts, sizes), np.repeat(self._starts, sizes) + within

    def take(self, rows: Sequence[int]) -> Jobs:
        """The cells of these prompts, which are renumbered in this order."""
        lows, highs = (np.searchsorted(self._prompts, rows, side=side) for side in ("left", "right"))
        kept = [np.arange(low, high) for low, high in zip(lows, highs, strict=True)]
        at = np.concatenate(kept) if kept else np.zeros(0, dtype=int)
        new = np.repeat(np.arange(len(rows), dtype=np.int32), [len(some) for some in kept])
        return Jobs(new, self._starts[at], self._stops[at])

    def within(self, start: int, stop: int) -> Jobs:
        """The cells of the targets from `start` up to `stop`."""
        starts, stops = np.maximum(self._starts, start), np.minimum(self._stops, stop)
        kept = starts < stops
        return Jobs(self._prompts[kept], starts[kept].astype(np.int32), stops[kept].astype(np.int32))

    def of_prompts(self, prompts: Sequence[int]) -> Jobs:
        """The cells of these prompts only."""
        kept = np.isin(self._prompts, prompts)
        return Jobs(self._prompts[kept], self._starts[kept], self._stops[kept])

    def of_targets(self, targets: Iterable[int]) -> Jobs:
        """The cells of these targets only."""
        prompts, numbers = self.columns()
        kept = np.isin(numbers, np.fromiter(targets, dtype=np.int64))
        return Jobs.of_columns(prompts[kept], numbers[kept])

    def __len__(self) -> int:
        return int(self._until[-1]) if len(self._until) else 0

    @overload
    def __getitem__(self, index: int) -> Job: ...
    @overload
    def __getitem__(self, index: slice) -> Jobs: ...
    def __getitem__(self, index: int | slice) -> Job | Jobs:
        if isinstance(index, slice):
            prompts, targets = self.columns()
            return Jobs.of_columns(prompts[index], targets[index])
        number = range(len(self))[index]
        at = int(np.searchsorted(self._until, number, side="right"))
        return int(self._prompts[at]), int(self._stops[at] - self._until[at] + number)

    def __iter__(self) -> Iterator[Job]:
        ranges = zip(self._prompts.tolist(), self._starts.tolist(), self._stops.tolist(), strict=True)
        return ((prompt, target) for prompt, start, stop in ranges for target in range(start, stop))

    def __contains__(self, job: object) -> bool:
        if not isinstance(job, tuple) or len(job) != 2:
            return False
        low, high = np.searchsorted(self._prompts, job[0]), np.searchsorted(self._prompts, job[0], side="right")
        at = int(low + np.searchsorted(self._starts[low:high], job[1], side="right")) - 1
        return at >= low and bool(self._starts[at] <= job[1] < self._stops[at])

    def __add__(self, other: Iterable[Job]) -> Jobs:
        """The cells of both."""
        a, b = self.columns(), Jobs.of(other).columns()
        return Jobs.of_columns(*(np.concatenate([x, y]) for x, y in zip(a, b, strict=True)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    def __hash__(self) -> int:
        return hash((self._prompts.tobytes(), self._starts.tobytes(), self._stops.tobytes()))

    def __repr__(self) -> str:
        shown: dict[int, list[str]] = {}
        for prompt, start, stop in self.ranges[:8]:
            shown.setdefault(prompt, []).append(f"{start}" if stop - start == 1 else f"{start}-{stop - 1}")
        text = "; ".join(f"prompt {prompt}: {', '.join(of)}" for prompt, of in shown.items())
        return f"Jobs({text}{'; ...' if len(self._starts) > 8 else ''})"
