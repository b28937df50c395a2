"""Mappers that change names: Identity, Rename, Copy, SelectChildModules, Drop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from nnsplice.checkpoints.mapper.abc import ModelStateMapper, StateGroup, undefined
from nnsplice.checkpoints.mapper.leaf import Leaf, set_field, unique_names


@dataclass(frozen=True)
class Identity(Leaf):
    """Pass a tensor through unchanged.

    >>> from nnsplice.checkpoints import Identity
    >>> tensor = torch.ones(2)
    >>> Identity("norm").apply({"norm": tensor})["norm"] is tensor
    True

    Attributes:
        name: the name.
    """

    name: str

    @property
    def names(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return (self.name,), (self.name,)

    def _compute(self, *tensors: Tensor) -> Sequence[Tensor]:
        return tensors


@dataclass(frozen=True)
class Rename(Leaf):
    """Rename a tensor.

    >>> from nnsplice.checkpoints import Rename
    >>> Rename("wte.weight", "embed").apply({"wte.weight": torch.ones(2)})
    {'embed': tensor([1., 1.])}

    Attributes:
        name_from: the old name.
        name_to: the new name.
    """

    name_from: str
    name_to: str

    @property
    def names(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return (self.name_from,), (self.name_to,)

    def _compute(self, *tensors: Tensor) -> Sequence[Tensor]:
        return tensors


@dataclass(frozen=True)
class Copy(Leaf):
    """One tensor under several names, as tied weights; it is stored once.

    >>> from nnsplice.checkpoints import Copy
    >>> tied = Copy("wte", ["embed", "unembed"]).apply({"wte": torch.ones(2)})
    >>> sorted(tied), tied["embed"] is tied["unembed"]
    (['embed', 'unembed'], True)

    With `apart`, each name gets a tensor of its own, as models have that do not tie these weights:

    >>> apart = Copy("wte", ["embed", "unembed"], apart=True).apply({"wte": torch.ones(2)})
    >>> apart["embed"] is apart["unembed"]
    False

    Attributes:
        name_from: the old name.
        names_to: the new names.
        apart: make a copy for each name instead, for models that do not tie these weights.
    """

    name_from: str
    names_to: Sequence[str]
    apart: bool = False

    def __post_init__(self) -> None:
        set_field(self, "names_to", unique_names("names_to", self.names_to))

    @property
    def names(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return (self.name_from,), tuple(self.names_to)

    def _compute(self, *tensors: Tensor) -> Sequence[Tensor]:
        return [tensors[0].clone() for _ in self.names_to] if self.apart else tensors * len(self.names_to)


@dataclass(frozen=True)
class SelectChildModules(ModelStateMapper):
    """Remove a parent's name: `parent.base` becomes `base`, each as a group of its own.

    >>> from nnsplice.checkpoints import SelectChildModules
    >>> SelectChildModules(["embed", "norm"], "model.decoder").explain()
    2 groups, 2 inputs, 2 outputs
    model.decoder.embed  ->  embed
    model.decoder.norm   ->  norm

    Attributes:
        base_names: the names under the parent.
        parent_name: the name of the parent.
    """

    base_names: Sequence[str]
    parent_name: str
    _known: frozenset[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        set_field(self, "base_names", unique_names("base_names", self.base_names))
        set_field(self, "_known", frozenset(self.base_names))

    def state_dependency_groups(self) -> frozenset[StateGroup]:
        """One group for each name."""
        return frozenset(
            StateGroup(frozenset((f"{self.parent_name}.{name}",)), frozenset((name,))) for name in self.base_names
        )

    def apply(self, group: dict[str, Tensor]) -> dict[str, Tensor]:
        """The outputs of one group.

        Args:
            group: the input by its name under the parent.

        Returns:
            The output by its own name.
        """
        dot = f"{self.parent_name}."
        name = next(iter(group), "")
        if len(group) != 1 or not name.startswith(dot) or name.removeprefix(dot) not in self._known:
            raise undefined(self, group, (f"{dot}{base}" for base in self.base_names))
        return {name.removeprefix(dot): group[name]}


@dataclass(frozen=True)
class Drop(Leaf):
    """Remove a tensor.

    >>> from nnsplice.checkpoints import Drop, Sequential, Split
    >>> Sequential([Split("kv", ["k", "v"], [1, 1], 0), Drop("v")]).apply({"kv": torch.tensor([1, 2])})
    {'k': tensor([1])}

    Attributes:
        name: the name.
    """

    name: str

    @property
    def names(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return (self.name,), ()

    def _compute(self, *tensors: Tensor) -> Sequence[Tensor]:
        return []
