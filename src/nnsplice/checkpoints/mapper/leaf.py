"""Mappers of single tensors and of single groups of tensors: the words that pipelines are made of.

one to one      Identity, Rename, Transpose, Permute, Squeeze, Unsqueeze, Slice, Cast
one to many     Copy, UnstackTensors, ChunkTensors, Split
many to one     StackTensors, ConcatenateTensors
many renames    SelectChildModules
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import InitVar, dataclass, field

import torch
from torch import Tensor

from nnsplice.checkpoints.mapper.abc import ModelStateMapper, StateGroup, undefined
from nnsplice.checkpoints.mapper.one_group import InPlace, Leaf
from nnsplice.errors import BadArgument, BadType, MapperError


def _unique(what: str, names: Sequence[str]) -> tuple[str, ...]:
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


def _type(dtype: object) -> torch.dtype:
    if not isinstance(dtype, torch.dtype):
        raise BadType(f"dtype={dtype!r}", expected="a type of torch", write="Cast(name, torch.bfloat16)")
    return dtype


def _set(leaf: object, name: str, value: object) -> None:
    """Put a checked argument into a frozen value."""
    object.__setattr__(leaf, name, value)


# -- one to one --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelStateMapperIdentity(Leaf):
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
class ModelStateMapperRename(Leaf):
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
class ModelStateMapperTranspose(InPlace):
    """Exchange two dimensions; `Transpose(name, (0, 1))` converts between `Linear` and GPT-2's `Conv1D`.

    >>> from nnsplice.checkpoints import Transpose
    >>> Transpose("c_fc.weight", (0, 1)).apply({"c_fc.weight": torch.tensor([[1, 2], [3, 4], [5, 6]])})
    {'c_fc.weight': tensor([[1, 3, 5],
            [2, 4, 6]])}

    Attributes:
        name: the name.
        dims: the two dimensions.
    """

    name: str
    dims: tuple[int, int]

    def __post_init__(self) -> None:
        if len(self.dims) != 2:
            raise BadArgument(f"dims is {self.dims}", expected="two dimensions", write="Permute(name, dims)")
        _set(self, "dims", tuple(self.dims))

    def _compute(self, *tensors: Tensor) -> Sequence[Tensor]:
        return [tensors[0].transpose(*self.dims).contiguous()]


@dataclass(frozen=True)
class ModelStateMapperPermute(InPlace):
    """Permute dimensions; with `view`, those of a reshaped tensor, which then has its own shape again.

    Rotary layouts differ this way: the rows of a head are (half, pair) in one and (pair, half) in the other.

    >>> from nnsplice.checkpoints import Permute
    >>> interleaved = Permute("wq", dims=(0, 2, 1, 3), view=(1, 2, 2, -1))   # one head of width 4
    >>> interleaved.apply({"wq": torch.arange(4.0).reshape(4, 1)})["wq"].flatten()
    tensor([0., 2., 1., 3.])

    Attributes:
        name: the name.
        dims: the new order of the dimensions.
        view: the shape in which dimensions are permuted.
    """

    name: str
    dims: tuple[int, ...]
    view: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        _set(self, "dims", tuple(self.dims))
        _set(self, "view", None if self.view is None else tuple(self.view))

    def _compute(self, *tensors: Tensor) -> Sequence[Tensor]:
        (tensor,) = tensors
        if self.view is None:
            return [tensor.permute(self.dims).contiguous()]
        return [tensor.reshape(self.view).permute(self.dims).reshape(tensor.shape)]


@dataclass(frozen=True)
class ModelStateMapperSqueeze(InPlace):
    """Remove the dimensions of length 1, or one of them.

    >>> from nnsplice.checkpoints import Squeeze
    >>> [list(Squeeze("w", dim).apply({"w": torch.zeros(1, 3, 1)})["w"].shape) for dim in (None, 0)]
    [[3], [3, 1]]

    Attributes:
        name: the name.
        dim: the dimension; all of length 1 if left out.
    """

    name: str
    dim: int | None = None

    def _compute(self, *tensors: Tensor) -> Sequence[Tensor]:
        (tensor,) = tensors
        if self.dim is None:
            return [tensor.squeeze().contiguous()]
        if tensor.shape[self.dim] != 1:  # torch would leave it as it is, without a word
            raise MapperError(f"dimension {self.dim} of {list(tensor.shape)} is not of length 1", path=repr(self))
        return [tensor.squeeze(self.dim).contiguous()]


@dataclass(frozen=True)
class ModelStateMapperUnsqueeze(InPlace):
    """Add a dimension of length 1.

    >>> from nnsplice.checkpoints import Unsqueeze
    >>> Unsqueeze("w", 0).apply({"w": torch.tensor([1, 2])})
    {'w': tensor([[1, 2]])}

    Attributes:
        name: the name.
        dim: the position of the new dimension.
    """

    name: str
    dim: int

    def _compute(self, *tensors: Tensor) -> Sequence[Tensor]:
        return [tensors[0].unsqueeze(self.dim).contiguous()]


@dataclass(frozen=True)
class ModelStateMapperSlice(InPlace):
    """A range of one dimension; only its bytes are read if it is the first dimension.

    >>> from nnsplice.checkpoints import Slice
    >>> Slice("embed", dim=0, stop=2).apply({"embed": torch.tensor([[1, 1], [2, 2], [3, 3]])})
    {'embed': tensor([[1, 1],
            [2, 2]])}

    Attributes:
        name: the name.
        dim: the dimension.
        start: the first index.
        stop: the index after the last.
    """

    name: str
    dim: int
    start: int | None = None
    stop: int | None = None

    def _compute(self, *tensors: Tensor) -> Sequence[Tensor]:
        (tensor,) = tensors
        length = tensor.shape[self.dim]
        start, stop, _ = slice(self.start, self.stop).indices(length)
        asked = (self.start or 0, length if self.stop is None else self.stop)
        if not all(-length <= end <= length for end in asked) or start >= stop:
            raise MapperError(f"{asked[0]}:{asked[1]} is no stretch of a dimension of length {length}", path=repr(self))
        # A copy: a view would hold the memory of all that was cut away.
        return [tensor.narrow(self.dim, start, stop - start).clone(memory_format=torch.contiguous_format)]


@dataclass(frozen=True)
class ModelStateMapperCast(InPlace):
    """Convert a tensor to another type.

    >>> from nnsplice.checkpoints import Cast
    >>> Cast("w", torch.bfloat16).apply({"w": torch.tensor([1.0, 1.001])})
    {'w': tensor([1., 1.], dtype=torch.bfloat16)}

    Attributes:
        name: the name.
        dtype: the new type.
    """

    name: str
    dtype: torch.dtype

    def __post_init__(self) -> None:
        _set(self, "dtype", _type(self.dtype))

    def _compute(self, *tensors: Tensor) -> Sequence[Tensor]:
        return [tensors[0].to(self.dtype)]


# -- one to many -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelStateMapperCopy(Leaf):
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
        _set(self, "names_to", _unique("names_to", self.names_to))

    @property
    def names(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return (self.name_from,), tuple(self.names_to)

    def _compute(self, *tensors: Tensor) -> Sequence[Tensor]:
        return [tensors[0].clone() for _ in self.names_to] if self.apart else tensors * len(self.names_to)


class _Apart(Leaf):
    """One tensor cut into several."""

    source_name: str
    target_names: Sequence[str]

    def __post_init__(self) -> None:
        _set(self, "target_names", _unique("target_names", self.target_names))

    @property
    def names(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return (self.source_name,), tuple(self.target_names)

    def _count(self, found: Sequence[Tensor], tensor: Tensor, dim: int) -> Sequence[Tensor]:
        if len(found) != len(self.target_names):
            raise MapperError(
                f"dimension {dim} of {self.source_name} {list(tensor.shape)} gives {len(found)} tensors",
                path=repr(self),
                expected=f"{len(self.target_names)}, one for each name",
            )
        return [part.contiguous() for part in found]


@dataclass(frozen=True)
class ModelStateMapperUnstackTensors(_Apart):
    """Split a dimension into one tensor for each index.

    >>> from nnsplice.checkpoints import UnstackTensors
    >>> UnstackTensors("experts", ["e.0", "e.1"], dim=0).apply({"experts": torch.tensor([[1, 2], [3, 4]])})
    {'e.0': tensor([1, 2]), 'e.1': tensor([3, 4])}

    Attributes:
        source_name: the old name.
        target_names: the new names.
        dim: the dimension.
    """

    source_name: str
    target_names: Sequence[str]
    dim: int

    def _compute(self, *tensors: Tensor) -> Sequence[Tensor]:
        return self._count(tensors[0].unbind(self.dim), tensors[0], self.dim)


@dataclass(frozen=True)
class ModelStateMapperChunkTensors(_Apart):
    """Split a dimension into equal chunks, as `torch.chunk`.

    >>> from nnsplice.checkpoints import ChunkTensors
    >>> ChunkTensors("gate_up", ["gate", "up"], dim=0).apply({"gate_up": torch.arange(4)})
    {'gate': tensor([0, 1]), 'up': tensor([2, 3])}
    >>> ChunkTensors("gate_up", ["gate", "up"], dim=0).apply({"gate_up": torch.arange(1)})
    Traceback (most recent call last):
    nnsplice.errors.MapperError: dimension 0 of gate_up [1] gives 1 tensors
        ModelStateMapperChunkTensors(source_name='gate_up', target_names=('gate', 'up'), dim=0)
      expected: 2, one for each name

    Attributes:
        source_name: the old name.
        target_names: the new names.
        dim: the dimension.
    """

    source_name: str
    target_names: Sequence[str]
    dim: int

    def _compute(self, *tensors: Tensor) -> Sequence[Tensor]:
        return self._count(tensors[0].chunk(len(self.target_names), self.dim), tensors[0], self.dim)


@dataclass(frozen=True)
class ModelStateMapperSplit(Leaf):
    """Split a dimension into chunks of given sizes, as fused queries, keys and values of grouped-query attention.

    >>> from nnsplice.checkpoints import Split
    >>> Split("qkv", ["q", "k", "v"], [4, 1, 1], dim=0).apply({"qkv": torch.arange(6)})
    {'q': tensor([0, 1, 2, 3]), 'k': tensor([4]), 'v': tensor([5])}

    Attributes:
        name: the old name.
        target_names: the new names.
        sizes: the size of each chunk.
        dim: the dimension.
    """

    name: str
    target_names: Sequence[str]
    sizes: Sequence[int]
    dim: int

    def __post_init__(self) -> None:
        _set(self, "target_names", _unique("target_names", self.target_names))
        _set(self, "sizes", tuple(self.sizes))
        if len(self.sizes) != len(self.target_names):
            raise BadArgument(
                f"{len(self.sizes)} sizes for {len(self.target_names)} names", expected="a size for each name"
            )

    @property
    def names(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return (self.name,), tuple(self.target_names)

    def _compute(self, *tensors: Tensor) -> Sequence[Tensor]:
        return [part.contiguous() for part in torch.split(tensors[0], list(self.sizes), self.dim)]


# -- many to one -------------------------------------------------------------------------------------------------------


class _Together(Leaf):
    """Several tensors put into one."""

    source_names: Sequence[str]
    target_name: str

    @property
    def names(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return tuple(self.source_names), (self.target_name,)

    def _same_type(self, tensors: Sequence[Tensor]) -> None:
        kinds = list(dict.fromkeys(str(tensor.dtype) for tensor in tensors))
        if len(kinds) > 1:  # torch would promote them without a word
            raise MapperError(
                f"tensors of {' and '.join(kinds)} are put together",
                path=repr(self),
                write="Cast(name, dtype) before it",
            )


@dataclass(frozen=True)
class ModelStateMapperStackTensors(_Together):
    """Stack tensors of equal shapes along a new dimension.

    >>> from nnsplice.checkpoints import StackTensors
    >>> StackTensors(["e.0", "e.1"], "experts", dim=0).apply({"e.0": torch.tensor([1, 2]), "e.1": torch.tensor([3, 4])})
    {'experts': tensor([[1, 2],
            [3, 4]])}

    Attributes:
        source_names: the old names.
        target_name: the new name.
        dim: the new dimension.
        stack_dim: another name of `dim`.
    """

    source_names: Sequence[str]
    target_name: str
    dim: int | None = None
    #: Another name of `dim`.
    stack_dim: InitVar[int | None] = None

    def __post_init__(self, stack_dim: int | None) -> None:
        _set(self, "source_names", _unique("source_names", self.source_names))
        if (self.dim is None) == (stack_dim is None):
            raise BadArgument("dim and stack_dim are two names of one argument", expected="one of them")
        _set(self, "dim", stack_dim if self.dim is None else self.dim)

    def _compute(self, *tensors: Tensor) -> Sequence[Tensor]:
        self._same_type(tensors)
        return [torch.stack(tensors, self.dim or 0)]


@dataclass(frozen=True)
class ModelStateMapperConcatenateTensors(_Together):
    """Concatenate tensors along a dimension.

    >>> from nnsplice.checkpoints import ConcatenateTensors
    >>> ConcatenateTensors(["q", "k"], "qk", dim=0).apply({"q": torch.tensor([1, 2]), "k": torch.tensor([3])})
    {'qk': tensor([1, 2, 3])}

    Attributes:
        source_names: the old names.
        target_name: the new name.
        dim: the dimension.
    """

    source_names: Sequence[str]
    target_name: str
    dim: int

    def __post_init__(self) -> None:
        _set(self, "source_names", _unique("source_names", self.source_names))

    def _compute(self, *tensors: Tensor) -> Sequence[Tensor]:
        self._same_type(tensors)
        return [torch.cat(tensors, self.dim)]


# -- many renames ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelStateMapperSelectChildModules(ModelStateMapper):
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
        _set(self, "base_names", _unique("base_names", self.base_names))
        _set(self, "_known", frozenset(self.base_names))

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
