"""The cells of a plan, and the tokens that each cell changes in each prompt."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from nnsplice.activations.prompts import Prompts
from nnsplice.activations.saved_activation import SavedActivation
from nnsplice.metrics import Bound, Several
from nnsplice.paths import Slice, Span
from nnsplice.sweeps.corruption import Corruption
from nnsplice.sweeps.jobs import Jobs
from nnsplice.sweeps.operations import Operation
from nnsplice.sweeps.role_alignment import partner
from nnsplice.sweeps.targets import Target, TargetPart, has_tokens, own_tokens


@dataclass(frozen=True, repr=False)
class PlannedCells:
    """The fields of a `Plan`, documented there, and properties of its cells."""

    corrupted: Prompts
    clean: Prompts | None
    targets: tuple[Target, ...]
    metric: Bound | Several
    operation: Operation
    reference: SavedActivation | None
    align: str
    seed: int
    jobs: Jobs
    known: Jobs
    asked: Mapping[str, Any] = field(repr=False)
    corruption: Corruption | None = field(default=None, repr=False)
    tokens: tuple[tuple[str, ...], ...] = field(default=(), repr=False)
    owners: tuple[int, ...] = ()
    appended: tuple[int, ...] = ()
    foreign: bool = False
    numbers: tuple[int, ...] = ()
    of: int = 0

    def __post_init__(self) -> None:
        # Given as any (prompt, target) pairs, in any order.
        object.__setattr__(self, "jobs", Jobs.of(self.jobs))
        object.__setattr__(self, "known", Jobs.of(self.known))

    @property
    def prompts(self) -> int:
        """The number of prompts."""
        return max(self.owners) + 1 if self.owners else len(self.corrupted)

    @property
    def runs(self) -> int:
        """The number of runs of the whole plan."""
        return self.of or len(self.corrupted)

    def number(self, run: int) -> int:
        """The number of a run in the whole plan.

        Args:
            run: its index here.
        """
        return self.numbers[run] if self.numbers else run

    @cached_property
    def runs_of(self) -> list[list[int]]:
        """The runs of each prompt: several if its answer has several tokens."""
        if not self.owners:
            return [[run] for run in range(len(self.corrupted))]
        found: list[list[int]] = [[] for _ in range(self.prompts)]
        for run, owner in enumerate(self.owners):
            found[owner].append(run)
        return found

    def shared_start(self, target: Target, prompt: int) -> int:
        """The number of leading tokens that both prompts of a pair share; patching there changes nothing.

        0 for anything but a patch between a pair.

        Args:
            target: the cell.
            prompt: the number of the pair.
        """
        start = self._starts[prompt]
        if start and self._spans_differ and any(isinstance(part.position, Span) for part in target.parts):
            return 0
        return start

    @cached_property
    def _starts(self) -> list[int]:
        """`[prompt]`: the number of leading tokens that both runs of a pair share."""
        if self.operation.name != "patch" or self.clean is None or self.align != "position" or self.foreign:
            return [0] * len(self.corrupted)
        changed = self.corruption.positions if self.corruption is not None else ((),) * len(self.corrupted)
        each = [self.clean.shared_start(self.corrupted, row) for row in range(len(self.corrupted))]
        return [min([start, *tokens]) for start, tokens in zip(each, changed, strict=True)]

    @cached_property
    def _spans_differ(self) -> bool:
        return self.clean is not None and self.clean.spans != self.corrupted.spans

    @cached_property
    def alike(self) -> list[list[int]]:
        """Groups of prompts that have the same tokens at every target.

        Planning computes once per group and entry of `positions_alike`, so its time grows with the number of different
        lengths and spans, and not with the number of cells.
        """
        positions = [at for target in self.targets for part in target.parts for at in (part.position, part.key)]
        names = {at.name for at in positions if isinstance(at, Span)} | ({"subject"} if self.align == "role" else set())
        both = [prompts for prompts in (self.corrupted, self.clean) if prompts is not None]
        columns: list[Sequence[Hashable]] = [self._starts, self.appended or self._starts]
        columns += [prompts.lengths(tower) for prompts in both for tower in ("encoder", "decoder")]
        columns += [bounds for prompts in both for name, bounds in (prompts.spans or {}).items() if name in names]
        groups: dict[Hashable, list[int]] = {}
        for prompt, key in enumerate(zip(*columns, strict=True)):
            groups.setdefault(key, []).append(prompt)
        return list(groups.values())

    @cached_property
    def positions_alike(self) -> list[list[int]]:
        """Groups of targets that are changed at the same tokens."""
        groups: dict[Hashable, list[int]] = {}
        for number, target in enumerate(self.targets):
            groups.setdefault(tuple((p.tower, p.position, p.key) for p in target.parts), []).append(number)
        return list(groups.values())

    def exists(self) -> np.ndarray:
        """Whether each prompt is long enough for each cell: `[prompt, target]`."""
        found = np.zeros((len(self.corrupted), len(self.targets)), dtype=bool)
        for prompts in self.alike:
            has = np.zeros(len(self.targets), dtype=bool)
            for numbers in self.positions_alike:
                has[numbers] = self.has(self.targets[numbers[0]], prompts[0])
            found[prompts] = has
        return found

    def has(self, target: Target, prompt: int) -> bool:
        """Whether a prompt has the tokens of a cell, and the clean prompt their counterparts.

        Args:
            target: the cell.
            prompt: the number of the prompt.
        """
        return all(self._has(part, prompt) for part in target.parts)

    def _has(self, part: TargetPart, prompt: int) -> bool:
        length, position = self._own(part, prompt), part.position
        if not has_tokens(position, length) or not has_tokens(part.key, length):
            return False
        if not isinstance(position, int | Slice):
            return True
        tokens = own_tokens(position, self.corrupted, prompt, length)
        return all(self._partner(part, prompt, token) is not None for token in tokens)

    def _own(self, part: TargetPart, prompt: int) -> int:
        """The length of a prompt for positions: without the appended tokens of its answer."""
        length = self.corrupted.length(part.tower, prompt)
        return length - self.appended[prompt] if self.appended else length

    def _partner(self, part: TargetPart, prompt: int, token: int) -> int | None:
        """The clean prompt's token that corresponds to a token of the edited prompt; None if there is none."""
        if self.clean is None or self.align == "position" or self.operation.name != "patch":
            return token
        if self.align == "role":
            return partner(self.corrupted, self.clean, prompt, token)
        found = token + self.clean.length(part.tower, prompt) - self.corrupted.length(part.tower, prompt)
        return found if found >= 0 else None

    def positions(self, part: TargetPart, prompt: int, *, of_clean: bool = False) -> list[int]:
        """The tokens of a prompt that a cell changes.

        Args:
            part: the site and position.
            prompt: the number of the prompt.
            of_clean: the corresponding tokens of the clean prompt instead.
        """
        prompts = self.clean if of_clean and self.clean is not None else self.corrupted
        # Without a position all tokens are changed, also the appended tokens of an answer.
        every = part.position is None
        length = self.corrupted.length(part.tower, prompt) if every else self._own(part, prompt)
        own = own_tokens(part.position, prompts, prompt, length)
        if isinstance(part.position, Span):
            return own
        pairs = [(token, self._partner(part, prompt, token)) for token in own]
        return [there if of_clean else token for token, there in pairs if there is not None]

    def edges(self, part: TargetPart, prompt: int) -> list[tuple[int, int]]:
        """The (query, key) pairs that a knockout removes.

        Args:
            part: the site and positions.
            prompt: the number of the prompt.
        """
        assert part.key is not None
        keys = own_tokens(part.key, self.corrupted, prompt, self._own(part, prompt))
        return [(query, key) for query in self.positions(part, prompt) for key in keys]
