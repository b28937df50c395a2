"""`Path`: the value of an address, frozen and hashable; `str` gives its canonical text."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from nnsplice.errors import PathError

#: The names of values, in the order of the documentation's table; `weight` and `bias` are parameters.
ACTIVATION_VALUES = ("output", "input", "mid", "q", "k", "v", "gate", "ungated", "pattern")
WEIGHT_VALUES = ("weight", "bias")

#: Names that are values at the end of a native path. A module of that name is written with nnsight's prefix:
#: `model.bert.encoder.layer[0].attention.E_output` is the module, `...attention.output` the value.
NATIVE_VALUES = ("input", "inputs", "output", "weight", "bias")
ATTRIBUTE_PREFIX = "E_"

#: Escape sequences in the name of a span: a backslash and one of these letters, a quote or a backslash.
ESCAPES = {"n": "\n", "r": "\r", "t": "\t"}
_ESCAPED = str.maketrans({"\\": r"\\", '"': r"\"", **{control: f"\\{letter}" for letter, control in ESCAPES.items()}})


@dataclass(frozen=True, slots=True)
class Slice:
    """A hashable slice (Python's own is not before 3.12)."""

    start: int | None = None
    stop: int | None = None
    step: int | None = None

    def __str__(self) -> str:
        text = f"{'' if self.start is None else self.start}:{'' if self.stop is None else self.stop}"
        return text if self.step is None else f"{text}:{self.step}"

    def range(self, length: int) -> range:
        """The indices of the slice in a sequence of this length."""
        return range(*slice(self.start, self.stop, self.step).indices(length))


@dataclass(frozen=True, slots=True)
class Span:
    """A named span of tokens, or one token of it (`token`, counted within the span)."""

    name: str
    token: int | None = None

    def __str__(self) -> str:
        escaped = self.name.translate(_ESCAPED)
        return f'"{escaped}"' if self.token is None else f'"{escaped}"][{self.token}'


Index = int | Slice | tuple[int, ...]
Position = int | Slice | tuple[int, ...] | Span


def index_text(index: Index | Position) -> str:
    """The text between the brackets."""
    return ",".join(map(str, index)) + ("," if len(index) == 1 else "") if isinstance(index, tuple) else str(index)


def position_rank(position: Position | None) -> tuple[int | str, ...]:
    """A sort key for positions of one site: none, from the start, from the end, slices and lists, spans."""
    if position is None:
        return (0,)
    if isinstance(position, int):
        return (1, position < 0, position)
    if isinstance(position, Span):
        return (3, position.name, position.token is not None, (position.token or 0) < 0, position.token or 0)
    return (2, index_text(position))


@dataclass(frozen=True, slots=True)
class Step:
    """One name of a path with its index, if there is one."""

    name: str
    index: Index | None = None

    def __str__(self) -> str:
        return self.name if self.index is None else f"{self.name}[{index_text(self.index)}]"


@dataclass(frozen=True, slots=True)
class Dictionary:
    """A part of a named SAE that is attached to a site: some of its features, or its reconstruction error."""

    name: str
    #: The features; None for the error.
    features: Index | None = None

    def __str__(self) -> str:
        part = "error" if self.features is None else f"features[{index_text(self.features)}]"
        return f"sae[{Span(self.name)}].{part}"


@dataclass(frozen=True, eq=False)
class Path:
    """An address of a part of a transformer, from `parse_path`.

    >>> from nnsplice import parse_path
    >>> path = parse_path("L5H3.output[-1]")
    >>> str(path)
    'layers[5].heads[3].output[-1]'
    >>> path.position
    -1

    Two parsed paths are equal when their texts are. A path from `ns.expand` has a `site`, its identity in one model;
    two of those are equal when they are the same site and position, however they were spelled.

    Attributes:
        steps: the names from the root down: roles of a portable path, attributes of a native one (without `model`).
        native: whether it follows the model's own attributes.
        tower: `"encoder"` or `"decoder"`, if given.
        value: the value, such as `output` or `weight`; None if left open.
        item: the element of a container value (`attn.output[0][-1]` has item 0).
        position: the token positions; None if left open.
        key: the key positions of a pattern, for an edge of attention.
        sae: the attached SAE whose features or error are meant; None for the site itself.
        site: the identity in one model, set by `ns.expand`.
    """

    steps: tuple[Step, ...]
    native: bool = False
    tower: str | None = None
    value: str | None = None
    item: int | None = None
    position: Position | None = None
    key: Position | None = None
    sae: Dictionary | None = None
    site: Any = field(default=None, repr=False)

    @cached_property
    def _identity(self) -> tuple[Hashable, ...]:
        if self.site is not None:
            return (self.site, self.position, self.key)
        return (self.native, self.tower, self.steps, self.value, self.item, self.position, self.key, self.sae)

    @cached_property
    def _text(self) -> str:
        names = ["model"] if self.native else [self.tower] if self.tower else []
        names += [str(step) for step in self.steps]
        if self.value is not None:
            names.append(self.value)
        elif self.native and self.steps and self.steps[-1].name in NATIVE_VALUES:
            names[-1] = ATTRIBUTE_PREFIX + names[-1]
        if self.sae is not None:
            names.append(str(self.sae))
        brackets = "".join(f"[{index_text(i)}]" for i in (self.item, self.position, self.key) if i is not None)
        # A single bracket is read as a position, so an item without a position is followed by `[]`.
        return ".".join(names) + brackets + ("[]" if self.item is not None and self.position is None else "")

    @cached_property
    def _hash(self) -> int:
        return hash(self._identity)

    def __str__(self) -> str:
        return self._text

    def __repr__(self) -> str:
        return f"Path({self._text!r})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Path):
            return NotImplemented
        return self is other or self._identity == other._identity

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[object, ...]:
        # Pickled without the cached text and hash, as hashes of strings differ between processes.
        parts = (self.steps, self.native, self.tower, self.value, self.item, self.position, self.key, self.sae)
        return (Path, (*parts, self.site))

    @property
    def concrete(self) -> bool:
        """Whether every index of the address is a single number; the position may be open.

        >>> from nnsplice import parse_path
        >>> parse_path("layers[2].output[:]").concrete, parse_path("layers[2:4].output[-1]").concrete
        (True, False)
        """
        indices = [step.index for step in self.steps] + ([] if self.sae is None else [self.sae.features])
        return all(index is None or isinstance(index, int) for index in indices)

    @property
    def place(self) -> Path:
        """The path without its positions: the address of a site."""
        return self if self.position is None else replace(self, position=None, key=None)

    def at(self, position: Position | None) -> Path:
        """The path at another position; a value left open becomes `output`.

        >>> from nnsplice import parse_path
        >>> str(parse_path("layers[2].output").at(-1))
        'layers[2].output[-1]'

        Args:
            position: an int, a slice, a tuple, a span, or None.

        Returns:
            The path.

        Raises:
            PathError: an address without tokens, such as a parameter.
        """
        if position is None:
            return self.place
        if self.value in WEIGHT_VALUES:
            raise PathError(f"{self.value} is a parameter, and parameters have no tokens", path=self)
        if self.steps == (Step("full"),) and not self.native:
            raise PathError("full is the whole model, which has no tokens of its own", path=self)
        if self.value is None and not self.native and self.steps[-1].name == "groups":
            raise PathError("a group has k and v, and no output of its own", path=self, write=f"{self}.k or {self}.v")
        return replace(self, position=position, value=self.value or "output")


#: One path or several, as text or parsed.
Paths = str | Path | Iterable[str | Path]
