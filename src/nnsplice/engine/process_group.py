"""Agreement between the processes of one call, so that all make the same collective calls.

Steps of single processes (a file, free memory, a cached result) may differ, and the next collective call would then
wait forever. So the first process decides and broadcasts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import distributed

from nnsplice.atlas import unwrap
from nnsplice.engine.sharding import meshes_of
from nnsplice.errors import BadArgument, TeamError

T = TypeVar("T")


@dataclass(frozen=True)
class ProcessGroup:
    """The processes of a sharded model; a single process for any other model."""

    #: The group of torch; None for a single process.
    group: Any = None

    @classmethod
    def of(cls, model: Any) -> ProcessGroup:
        """The processes of a model."""
        found = meshes_of(unwrap(model))
        return cls(found[0].get_group()) if found else cls()

    @property
    def size(self) -> int:
        """The number of processes."""
        return 1 if self.group is None else distributed.get_world_size(self.group)

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.group is None or distributed.get_rank(self.group) == 0

    def broadcast(self, value: T) -> T:
        """The value of the first process."""
        if self.group is None:
            return value
        sent: list[Any] = [value if self.is_first else None]
        distributed.broadcast_object_list(sent, distributed.get_global_rank(self.group, 0), self.group)
        return sent[0]

    def on_first(self, what: str, work: Callable[[], T]) -> T | None:
        """Run a function in the first process: its result there, None in the others.

        Args:
            what: a name of the work, as the subject of a sentence.

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
        said = self.broadcast(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        if said is not None:
            raise TeamError(f"{what} failed in process 0: {said}")
        return found

    def minimum(self, number: int) -> int:
        """The smallest number of all processes."""
        return min(self._gather(number))

    def check_same(self, asked: Any, what: str) -> None:
        """Raise in every process if not all have the same value.

        Raises:
            BadArgument: they differ.
        """
        every = self._gather(asked)
        different = [rank for rank, other in enumerate(every) if other != every[0]]
        if different:
            raise BadArgument(
                f"{what} of process {different[0]} is another than that of process 0",
                expected="the same call in every process that the model is spread over",
            )

    def _gather(self, value: T) -> list[T]:
        if self.group is None:
            return [value]
        every: list[Any] = [None] * self.size
        distributed.all_gather_object(every, value, self.group)
        return every

    def refuse_out_of_memory(self, error: BaseException) -> None:
        """Raise if other processes wait in the failed run, so that running less at once does not help.

        Raises:
            torch.OutOfMemoryError: there are other processes.
        """
        if self.group is not None:
            raise torch.OutOfMemoryError(
                f"{error}\nmemory ran out in process {distributed.get_rank(self.group)}, and the others are in the "
                "middle of this run\n  write: max_tokens=, a smaller number than what ran"
            ) from error
