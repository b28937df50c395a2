"""Stages as one graph: which keys that come in belong together with which keys that come out.

A union-find over the groups of all stages: two groups are joined when a key goes from one to the other. That takes one
walk over all keys, whatever the stages are, and what remains is a list of steps for each joined group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from nnsplice.checkpoints.mapper.abc import ModelStateMapper, StateGroup, applied, ordered
from nnsplice.errors import MapperError


@dataclass(slots=True)
class Net:
    """A group of the whole chain, with the groups of the stages that it consists of."""

    inputs: set[str] = field(default_factory=set[str])
    outputs: set[str] = field(default_factory=set[str])
    #: Stage -> its mapper and the groups of it.
    steps: dict[int, tuple[ModelStateMapper, list[StateGroup]]] = field(
        default_factory=dict[int, tuple[ModelStateMapper, list[StateGroup]]]
    )

    @property
    def group(self) -> StateGroup:
        """What it needs and what it makes."""
        return StateGroup(frozenset(self.inputs), frozenset(self.outputs))

    def run(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Take tensors through the stages."""
        state = dict(tensors)
        for mapper, groups in self.steps.values():
            made: dict[str, Tensor] = {}
            for group in groups:
                made |= applied(mapper, group, {name: state[name] for name in sorted(group.inputs)})
            # All of a stage happens at once: `a -> b` beside `b -> a` exchanges them.
            for group in groups:
                for name in group.inputs:
                    state.pop(name, None)
            state |= made
        return state


class _Joined:
    """A union-find."""

    def __init__(self) -> None:
        self._above: list[int] = []

    def new(self) -> int:
        self._above.append(len(self._above))
        return len(self._above) - 1

    def root(self, node: int) -> int:
        above = self._above
        while above[node] != node:
            above[node] = above[above[node]]
            node = above[node]
        return node

    def join(self, one: int, other: int) -> None:
        a, b = sorted((self.root(one), self.root(other)))
        self._above[b] = a


def link(stages: Sequence[ModelStateMapper]) -> dict[frozenset[str], Net]:
    """The groups of a chain, by their inputs.

    Raises:
        MapperError: a key is needed again after it was used up, or two tensors would have one name.
    """
    joined = _Joined()
    here: dict[str, int] = {}  # key -> who made it, for all that exists between two stages
    gone: dict[str, int] = {}  # key -> the stage that used it up
    sources: list[tuple[int, str]] = []
    steps: list[tuple[int, int, ModelStateMapper, StateGroup]] = []
    for number, stage in enumerate(stages):
        taken: dict[str, int] = {}
        made: dict[str, int] = {}
        for group in ordered(stage.state_dependency_groups()):
            node = joined.new()
            steps.append((node, number, stage, group))
            for name in sorted(group.inputs):
                if name not in here:
                    if name in gone:
                        raise _used_up(name, gone[name], number)
                    here[name] = node  # it comes from outside, past the stages before
                    sources.append((node, name))
                joined.join(node, here[name])
                taken[name] = number
            for name in sorted(group.outputs):
                if name in made:
                    raise _collision(name, number)
                made[name] = node
        for name in taken:
            del here[name]
        for name, node in made.items():
            if name in here:
                raise _collision(name, number)
            here[name] = node
        gone |= taken
    return _nets(joined, here, sources, steps)


def _nets(
    joined: _Joined,
    ends: dict[str, int],
    sources: list[tuple[int, str]],
    steps: list[tuple[int, int, ModelStateMapper, StateGroup]],
) -> dict[frozenset[str], Net]:
    # Groups that need nothing would all have the same key, so they are one.
    fed = {joined.root(node) for node, _ in sources}
    constant = [node for node, *_ in steps if joined.root(node) not in fed]
    for node in constant[1:]:
        joined.join(constant[0], node)
    nets: dict[int, Net] = {}
    for node, number, stage, group in steps:
        net = nets.setdefault(joined.root(node), Net())
        net.steps.setdefault(number, (stage, []))[1].append(group)
    for node, name in sources:
        nets[joined.root(node)].inputs.add(name)
    for name, node in ends.items():
        nets[joined.root(node)].outputs.add(name)
    return {frozenset(net.inputs): net for net in nets.values()}


def _used_up(name: str, before: int, now: int) -> MapperError:
    return MapperError(
        f"stage {now} needs {name}, which stage {before} has used up",
        expected="each key used once; what is used twice is copied first",
        write=f'Copy("{name}", ["{name}", "{name}.2"])   (as a stage before)',
    )


def _collision(name: str, number: int) -> MapperError:
    return MapperError(
        f"colliding output key {name}: stage {number} makes it, and there is one of that name already",
        expected="one tensor for each name",
    )
