"""Processes with collective calls: values are shared with all, and an error in one is raised in all."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, TypeVar, cast

from nnsplice.errors import NnspliceError, TeamError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")


@dataclass(frozen=True)
class Team:
    """The processes of one or several process groups; several are the dimensions of a mesh.

    Attributes:
        groups: the groups, gathered one after the other.
    """

    groups: Sequence[ProcessGroup]

    @property
    def rank(self) -> int:
        """The global rank of this process."""
        from torch import distributed

        return cast("Any", distributed).get_rank()

    def share(self, value: T) -> dict[int, T]:
        """The values of all processes by rank. All of them call this, in the same order of calls.

        Raises:
            TeamError: a process cannot be reached.
        """
        from torch import distributed

        values: dict[int, T] = {self.rank: value}
        for group in self.groups:
            gathered: list[Any] = [None] * group.size()
            try:
                cast("Any", distributed).all_gather_object(gathered, values, group=group)
            # errors of the backend, or of a truncated pickle
            except (RuntimeError, ValueError, EOFError, UnpicklingError) as error:
                raise TeamError(
                    f"a process of the team cannot be reached, so it ended or was ended: {_backend_message(error)}",
                    expected="all processes alive until the end; one that just ends often ran out of memory",
                ) from error
            values = {rank: one for part in gathered for rank, one in part.items()}
        return dict(sorted(values.items()))

    def together(self, work: Callable[[], T]) -> dict[int, T]:
        """Run a function in every process, and share the results; an error in one is raised in all.

        Raises:
            TeamError: another process failed; in the one that failed, its own error.
        """
        error: BaseException | None = None
        value: T | None = None
        try:
            value = work()
        except BaseException as caught:
            error = caught
        results = self.share((value, None if error is None or isinstance(error, Stopped) else _message(error)))
        if error is not None and not isinstance(error, Stopped):
            raise error
        _check({rank: message for rank, (_, message) in results.items()})
        if error is not None:
            raise error
        return {rank: cast("T", one) for rank, (one, _) in results.items()}

    def agree(self, error: BaseException | None = None) -> None:
        """Share whether this process can continue; if one cannot, the others stop.

        Raises:
            Stopped: another process cannot continue.
        """
        failed = [rank for rank, fine in self.share(error is None).items() if not fine and rank != self.rank]
        if failed and error is None:
            raise Stopped(f"process {failed[0]} failed")


class Stopped(NnspliceError, RuntimeError):
    """Another process of the team failed; `Team.together` then raises its message."""


def _message(error: BaseException) -> str:
    return f"{type(error).__name__}: {_first_line(error)}"


def _backend_message(error: BaseException) -> str:
    """The first sentence of a backend's error, without its source location."""
    return re.sub(r"^\[[^\]]*\] ", "", _first_line(error)).partition(". ")[0]


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "")


def _check(failures: dict[int, str | None]) -> None:
    failed = [f"process {rank} failed: {message}" for rank, message in failures.items() if message is not None]
    if failed:
        raise TeamError("; ".join(failed))
