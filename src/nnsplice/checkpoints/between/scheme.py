"""How one kind of checkpoint keeps what every model of this shape has: stored tensors on one side, parts on the other.

A part is one matrix or vector with one meaning, in one form: `L.3.attn.q.weight` is `[out, in]`, heads one after the
other. Each stored tensor says how it becomes parts and how it is made of them; two schemes that speak of the same parts
can then be joined, whoever wrote them.
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
    """One stored tensor, the parts it holds, and the ways between."""

    name: str
    parts: tuple[str, ...]
    take: ModelStateMapper
    #: None where it cannot be made of its parts: another name of something that is stored already.
    give: ModelStateMapper | None
    #: Parts that are the same as the first one, and are not needed to make it.
    spare: frozenset[str] = frozenset()

    def renamed(self, name: str) -> Stored:
        """The same tensor by another name."""
        if name == self.name:
            return self
        give = None if self.give is None else Sequential([self.give, Rename(self.name, name)])
        return replace(self, name=name, take=Sequential([Rename(name, self.name), self.take]), give=give)

    def without(self, parts: Collection[str]) -> Stored:
        """The same tensor, where some of the parts that it is besides have a tensor of their own."""
        return tied(self.name, self.parts[0], [part for part in self.parts[1:] if part not in parts])


#: Name -> what is stored by it.
Scheme = Mapping[str, Stored]


def scheme(every: Iterable[Stored]) -> Scheme:
    """Stored tensors by their names."""
    return {stored.name: stored for stored in every}


def plain(name: str, part: str) -> Stored:
    """A tensor that is a part."""
    return Stored(name, (part,), Rename(name, part), Rename(part, name))


def tied(name: str, part: str, others: Sequence[str]) -> Stored:
    """A tensor that is a part, and other parts too: the unembedding of a model that ties its ends."""
    return Stored(name, (part, *others), Copy(name, (part, *others)), Rename(part, name), frozenset(others))


def turned(name: str, part: str) -> Stored:
    """A tensor that is a part, transposed."""
    turn = Transpose(part, (0, 1))
    return Stored(name, (part,), Sequential([Rename(name, part), turn]), Sequential([turn, Rename(part, name)]))


def dealt(name: str, parts: Sequence[str], ranges: Sequence[Ranges], *, transposed: bool = False) -> Stored:
    """A tensor whose output dimension holds several parts."""
    dim, every = int(transposed), tuple(parts)
    take: list[ModelStateMapper] = [Deal(name, every, tuple(ranges), dim)]
    give: list[ModelStateMapper] = [Collect(every, name, tuple(ranges), dim)]
    if transposed:
        turns = Parallel([Transpose(part, (0, 1)) for part in every])
        take, give = [*take, turns], [turns, *give]
    return Stored(name, every, Sequential(take), Sequential(give))


def stacked(name: str, parts: Sequence[Sequence[str]], sizes: Sequence[int]) -> Stored:
    """A tensor with one slice for each expert, in which the expert's matrices lie one after the other."""
    if len(sizes) == 1:
        flat = [own[0] for own in parts]
        return Stored(name, tuple(flat), Unstack(name, flat, 0), Stack(flat, name, 0))
    slices = [f"{name}[{number}]" for number in range(len(parts))]
    take = [Unstack(name, slices, 0), Parallel([Split(s, own, sizes, 0) for s, own in zip(slices, parts, strict=True)])]
    join = Parallel([Concatenate(own, s, 0) for s, own in zip(slices, parts, strict=True)])
    return Stored(
        name, tuple(part for own in parts for part in own), Sequential(take), Sequential([join, Stack(slices, name, 0)])
    )
