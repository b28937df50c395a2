"""Schemes: the stored tensors of one kind of checkpoint, and mappers to and from standard parts.

A part is one matrix or vector in a standard form: `L.3.attn.q.weight` is `[out, in]`, with its heads concatenated. Two
schemes with the same parts can be joined into a mapper from one kind of checkpoint to the other.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from nnsplice.checkpoints.mapper.abc import ModelStateMapper
from nnsplice.checkpoints.mapper.compose import Parallel, Sequential
from nnsplice.checkpoints.mapper.joining import Collect
from nnsplice.checkpoints.mapper.joining import ConcatenateTensors as Concatenate
from nnsplice.checkpoints.mapper.joining import StackTensors as Stack
from nnsplice.checkpoints.mapper.names import Copy, Rename
from nnsplice.checkpoints.mapper.shapes import Transpose
from nnsplice.checkpoints.mapper.splitting import Deal, Ranges, Split
from nnsplice.checkpoints.mapper.splitting import UnstackTensors as Unstack


@dataclass(frozen=True)
class Stored:
    """One stored tensor and its parts.

    Attributes:
        name: the name of the tensor.
        parts: the parts that it holds.
        to_parts: the mapper from the tensor to its parts.
        from_parts: the mapper from its parts to the tensor; None for another name of a stored tensor.
        tied_parts: parts that equal the first one, and are not needed to make the tensor.
    """

    name: str
    parts: tuple[str, ...]
    to_parts: ModelStateMapper
    from_parts: ModelStateMapper | None
    tied_parts: frozenset[str] = frozenset()

    def renamed(self, name: str) -> Stored:
        """The same tensor by another name."""
        if name == self.name:
            return self
        give = None if self.from_parts is None else Sequential([self.from_parts, Rename(self.name, name)])
        return replace(self, name=name, to_parts=Sequential([Rename(name, self.name), self.to_parts]), from_parts=give)

    def without(self, parts: Collection[str]) -> Stored:
        """The same tensor without some of its tied parts."""
        return tied(self.name, self.parts[0], [part for part in self.parts[1:] if part not in parts])


#: Stored tensors by name.
Scheme = Mapping[str, Stored]


def scheme(every: Iterable[Stored]) -> Scheme:
    """Stored tensors by their names."""
    return {stored.name: stored for stored in every}


def single(name: str, part: str) -> Stored:
    """A tensor that is one part."""
    return Stored(name, (part,), Rename(name, part), Rename(part, name))


def tied(name: str, part: str, others: Sequence[str]) -> Stored:
    """A tensor that is several equal parts, as a tied embedding and unembedding."""
    return Stored(name, (part, *others), Copy(name, (part, *others)), Rename(part, name), frozenset(others))


def transposed_part(name: str, part: str) -> Stored:
    """A tensor that is one part, transposed."""
    turn = Transpose(part, (0, 1))
    return Stored(name, (part,), Sequential([Rename(name, part), turn]), Sequential([turn, Rename(part, name)]))


def fused(name: str, parts: Sequence[str], ranges: Sequence[Ranges], *, transposed: bool = False) -> Stored:
    """A tensor whose output dimension holds several parts, as fused queries, keys and values."""
    dim, every = int(transposed), tuple(parts)
    take: list[ModelStateMapper] = [Deal(name, every, tuple(ranges), dim)]
    give: list[ModelStateMapper] = [Collect(every, name, tuple(ranges), dim)]
    if transposed:
        turns = Parallel([Transpose(part, (0, 1)) for part in every])
        take, give = [*take, turns], [turns, *give]
    return Stored(name, every, Sequential(take), Sequential(give))


def fused_experts(name: str, parts: Sequence[Sequence[str]], sizes: Sequence[int]) -> Stored:
    """A tensor with one slice for each expert, in which the expert's matrices are concatenated."""
    if len(sizes) == 1:
        flat = [own[0] for own in parts]
        return Stored(name, tuple(flat), Unstack(name, flat, 0), Stack(flat, name, 0))
    slices = [f"{name}[{number}]" for number in range(len(parts))]
    take = [Unstack(name, slices, 0), Parallel([Split(s, own, sizes, 0) for s, own in zip(slices, parts, strict=True)])]
    join = Parallel([Concatenate(own, s, 0) for s, own in zip(slices, parts, strict=True)])
    return Stored(
        name, tuple(part for own in parts for part in own), Sequential(take), Sequential([join, Stack(slices, name, 0)])
    )
