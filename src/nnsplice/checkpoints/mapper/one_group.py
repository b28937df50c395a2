"""What a leaf is: a mapper with one group, written as a function of tensors."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from torch import Tensor

from nnsplice.checkpoints.mapper.abc import ModelStateMapper, StateGroup, undefined
from nnsplice.errors import MapperError


class Leaf(ModelStateMapper):
    """A mapper with one group; its function takes the tensors in a fixed order."""

    @property
    @abstractmethod
    def names(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The inputs and the outputs."""

    @abstractmethod
    def _compute(self, *tensors: Tensor) -> Sequence[Tensor]:
        """The outputs, in the order of their names."""

    def state_dependency_groups(self) -> frozenset[StateGroup]:
        """The one group."""
        inputs, outputs = self.names
        return frozenset((StateGroup(frozenset(inputs), frozenset(outputs)),))

    def apply(self, group: dict[str, Tensor]) -> dict[str, Tensor]:
        """Make the outputs."""
        inputs, outputs = self.names
        if len(group) != len(inputs) or not all(name in group for name in inputs):
            raise undefined(self, group, inputs)
        try:
            made = self._compute(*(group[name] for name in inputs))
        except MapperError:
            raise
        except (RuntimeError, IndexError, ValueError) as error:  # torch's own, about shapes and dimensions
            shapes = ", ".join(f"{name} {list(group[name].shape)}" for name in inputs)
            raise MapperError(f"{str(error).splitlines()[0]}: {shapes}", path=repr(self)) from None
        return dict(zip(outputs, made, strict=True))


class InPlace(Leaf):
    """One tensor that keeps its name."""

    name: str

    @property
    def names(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return (self.name,), (self.name,)
