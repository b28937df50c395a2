"""The content of a capture: packs, and their provenance.

A pack is the captured positions of one site, stacked in one tensor, with a key (site and position) for each. Entries of
one site stay together this way: one gather from the model, one write, one step of arithmetic for all positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nnsplice.engine import Rank
from nnsplice.errors import BadType, DuplicatePath, KeyMismatch, MissingPosition, PathError, ShapeError, named
from nnsplice.paths import Path, Span, parse_path
from nnsplice.tokens import absolute

#: The span name of a mean over positions.
MEAN = "mean"


@dataclass(frozen=True, eq=False, slots=True)
class Pack:
    """The captured positions of one site: a key for each, and the values `[prompt, position, width]`."""

    keys: tuple[Path, ...]
    tensor: Tensor

    def take(self, indices: Sequence[int]) -> Pack:
        """Only these positions; contiguous ones as a slice."""
        keys = tuple(self.keys[i] for i in indices)
        if list(indices) == list(range(indices[0], indices[0] + len(indices))):
            return Pack(keys, _owned(self.tensor[:, indices[0] : indices[0] + len(indices)]))
        return Pack(keys, self.tensor[:, list(indices)])

    def take_rows(self, rows: Sequence[int]) -> Pack:
        """Only these prompts; contiguous ones as a slice."""
        whole = bool(rows) and list(rows) == list(range(rows[0], rows[0] + len(rows)))
        return self.with_tensor(
            _owned(self.tensor[rows[0] : rows[0] + len(rows)]) if whole else self.tensor[list(rows)]
        )

    def with_tensor(self, tensor: Tensor) -> Pack:
        """The same keys with other values."""
        return Pack(self.keys, tensor)


def _owned(view: Tensor) -> Tensor:
    """A copy of a part of a tensor, so that a kept row does not keep the memory of the batch."""
    if view.untyped_storage().nbytes() == view.numel() * view.element_size():
        return view
    return view.clone(memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class Provenance:
    """Where a capture comes from; None where it is not known."""

    model: str | None = None
    revision: str | None = None
    prompts: tuple[str, ...] | None = None
    tokens: tuple[tuple[int, ...], ...] | None = None
    spans: Mapping[str, tuple[tuple[int, int], ...]] | None = None
    #: The identities of SAEs whose features were captured, by name; None if there are none.
    saes: Mapping[str, Any] | None = None
    #: A digest of the images or the sound of each prompt, None for one of text; None where all are of text.
    images: tuple[str | None, ...] | None = None

    def rows(self, rows: Sequence[int]) -> Provenance:
        """The provenance of these rows only."""
        return replace(
            self,
            prompts=None if self.prompts is None else tuple(self.prompts[row] for row in rows),
            tokens=None if self.tokens is None else tuple(self.tokens[row] for row in rows),
            spans=None
            if self.spans is None
            else {name: tuple(bounds[row] for row in rows) for name, bounds in self.spans.items()},
            images=None if self.images is None else tuple(self.images[row] for row in rows),
        )

    def without_rows(self) -> Provenance:
        """The provenance after rows were merged into one."""
        return Provenance(self.model, self.revision, saes=self.saes)

    def joined(self, other: Provenance) -> Provenance:
        """The provenance of a result of two captures: what they have in common."""
        return Provenance(
            self.model if self.model == other.model else None,
            self.revision if self.revision == other.revision else None,
            self.prompts if self.prompts == other.prompts else None,
            self.tokens if self.tokens == other.tokens else None,
            self.spans if self.spans == other.spans else None,
            self.saes_with(other),
            self.images if self.images == other.images else None,
        )

    def saes_with(self, other: Provenance) -> Mapping[str, Any] | None:
        """The SAEs of both.

        Raises:
            KeyMismatch: one name means two of them.
        """
        mine, theirs = self.saes or {}, other.saes or {}
        if name := next((name for name in mine if theirs.get(name, mine[name]) != mine[name]), None):
            raise KeyMismatch(
                f"features of two SAEs that both had the name {name!r}", expected="captures with one SAE of a name"
            )
        return {**mine, **theirs} or None


def lengths(packs: Sequence[Pack], origin: Provenance) -> list[int] | None:
    """The number of tokens of each prompt; None if not known, or if the sites are of two towers."""
    towers = {getattr(pack.keys[0].site, "tower", pack.keys[0].tower or "decoder") for pack in packs}
    return None if origin.tokens is None or len(towers) > 1 else [len(row) for row in origin.tokens]


def common_length(packs: Sequence[Pack], origin: Provenance) -> int | None:
    """The number of tokens of every prompt, if it is known and the same."""
    found = set(lengths(packs, origin) or ())
    return found.pop() if len(found) == 1 else None


def positions(packs: Sequence[Pack], origin: Provenance) -> dict[str, list[int] | None]:
    """The token position of each entry in each prompt; None if not known."""
    known = lengths(packs, origin)
    found: dict[str, list[int] | None] = {}
    for key in (key for pack in packs for key in pack.keys):
        if known is not None and isinstance(key.position, int | Span):
            found[str(key)] = absolute(key.position, known, origin.spans)
        else:
            found[str(key)] = None
    return found


def combined_origin(a: tuple[Provenance, int], b: tuple[Provenance, int]) -> Provenance:
    """The provenance of a result computed from two captures, given with their numbers of rows."""
    (first, rows), (second, other_rows) = a, b
    if rows == other_rows:
        return first.joined(second)
    # One row was combined with every prompt of the other capture.
    return replace(first if rows > other_rows else second, saes=first.saes_with(second))


def from_pairs(pairs: Iterable[tuple[str | Path, Tensor]]) -> list[Pack]:
    """Packs of paths with tensors `[prompt, width]`.

    Raises:
        BadType: something other than pairs.
    """
    pairs = list(pairs)
    for pair in pairs:
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise BadType(f"{named(pair)} is no pair", expected="(path, tensor)", write="from_pairs(*pairs)")
    return from_entries((parse_path(path), tensor) for path, tensor in pairs)


def from_entries(entries: Iterable[tuple[Path, Tensor]]) -> list[Pack]:
    """Packs of single entries `[prompt, width]`, in the order of their sites' first entries."""
    groups: dict[object, list[tuple[Path, Tensor]]] = {}
    keys: set[Path] = set()
    rows: int | None = None
    for key, tensor in entries:
        check_key(key)
        if not isinstance(tensor, Tensor) or tensor.dim() != 2:
            found = f"shape {list(tensor.shape)}" if isinstance(tensor, Tensor) else f"{named(tensor)}"
            raise ShapeError(f"an entry of {found} is not [prompt, width]", path=key)
        if not tensor.shape[0]:
            raise ShapeError("an entry without rows", path=key, expected="[prompt, width] of at least one prompt")
        if rows is not None and tensor.shape[0] != rows:
            raise ShapeError(f"{tensor.shape[0]} rows where the entries before have {rows}", path=key)
        rows = tensor.shape[0]
        if key in keys:
            raise DuplicatePath("the same site and position twice", path=key)
        keys.add(key)
        # Entries are grouped by site if the keys are located in a model, else by text.
        groups.setdefault(key.site or str(key.place), []).append((key, tensor))
    return [_stack(group) for group in groups.values()]


def _stack(entries: list[tuple[Path, Tensor]]) -> Pack:
    widths = {tensor.shape[1] for _, tensor in entries}
    if len(widths) > 1:
        raise ShapeError(f"positions of one site have widths {sorted(widths)}", path=entries[0][0].place)
    return Pack(tuple(key for key, _ in entries), torch.stack([tensor for _, tensor in entries], dim=1))


def check_key(key: Path) -> None:
    """Raise for a path that does not name one token position of one site."""
    if not key.concrete:
        raise PathError("a key names one site", path=key, expected="a number in every bracket")
    if key.position is None:
        raise MissingPosition("a key names one token position", path=key, write=str(key.at(-1)))
    if not isinstance(key.position, int | Span):
        raise PathError("a key names one token position", path=key, write=str(key.at(-1)))


def ranked(packs: Sequence[Pack], rank: Callable[[Path], Rank]) -> list[Pack]:
    """Packs in the order of the forward pass, and the positions of each in order."""
    inside = []
    for pack in packs:
        indices = sorted(range(len(pack.keys)), key=lambda n: rank(pack.keys[n]))
        inside.append(pack if indices == list(range(len(indices))) else pack.take(indices))
    return sorted(inside, key=lambda pack: rank(pack.keys[0]))
