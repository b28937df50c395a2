"""Agreement between the processes of one call, so that all make the same collective calls.

A step that one process takes by itself (a file, free memory, an answer that was remembered) may go otherwise there, and
the next exchange would then wait for who never comes. So the first process decides, and tells the others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import distributed

from nnsplice.atlas import unwrap
from nnsplice.engine.spread import meshes
from nnsplice.errors import BadArgument, TeamError

T = TypeVar("T")


@dataclass(frozen=True)
class Team:
    """The processes that a model is spread over. A model that is whole in this process makes a team of one."""

    #: None for a team of one.
    group: Any = None

    @classmethod
    def of(cls, model: Any) -> Team:
        """The processes of a model."""
        found = meshes(unwrap(model))
        return cls(found[0].get_group()) if found else cls()

    @property
    def size(self) -> int:
        """How many processes there are."""
        return 1 if self.group is None else distributed.get_world_size(self.group)

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.group is None or distributed.get_rank(self.group) == 0

    def told(self, value: T) -> T:
        """The value that the first process has."""
        if self.group is None:
            return value
        held: list[Any] = [value if self.is_first else None]
        distributed.broadcast_object_list(held, distributed.get_global_rank(self.group, 0), self.group)
        return held[0]

    def by_first(self, what: str, work: Callable[[], T]) -> T | None:
        """Have the first process do something: its result there, None in the others.

        Args:
            what: what is done, as the subject of a sentence.

        Raises:
            TeamError: it failed there, in the other processes; the first raises its own error.
        """
        error: Exception | None = None
        found: T | None = None
        if self.is_first:
            try:
                found = work()
            except Exception as raised:
                error = raised
        said = self.told(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        if said is not None:
            raise TeamError(f"{what} failed in process 0: {said}")
        return found

    def least(self, number: int) -> int:
        """The smallest of the processes' numbers."""
        return min(self._all(number))

    def check_same(self, asked: Any, what: str) -> None:
        """Raise, in every process, where they do not all ask the same.

        Raises:
            BadArgument: they differ.
        """
        every = self._all(asked)
        strange = [rank for rank, other in enumerate(every) if other != every[0]]
        if strange:
            raise BadArgument(
                f"{what} of process {strange[0]} is another than that of process 0",
                expected="the same call in every process that the model is spread over",
            )

    def _all(self, value: T) -> list[T]:
        if self.group is None:
            return [value]
        every: list[Any] = [None] * self.size
        distributed.all_gather_object(every, value, self.group)
        return every

    def refuse_memory(self, error: BaseException) -> None:
        """Raise where less at once is no way out: the other processes wait in the middle of the run that failed.

        Raises:
            torch.OutOfMemoryError: there are other processes.
        """
        if self.group is not None:
            raise torch.OutOfMemoryError(
                f"{error}\nmemory ran out in process {distributed.get_rank(self.group)}, and the others are in the "
                "middle of this run\n  write: max_tokens=, a smaller number than what ran"
            ) from error
