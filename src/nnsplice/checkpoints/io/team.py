"""Processes that do one thing together: what one of them knows all learn, and when one fails all raise."""

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
    """The processes that are reached by going through some groups, one after the other: the dimensions of a mesh."""

    groups: Sequence[ProcessGroup]

    @property
    def rank(self) -> int:
        """This process among all."""
        from torch import distributed

        return cast("Any", distributed).get_rank()

    def share(self, value: T) -> dict[int, T]:
        """Rank -> its value, of all processes. All of them call this, in the same order of calls.

        Raises:
            TeamError: a process is gone.
        """
        from torch import distributed

        known: dict[int, T] = {self.rank: value}
        for group in self.groups:
            told: list[Any] = [None] * group.size()
            try:
                cast("Any", distributed).all_gather_object(told, known, group=group)
            except (RuntimeError, ValueError, EOFError, UnpicklingError) as error:  # the backend's own, or half a value
                raise TeamError(
                    f"a process of the team cannot be reached, so it ended or was ended: {_backend(error)}",
                    expected="all processes alive until the end; one without a word often had no memory left",
                ) from error
            known = {rank: one for part in told for rank, one in part.items()}
        return dict(sorted(known.items()))

    def together(self, work: Callable[[], T]) -> dict[int, T]:
        """Let each do its work, and share the outcome: every value, or an error in all of them.

        Raises:
            TeamError: another process failed; in the one that failed, its own error.
        """
        error: BaseException | None = None
        value: T | None = None
        try:
            value = work()
        except BaseException as caught:
            error = caught
        told = self.share((value, None if error is None or isinstance(error, Stopped) else _words(error)))
        if error is not None and not isinstance(error, Stopped):
            raise error
        _check({rank: words for rank, (_, words) in told.items()})
        if error is not None:
            raise error
        return {rank: cast("T", one) for rank, (one, _) in told.items()}

    def agree(self, error: BaseException | None = None) -> None:
        """Tell the others whether one can go on; where one cannot, the others stop too.

        Raises:
            Stopped: another process cannot go on.
        """
        failed = [rank for rank, fine in self.share(error is None).items() if not fine and rank != self.rank]
        if failed and error is None:
            raise Stopped(f"process {failed[0]} failed")


class Stopped(NnspliceError, RuntimeError):
    """Another process of the team failed; why, it says when all have come together."""


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {_first_line(error)}"


def _backend(error: BaseException) -> str:
    """What happened, without where in the backend's source, and what to do about it."""
    return re.sub(r"^\[[^\]]*\] ", "", _first_line(error)).partition(". ")[0]


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "")


def _check(failures: dict[int, str | None]) -> None:
    failed = [f"process {rank} failed: {words}" for rank, words in failures.items() if words is not None]
    if failed:
        raise TeamError("; ".join(failed))
