"""A sweep before it runs: pure data that can be counted, looked at, split and run elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from nnsplice.activations.prompts import Prompts
from nnsplice.activations.saved_activation import SavedActivation
from nnsplice.errors import BadArgument
from nnsplice.metrics import Bound, Several
from nnsplice.paths import Slice, Span
from nnsplice.shown import counted
from nnsplice.sweeps.cells import Part, Target, has_tokens, own_tokens
from nnsplice.sweeps.operations import Operation
from nnsplice.sweeps.targets import Corruption

#: One thing to run: the number of the prompt and of the target.
Job = tuple[int, int]


@dataclass(frozen=True)
class Plan:
    """The cells that `ns.run` will compute, as plain data without a reference to the model.

    >>> plan = ns.plan_sweep(model, "w3 w4 w5", "w3 w6 w5", "layers[:].output[:]", ns.logit_diff("w7", "w8"))
    >>> len(plan)     # of nine sites the first token's cannot differ, and the last layer matters at the last token only
    5
    >>> len(plan.shard(0, 2)), len(plan.shard(1, 2))
    (3, 2)

    Attributes:
        corrupted: the prompts that are edited.
        clean: the prompts that values are taken from, or None.
        targets: the cells, in execution order.
        metric: the metric, with its answers as token ids.
        operation: the operation.
        reference: the capture that values are taken from, or None.
        align: how tokens of a pair correspond.
        seed: the seed of `"resample"` and `"noise"`.
        jobs: the (prompt, target) pairs to compute.
        known: the pairs that have the corrupted run's value.
        asked: the question as plain data.
        corruption: a change of the embeddings in every edited run, or None.
        tokens: the texts of each prompt's tokens.
        owners: for answers of several tokens, the prompt of each run.
        appended: for answers of several tokens, how many of them are appended in each run.
    """

    corrupted: Prompts
    #: None for an operation that takes nothing from another run.
    clean: Prompts | None
    targets: tuple[Target, ...]
    metric: Bound | Several
    operation: Operation
    reference: SavedActivation | None
    align: str
    seed: int
    #: What has to be computed, and what is known to be the corrupted run's value.
    jobs: tuple[Job, ...]
    known: tuple[Job, ...]
    asked: Mapping[str, Any] = field(repr=False)
    corruption: Corruption | None = field(default=None, repr=False)
    #: Texts of the tokens that positions count, per prompt.
    tokens: tuple[tuple[str, ...], ...] = field(default=(), repr=False)
    #: Where an answer has several tokens, `corrupted` and `clean` hold a run for each of them: which prompt it is of,
    #: and how many of the answer's tokens are appended to that. Empty where each prompt is a run.
    owners: tuple[int, ...] = ()
    appended: tuple[int, ...] = ()

    def __len__(self) -> int:
        """The number of cells to compute."""
        return len(self.jobs)

    @property
    def prompts(self) -> int:
        """The number of prompts."""
        return max(self.owners) + 1 if self.owners else len(self.corrupted)

    def preview(self, n: int = 10) -> str:
        """The first cells, and how many are computed and how many known in advance.

        Args:
            n: how many cells are listed.

        Returns:
            A text of one line for each cell.
        """
        lines = [
            f"{counted(len(self.jobs), 'cell')} to compute, {len(self.known)} known without; "
            f"{counted(self.prompts, 'prompt')}, {self.operation.name}, "
            f"{self.metric.metric.name}"
        ]
        some = [(self.owners[run] if self.owners else run, target) for run, target in self.jobs[:n]]
        lines += [f"  prompt {prompt}  {self.targets[target].cell.path}" for prompt, target in some]
        if len(self.jobs) > n:
            lines.append(f"  ... and {len(self.jobs) - n} more")
        return "\n".join(lines)

    def shard(self, i: int, n: int) -> Plan:
        """Every n-th cell from the i-th on, to split a sweep between n machines.

        Args:
            i: the number of the shard, from 0.
            n: how many shards there are.

        Returns:
            A plan with these cells; `SweepResult.merge` joins the results.

        Raises:
            BadArgument: not `0 <= i < n`.
        """
        if not (isinstance(i, int) and isinstance(n, int) and 0 <= i < n):
            raise BadArgument(f"shard({i}, {n})", expected="shard(i, n) with 0 <= i < n")
        if not self.owners:
            return replace(self, jobs=self.jobs[i::n], known=self.known[i::n])
        # The runs of a cell stay together, as its value is their sum.
        cells = list(dict.fromkeys((self.owners[run], target) for run, target in (*self.jobs, *self.known)))
        mine = set(cells[i::n])
        jobs, known = (
            tuple(job for job in some if (self.owners[job[0]], job[1]) in mine) for some in (self.jobs, self.known)
        )
        return replace(self, jobs=jobs, known=known)

    def shared_start(self, target: Target, prompt: int) -> int:
        """The number of leading tokens that both prompts of a pair share; patching there changes nothing.

        0 for anything but a patch between a pair.

        Args:
            target: the cell.
            prompt: the number of the pair.

        Returns:
            The number of tokens.
        """
        if self.operation.name != "patch" or self.clean is None or self.align != "position":
            return 0
        if self.clean.spans != self.corrupted.spans and any(isinstance(part.position, Span) for part in target.parts):
            return 0
        pair = zip(self.clean.ids[prompt], self.corrupted.ids[prompt], strict=True)
        first = next((position for position, (a, b) in enumerate(pair) if a != b), len(self.corrupted.ids[prompt]))
        return min([first, *(self.corruption.positions[prompt] if self.corruption is not None else ())])

    def exists(self) -> np.ndarray:
        """Whether each prompt is long enough for each cell: `[prompt, target]`."""
        found = np.ones((len(self.corrupted), len(self.targets)), dtype=bool)
        for number, target in enumerate(self.targets):
            for prompt in range(len(found)):
                found[prompt, number] = self.has(target, prompt)
        return found

    def has(self, target: Target, prompt: int) -> bool:
        """Whether a prompt has the tokens of a cell, and the other prompt of the pair their counterparts.

        Args:
            target: the cell.
            prompt: the number of the prompt.

        Returns:
            True or False.
        """
        return all(self._has(part, prompt) for part in target.parts)

    def _has(self, part: Part, prompt: int) -> bool:
        length, position = self._own(part, prompt), part.position
        if not has_tokens(position, length) or not has_tokens(part.key, length):
            return False
        if not isinstance(position, int | Slice):
            return True
        tokens = own_tokens(position, self.corrupted, prompt, length)
        return all(self._partner(part, prompt, token) is not None for token in tokens)

    def _own(self, part: Part, prompt: int) -> int:
        """How many tokens a prompt has that positions count; what is appended of its answer is none of them."""
        length = self.corrupted.lengths(part.tower)[prompt]
        return length - self.appended[prompt] if self.appended else length

    def _partner(self, part: Part, prompt: int, token: int) -> int | None:
        """The clean prompt's token that an edited one's corresponds to, where values come from there."""
        if self.clean is None or self.align == "position" or self.operation.name != "patch":
            return token
        if self.align == "role":
            return partner(self.corrupted, self.clean, prompt, token)
        found = token + self.clean.lengths(part.tower)[prompt] - self.corrupted.lengths(part.tower)[prompt]
        return found if found >= 0 else None

    def positions(self, part: Part, prompt: int, *, of_clean: bool = False) -> list[int]:
        """The tokens of a prompt that a cell changes.

        Args:
            part: the site and position.
            prompt: the number of the prompt.
            of_clean: their counterparts in the clean prompt instead.

        Returns:
            The positions.
        """
        prompts = self.clean if of_clean and self.clean is not None else self.corrupted
        # All tokens are also those that are appended of an answer.
        every = part.position is None
        length = self.corrupted.lengths(part.tower)[prompt] if every else self._own(part, prompt)
        own = own_tokens(part.position, prompts, prompt, length)
        if isinstance(part.position, Span):
            return own
        pairs = [(token, self._partner(part, prompt, token)) for token in own]
        return [there if of_clean else token for token, there in pairs if there is not None]

    def edges(self, part: Part, prompt: int) -> list[tuple[int, int]]:
        """The (query, key) pairs that a knockout removes.

        Args:
            part: the site and positions.
            prompt: the number of the prompt.

        Returns:
            The pairs.
        """
        assert part.key is not None
        keys = own_tokens(part.key, self.corrupted, prompt, self._own(part, prompt))
        return [(query, key) for query in self.positions(part, prompt) for key in keys]


def partner(edited: Prompts, source: Prompts, prompt: int, token: int) -> int | None:
    """The token of the other prompt that is by its subject what this one is by its own; None where there is none."""
    assert edited.spans is not None and source.spans is not None
    here, there = (
        _stretches(*prompts.spans["subject"][prompt], len(prompts.ids[prompt]))  # type: ignore[index]
        for prompts in (edited, source)
    )
    for (start, stop), (first, last) in zip(here, there, strict=True):
        if start <= token < stop:
            return first + token - start if stop - start == last - first else None
    return None


def _stretches(start: int, stop: int, length: int) -> list[tuple[int, int]]:
    """Before the subject, its first token, those between, its last, the first after it, those between, the last."""
    after, end = min(stop + 1, length - 1), length - 1
    inner = min(start + 1, stop - 1)
    return [
        (0, start), (start, inner), (inner, stop - 1), (stop - 1, stop),
        (stop, max(after, stop)), (max(after, stop), max(end, stop)), (max(end, stop), length),
    ]  # fmt: skip
