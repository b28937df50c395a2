"""Indices of a path resolved against a model: negative numbers, slices and lists become plain numbers in order."""

from __future__ import annotations

from collections.abc import Sequence

from nnsplice.errors import OutOfRange, PathError
from nnsplice.paths.path import Index, Path, Slice, Step


def column(path: Path, number: int) -> int:
    """Where step `number` starts in the path's text, for the caret of a message."""
    before = ["model"] if path.native else [path.tower] if path.tower else []
    return sum(len(str(part)) + 1 for part in (*before, *path.steps[:number]))


def resolve_index(path: Path, number: int, length: int, noun: str, where: str, shown: str | None = None) -> list[int]:
    """The numbers that the index of one step means among `length` things, in order and once each.

    `where` is what has them ("this model", "layer 3"); `shown` is how the step is written in the message, when that
    is more than its own name.
    """
    step = path.steps[number]
    name = shown or step.name
    if step.index is None:
        raise PathError(
            f"{step.name} needs an index here",
            path=path,
            column=column(path, number) + len(step.name),
            write=f"{name}[:]",
        )
    if isinstance(step.index, Slice):
        found = list(step.index.range(length))
        if not found:
            raise OutOfRange(
                f"{name}[{step.index}] selects nothing; {where} has {length} {noun}s",
                path=path,
                column=column(path, number),
            )
        return sorted(found)
    wanted: Sequence[int] = (step.index,) if isinstance(step.index, int) else step.index
    if not wanted:
        raise OutOfRange(f"{name}[] selects nothing", path=path, column=column(path, number))
    for index in wanted:
        if not -length <= index < length:
            side = "past the last" if index >= 0 else "before the first"
            last = step.name if step.name in ("layers", "heads", "groups", "neurons", "experts") else _last(step)
            raise OutOfRange(
                f"{name}[{index}] is {side} {noun}; {where} has {length}, "
                f"so {noun}s are {last}[0] to {last}[{length - 1}]",
                path=path,
                column=column(path, number),
            )
    return sorted({index % length for index in wanted})


def _last(step: Step) -> str:
    return step.name.rpartition(".")[2]


def at(step: Step, index: Index | None) -> Step:
    """The same step with one number in its brackets."""
    return Step(step.name, index)
