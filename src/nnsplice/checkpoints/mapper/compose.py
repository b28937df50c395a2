"""Mappers made of mappers: Parallel, Sequential, Shard, PrefixScope."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from nnsplice.checkpoints.mapper.abc import (
    ModelStateMapper,
    StateGroup,
    applied,
    as_mapper,
    listing,
    ordered,
    undefined,
)
from nnsplice.checkpoints.mapper.chain import ChainedGroup, chained_groups
from nnsplice.errors import BadArgument, BadType, MapperError, named


def filter_empty_mappers(mappers: Iterable[ModelStateMapper]) -> list[ModelStateMapper]:
    """The mappers that have at least one group.

    >>> from nnsplice.checkpoints import Parallel, Rename, filter_empty_mappers
    >>> filter_empty_mappers([Parallel([]), Rename("a", "b")])
    [Rename(name_from='a', name_to='b')]

    Args:
        mappers: mappers.

    Returns:
        The ones that are not empty.

    Raises:
        BadType: a single mapper.
    """
    if isinstance(mappers, ModelStateMapper):
        raise BadType(f"{named(mappers)} alone", expected="a list of mappers", write="[mapper]")
    return [mapper for mapper in map(as_mapper, mappers) if mapper.state_dependency_groups()]


#: The mappers that make a group, each with its own group.
_Makers = tuple[tuple[ModelStateMapper, StateGroup], ...]


class _Grouped(ModelStateMapper):
    """A mapper with a table of its groups, by their inputs."""

    _groups: Mapping[frozenset[str], StateGroup]

    def state_dependency_groups(self) -> frozenset[StateGroup]:
        """The groups."""
        return frozenset(self._groups.values())

    def _group(self, given: dict[str, Tensor]) -> StateGroup:
        found = self._groups.get(frozenset(given))
        if found is None:
            raise undefined(self, given, (name for inputs in self._groups for name in inputs))
        return found


@dataclass(frozen=True, repr=False)
class Parallel(_Grouped):
    """Several mappers that share no key; where several outputs need one input, `Copy` gives it several names.

    >>> from nnsplice.checkpoints import Parallel, Rename
    >>> swap = Parallel([Rename("a", "b"), Rename("b", "a")])
    >>> swap.apply({"a": torch.zeros(1)})
    {'b': tensor([0.])}

    Attributes:
        mappers: the mappers.
    """

    mappers: Sequence[ModelStateMapper]
    _groups: Mapping[frozenset[str], StateGroup] = field(init=False, compare=False)
    _makers: Mapping[frozenset[str], _Makers] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        mappers = tuple(filter_empty_mappers(self.mappers))
        makers: dict[frozenset[str], _Makers] = {}
        owners: tuple[dict[str, ModelStateMapper], ...] = ({}, {})
        for mapper in mappers:
            for group in ordered(mapper.state_dependency_groups()):
                for kind, names, owner in zip(("input", "output"), (group.inputs, group.outputs), owners, strict=True):
                    _claim(kind, names, owner, mapper)
                makers[group.inputs] = (*makers.get(group.inputs, ()), (mapper, group))
        object.__setattr__(self, "mappers", mappers)
        object.__setattr__(self, "_makers", makers)
        # Mappers without inputs all have the empty key, so their outputs are one group.
        groups = {
            inputs: StateGroup(inputs, frozenset(name for _, group in every for name in group.outputs))
            for inputs, every in makers.items()
        }
        object.__setattr__(self, "_groups", groups)

    def apply(self, group: dict[str, Tensor]) -> dict[str, Tensor]:
        """The outputs of one group.

        Args:
            group: the inputs by name.

        Returns:
            The outputs by name.
        """
        made: dict[str, Tensor] = {}
        for mapper, own in self._makers[self._group(group).inputs]:
            made |= applied(mapper, own, dict(group))
        return made

    def __repr__(self) -> str:
        return f"Parallel({len(self.mappers)} mappers)"


def _claim(kind: str, names: Iterable[str], owners: dict[str, ModelStateMapper], mapper: ModelStateMapper) -> None:
    for name in names:
        if name in owners:
            raise MapperError(
                f"colliding {kind} key {name}",
                path=f"{owners[name]!r} and {mapper!r}",
                expected="mappers that share no key",
                write=f'Sequential([Copy("{name}", ["{name}", "{name}.2"]), ...])' if kind == "input" else None,
            )
        owners[name] = mapper


@dataclass(frozen=True, repr=False)
class Sequential(_Grouped):
    """Several mappers one after the other; a mapper passes on tensors that it does not need.

    >>> from nnsplice.checkpoints import Rename, Sequential, UnstackTensors
    >>> chain = Sequential([UnstackTensors("s", ["a", "b"], 0), Rename("a", "x")])
    >>> sorted(chain.apply({"s": torch.zeros(2, 3)}))
    ['b', 'x']

    Attributes:
        mappers: the mappers.
    """

    mappers: Sequence[ModelStateMapper]
    _groups: Mapping[frozenset[str], StateGroup] = field(init=False, compare=False)
    _chained: Mapping[frozenset[str], ChainedGroup] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        mappers = tuple(filter_empty_mappers(self.mappers))
        if not mappers:
            raise BadArgument(
                "no mapper that maps anything", expected="at least one", write="Sequential([Rename(a, b)])"
            )
        chained = chained_groups(mappers)
        object.__setattr__(self, "mappers", mappers)
        object.__setattr__(self, "_chained", chained)
        object.__setattr__(self, "_groups", {inputs: group.group for inputs, group in chained.items()})

    def apply(self, group: dict[str, Tensor]) -> dict[str, Tensor]:
        """The outputs of one group, after all mappers.

        Args:
            group: the inputs by name.

        Returns:
            The outputs by name.
        """
        return self._chained[self._group(group).inputs].run(group)

    def __repr__(self) -> str:
        return f"Sequential({len(self.mappers)} stages)"


@dataclass(frozen=True, repr=False)
class Shard(_Grouped):
    """The groups of one process; every process computes the same partition without communication.

    Without `sizes`, groups are dealt out one by one in the order of their names. With `sizes`, each process has one
    range of the files, all with about the same number of bytes. A share may be empty.

    >>> from nnsplice.checkpoints import Identity, Parallel, Shard
    >>> whole = Parallel([Identity("a"), Identity("b"), Identity("c")])
    >>> [len(Shard(whole, 2, i).state_dependency_groups()) for i in range(2)]
    [2, 1]

    Attributes:
        sub_mapper: the mapper to divide.
        total_shards: the number of processes.
        current_shard: the number of this process.
        sizes: the bytes of each input, in the order of the files, as `Checkpoint.open(folder).sizes()`.
    """

    sub_mapper: ModelStateMapper
    total_shards: int
    current_shard: int
    sizes: Mapping[str, int] | None = None
    _groups: Mapping[frozenset[str], StateGroup] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        total, current = self.total_shards, self.current_shard
        if total < 1:
            raise BadArgument(f"total_shards is {total}", expected="at least 1")
        if not 0 <= current < total:
            raise BadArgument(f"current_shard is {current}", expected=f"0 to {total - 1}")
        every = ordered(self.sub_mapper.state_dependency_groups())
        own = every[current::total] if self.sizes is None else _file_range(every, self.sizes, total, current)
        object.__setattr__(self, "_groups", {group.inputs: group for group in own})

    def apply(self, group: dict[str, Tensor]) -> dict[str, Tensor]:
        """The outputs of one group.

        Args:
            group: the inputs by name.

        Returns:
            The outputs by name.
        """
        self._group(group)
        return self.sub_mapper.apply(group)

    def __repr__(self) -> str:
        return f"Shard({self.sub_mapper!r}, {self.total_shards}, {self.current_shard})"


def _file_range(groups: Sequence[StateGroup], sizes: Mapping[str, int], total: int, current: int) -> list[StateGroup]:
    """The groups of one share, if the bytes of all groups in the order of the files are cut into equal ranges."""
    order = {name: number for number, name in enumerate(sizes)}
    if unknown := {name for group in groups for name in group.inputs} - order.keys():
        raise MapperError(f"the sizes of {listing(unknown)} are not given", expected="a size for each input")
    in_order = sorted(groups, key=lambda group: min((order[name] for name in group.inputs), default=-1))
    # One byte more for each, so that groups without bytes are divided too.
    weights = [1 + sum(sizes[name] for name in group.inputs) for group in in_order]
    all_bytes, before = sum(weights), 0
    own: list[StateGroup] = []
    for group, weight in zip(in_order, weights, strict=True):
        if (2 * before + weight) * total // (2 * all_bytes) == current:
            own.append(group)
        before += weight
    return own


@dataclass(frozen=True, repr=False)
class PrefixScope(_Grouped):
    """A mapper with a prefix before the names of its inputs and one before those of its outputs.

    >>> from nnsplice.checkpoints import Parallel, PrefixScope, Rename
    >>> qk = Parallel([Rename("q_proj", "W_Q"), Rename("k_proj", "W_K")])
    >>> Parallel([PrefixScope(qk, f"layers.{i}.", f"blocks.{i}.attn.") for i in range(2)]).explain()
    4 groups, 4 inputs, 4 outputs
    layers.*.k_proj  ->  blocks.*.attn.W_K   x 2
    layers.*.q_proj  ->  blocks.*.attn.W_Q   x 2

    Attributes:
        mapper: the mapper.
        source_prefix: the prefix of inputs.
        target_prefix: the prefix of outputs.
    """

    mapper: ModelStateMapper
    source_prefix: str = ""
    target_prefix: str = ""
    _groups: Mapping[frozenset[str], StateGroup] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        groups = {
            (inputs := frozenset(self.source_prefix + name for name in group.inputs)): StateGroup(
                inputs, frozenset(self.target_prefix + name for name in group.outputs)
            )
            for group in self.mapper.state_dependency_groups()
        }
        object.__setattr__(self, "_groups", groups)

    def apply(self, group: dict[str, Tensor]) -> dict[str, Tensor]:
        """The outputs of one group.

        Args:
            group: the inputs by name, with the prefix.

        Returns:
            The outputs by name, with the prefix.
        """
        self._group(group)
        made = self.mapper.apply({name.removeprefix(self.source_prefix): tensor for name, tensor in group.items()})
        return {self.target_prefix + name: tensor for name, tensor in made.items()}

    def __repr__(self) -> str:
        return f"PrefixScope({self.mapper!r}, {self.source_prefix!r}, {self.target_prefix!r})"
