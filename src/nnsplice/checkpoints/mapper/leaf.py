"""The base classes of mappers with one group, and what their arguments are checked with."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from torch import Tensor

from nnsplice.checkpoints.mapper.abc import ModelStateMapper, StateGroup, undefined
from nnsplice.errors import BadArgument, BadType, MapperError


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


def unique_names(what: str, names: Sequence[str]) -> tuple[str, ...]:
    """The names that an argument lists, each once; `what` is the name of the argument."""
    if isinstance(names, str):
        raise BadType(f"{what} is the text {names!r}", expected="a list of names", write=f"[{names!r}]")
    names = tuple(names)
    if not names:
        raise BadArgument(f"{what} is empty", expected="at least one name")
    seen: set[str] = set()
    twice = next((name for name in names if name in seen or seen.add(name)), None)
    if twice is not None:
        raise BadArgument(f"{twice} stands twice in {what}", expected="each name once")
    return names


def set_field(leaf: object, name: str, value: object) -> None:
    """Set a field of a frozen dataclass."""
    object.__setattr__(leaf, name, value)
