"""The groups of a chain of mappers: inputs of the first stages, with the outputs that depend on them.

A union-find over the groups of all stages joins two groups when a tensor goes from one to the other. It looks at each
key once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from nnsplice.checkpoints.mapper.abc import ModelStateMapper, StateGroup, applied, ordered
from nnsplice.errors import MapperError


@dataclass(slots=True)
class ChainedGroup:
    """A group of the whole chain, with the groups of the stages that it consists of."""

    inputs: set[str] = field(default_factory=set[str])
    outputs: set[str] = field(default_factory=set[str])
    #: Number of the stage -> its mapper, and the mapper's groups.
    steps: dict[int, tuple[ModelStateMapper, list[StateGroup]]] = field(
        default_factory=dict[int, tuple[ModelStateMapper, list[StateGroup]]]
    )

    @property
    def group(self) -> StateGroup:
        """Its inputs and outputs."""
        return StateGroup(frozenset(self.inputs), frozenset(self.outputs))

    def run(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The outputs of the last stage."""
        state = dict(tensors)
        for mapper, groups in self.steps.values():
            made: dict[str, Tensor] = {}
            for group in groups:
                made |= applied(mapper, group, {name: state[name] for name in sorted(group.inputs)})
            # Inputs are removed after all groups of the stage ran: `a -> b` beside `b -> a` exchanges the two.
            for group in groups:
                for name in group.inputs:
                    state.pop(name, None)
            state |= made
        return state


class _UnionFind:
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


def chained_groups(stages: Sequence[ModelStateMapper]) -> dict[frozenset[str], ChainedGroup]:
    """The groups of a chain, by their inputs.

    Raises:
        MapperError: a key is needed again after it was used up, or two tensors would have one name.
    """
    joined = _UnionFind()
    available: dict[str, int] = {}  # key -> the node that made it, for the tensors between two stages
    used_up: dict[str, int] = {}  # key -> the stage that needed it
    sources: list[tuple[int, str]] = []
    steps: list[tuple[int, int, ModelStateMapper, StateGroup]] = []
    for number, stage in enumerate(stages):
        taken: dict[str, int] = {}
        made: dict[str, int] = {}
        for group in ordered(stage.state_dependency_groups()):
            node = joined.new()
            steps.append((node, number, stage, group))
            for name in sorted(group.inputs):
                if name not in available:
                    if name in used_up:
                        raise _used_up(name, used_up[name], number)
                    available[name] = node  # an input of the chain
                    sources.append((node, name))
                joined.join(node, available[name])
                taken[name] = number
            for name in sorted(group.outputs):
                if name in made:
                    raise _collision(name, number)
                made[name] = node
        for name in taken:
            del available[name]
        for name, node in made.items():
            if name in available:
                raise _collision(name, number)
            available[name] = node
        used_up |= taken
    return _merged(joined, available, sources, steps)


def _merged(
    joined: _UnionFind,
    ends: dict[str, int],
    sources: list[tuple[int, str]],
    steps: list[tuple[int, int, ModelStateMapper, StateGroup]],
) -> dict[frozenset[str], ChainedGroup]:
    # Groups without inputs all have the empty key, so they are one group.
    with_inputs = {joined.root(node) for node, _ in sources}
    without_inputs = [node for node, *_ in steps if joined.root(node) not in with_inputs]
    for node in without_inputs[1:]:
        joined.join(without_inputs[0], node)
    groups: dict[int, ChainedGroup] = {}
    for node, number, stage, group in steps:
        chained = groups.setdefault(joined.root(node), ChainedGroup())
        chained.steps.setdefault(number, (stage, []))[1].append(group)
    for node, name in sources:
        groups[joined.root(node)].inputs.add(name)
    for name, node in ends.items():
        groups[joined.root(node)].outputs.add(name)
    return {frozenset(chained.inputs): chained for chained in groups.values()}


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
