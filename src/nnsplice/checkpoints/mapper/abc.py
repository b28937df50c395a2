"""The base class of mappers: groups of inputs and outputs, known before a tensor is read, and a function for each."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from nnsplice.errors import BadType, MapperError, closest, named
from nnsplice.shown import shown

if TYPE_CHECKING:
    from nnsplice.checkpoints.io.explain import Explanation


@dataclass(frozen=True, slots=True)
class StateGroup:
    """Input tensors that are needed together, and the outputs made of them.

    >>> from nnsplice.checkpoints import Split
    >>> (group,) = Split("qkv", ["q", "k", "v"], [4, 1, 1], dim=0).state_dependency_groups()
    >>> group.inputs, sorted(group.outputs)
    (frozenset({'qkv'}), ['k', 'q', 'v'])

    Attributes:
        inputs: the names of the inputs.
        outputs: the names of the outputs.
    """

    inputs: frozenset[str]
    outputs: frozenset[str]


class ModelStateMapper(ABC):
    """A declared change of a checkpoint's names and shapes.

    Groups share no key, so each is read, changed and written by itself, in any order and by any process.

    A subclass declares its groups and computes the outputs of each. This one multiplies a norm into the matrix that
    reads it:

    >>> from nnsplice.checkpoints import ModelStateMapper, Parallel, Rename, StateGroup
    >>> class Fold(ModelStateMapper):
    ...     def state_dependency_groups(self):
    ...         return frozenset({StateGroup(frozenset({"norm", "up"}), frozenset({"up.folded"}))})
    ...     def apply(self, group):
    ...         return {"up.folded": group["up"] * group["norm"]}
    >>> Parallel([Fold(), Rename("down", "out")]).explain()
    2 groups, 3 inputs, 2 outputs
    down       ->  out
    {norm,up}  ->  up.folded
    >>> Fold().apply({"norm": torch.tensor([1.0, 2.0]), "up": torch.ones(2, 2)})
    {'up.folded': tensor([[1., 2.],
            [1., 2.]])}
    """

    @abstractmethod
    def state_dependency_groups(self) -> frozenset[StateGroup]:
        """The groups of inputs and outputs; no tensors are needed."""

    @abstractmethod
    def apply(self, group: dict[str, Tensor]) -> dict[str, Tensor]:
        """Make the outputs of one group from its inputs.

        Args:
            group: the inputs by name.

        Returns:
            The outputs by name.
        """

    def explain(self, src_dir: str | os.PathLike[str] | None = None) -> Explanation:
        """A dry run as a table: groups, and for a checkpoint also sizes, files and peak bytes.

        No tensor is read: shapes come from the headers of the files, and the mapper runs on meta tensors.

        >>> from nnsplice.checkpoints import Parallel, Rename, StackTensors
        >>> Parallel([Rename("wte", "embed"), StackTensors(["e.0", "e.1"], "experts", 0)]).explain()
        2 groups, 3 inputs, 2 outputs
        e.* (2)  ->  experts
        wte      ->  embed

        Args:
            src_dir: the checkpoint that would be read.

        Returns:
            The table.
        """
        # Imported late: `io` imports this module.
        from nnsplice.checkpoints.io.explain import explain

        return explain(self, src_dir)


def as_mapper(given: object) -> ModelStateMapper:
    """The mapper, or an error that says how to make one."""
    if not isinstance(given, ModelStateMapper):
        raise BadType(
            f"{named(given)} is no mapper",
            expected="a ModelStateMapper, such as Rename(old, new)",
            write='ns.checkpoints.renaming(folder, ["old=new"])',
        )
    return given


def ordered(groups: Iterable[StateGroup]) -> list[StateGroup]:
    """Groups sorted by names: the order of a frozenset differs between processes, as hashes of strings do."""
    return sorted(groups, key=lambda group: (sorted(group.inputs), sorted(group.outputs)))


def inputs_of(mapper: ModelStateMapper) -> frozenset[str]:
    """Every key that a mapper needs."""
    return frozenset(name for group in mapper.state_dependency_groups() for name in group.inputs)


def outputs_of(mapper: ModelStateMapper) -> frozenset[str]:
    """Every key that a mapper makes."""
    return frozenset(name for group in mapper.state_dependency_groups() for name in group.outputs)


def applied(mapper: ModelStateMapper, group: StateGroup, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Apply a mapper to one of its groups, and check the names of its outputs.

    Raises:
        MapperError: they are not the declared ones.
    """
    made = mapper.apply(tensors)
    if made.keys() != group.outputs:
        raise MapperError(
            f"{type(mapper).__name__} declared {listing(group.outputs)} and made {listing(made)}",
            expected="exactly the outputs of the group",
        )
    return made


def undefined(mapper: ModelStateMapper, given: Iterable[str], known: Iterable[str]) -> MapperError:
    """The error for inputs that are not those of a group."""
    given, known = sorted(given), sorted(known)
    strange = [name for name in given if name not in known]
    hint = f"{strange[0]} is none of its inputs; like it are {closest(strange[0], known)}" if strange else None
    return MapperError(
        f"apply was called with an undefined group: {listing(given)}",
        path=repr(mapper),
        expected=hint or "all inputs of one group, and nothing else",
    )


def listing(names: Iterable[str], most: int = 5) -> str:
    """Names for a message: sorted, and at most `most` of them."""
    every = sorted(names)
    more = f", ... ({len(every)} in all)" if len(every) > most else ""
    return (", ".join(map(shown, every[:most])) or "nothing") + more
