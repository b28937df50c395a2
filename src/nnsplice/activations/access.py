"""The modules and tensors that hold a list of sites; used by capture and replay.

A run is asked once for each value, whatever number of heads and positions of it is wanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from torch import Tensor, nn

from nnsplice import closures, engine, wire
from nnsplice.atlas import Kind, Site, unwrap
from nnsplice.errors import LateUpdate, MissingPosition, RefusedPlace, ShapeError
from nnsplice.paths import Path, Span, position_rank
from nnsplice.tokens import Rows, Spans, concrete


@dataclass(frozen=True, slots=True)
class Access:
    """One value of the run and the sites in it."""

    place: engine.Place
    item: int | None
    kind: Kind
    tower: str
    paths: tuple[Path, ...]
    root: nn.Module

    @property
    def name(self) -> str:
        """How a message calls it."""
        return str(self.paths[0].place)

    def check_ahead(self, mediator: Any) -> None:
        """Raise, while it costs nothing, that the run has gone by."""
        if self.place.is_past(mediator):
            raise LateUpdate(
                f"{self.name} has already run",
                expected="sites in the order of the forward pass; within one call nnsplice sorts them itself",
                write="one call with all the paths, made before the block asks for a later site",
            )


def site_of(path: Path) -> Site:
    """The site of a path that `expand` returned."""
    assert isinstance(path.site, Site), f"{path} was not expanded"
    return path.site


def accesses(model: engine.Model, paths: Sequence[Path]) -> list[Access]:
    """Group sites, given in execution order, by the value that they stand in.

    Raises:
        RefusedPlace: on this model they are not what they are called.
    """
    closures.require(model, paths)
    return [access_to(model, tuple(group)) for _, group in groupby(paths, key=value_of)]


def value_of(path: Path) -> tuple[object, ...]:
    """What two sites have in common that stand in one value of the run."""
    site = site_of(path)
    return (*site.location, site.item, site.kind, site.sae)


def access_to(model: engine.Model, paths: tuple[Path, ...]) -> Access:
    """The access to the one value that these sites stand in; `closures.require` was called for them."""
    site = site_of(paths[0])
    return Access(engine.place(model, site), site.item, site.kind, site.tower, paths, unwrap(model))


def require_positions(paths: Sequence[Path]) -> None:
    """Raise for a site without token positions."""
    for path in paths:
        if path.position is None:
            raise MissingPosition(
                "which tokens?",
                path=path,
                expected="token positions in the last bracket",
                write=f"{path}[-1] for the last token, {path}[:] for all",
            )


@dataclass(frozen=True, slots=True)
class Held:
    """A value of the run while the run stands still at it: its tokens as `[prompt, token, width]`, and the way back."""

    access: Access
    mediator: Any
    raw: Any
    tensor: Tensor
    #: Set where the value holds the rows of other invokes too, its tokens flat.
    scope: engine.Scope | None = None
    #: Where it was gathered, the tensor that is spread over processes.
    spread: Any = None

    def write(self, new: Tensor) -> None:
        """Let the run go on with other values for these prompts."""
        access, raw = self.access, self.raw
        if self.spread is not None:
            if access.kind == "stream":
                raise RefusedPlace("this part of the stream is spread over processes, and cannot be written in place",
                                   path=access.name, expected="layers[i].input or layers[i].output")  # fmt: skip
            self._put(engine.spread_like(new.flatten(0, 1) if self.spread.dim() == 2 else new, self.spread))
            return
        if access.kind == "stream":
            # The one site where the live tensor is changed: the stream itself, which the skip path carries on beside
            # the module whose input it is met at. A replaced input would change what the module reads, not the stream.
            self.tensor.copy_(new)
            return
        inner = engine.first_input(raw) if access.place.end == "input" else raw
        held = wire.unpack(inner, access.item)
        if self.scope is not None:
            everyone = held.unflatten(0, (self.scope.total, -1)).clone()
            everyone[self.scope.start : self.scope.start + self.scope.size] = new
            new = everyone.flatten(0, 1)
        elif held.dim() != 3:
            new = wire.as_held(new, held)
        elif held.shape[0] != new.shape[0] and engine.scope_of(self.mediator) is not None:
            raise RefusedPlace(
                "all prompts of the batch share this value, so it cannot be written for some of them",
                path=access.name,
                expected="a site with rows of its own, or one prompt in the trace",
            )
        self._put(new)

    def _put(self, new: Tensor) -> None:
        """Let the run go on with another tensor."""
        access, raw = self.access, self.raw
        inner = engine.first_input(raw) if access.place.end == "input" else raw
        packed = wire.repack(inner, access.item, new)
        access.place.write(
            self.mediator, engine.with_first_input(raw, packed) if access.place.end == "input" else packed
        )


def hold(access: Access, mediator: Any, rows: Rows) -> Held:
    """Wait for the value and open it."""
    raw = access.place.read(mediator)
    try:
        inner = engine.first_input(raw) if access.place.end == "input" else raw
        inner, spread = engine.whole(access.root, inner, access.item, access.name)
        tensor = wire.unpack(inner, access.item)
        if spread is not None:
            return Held(access, mediator, raw, wire.as_rows(tensor, rows.batch), spread=spread)
        scope = engine.scope_of(mediator)
        if scope is not None and tensor.dim() == 2 and tensor.shape[0] >= scope.total:
            # Tokens of all invokes in one flat list, which nnsight does not cut into rows.
            everyone = tensor.unflatten(0, (scope.total, -1))
            return Held(access, mediator, raw, everyone[scope.start : scope.start + scope.size], scope)
        held = wire.as_rows(tensor, rows.batch, site_of(access.paths[0]).columns is not None)
        if tensor.dim() != 3 and rows.new not in (None, held.shape[1]):
            raise ValueError(f"a value of shape {list(tensor.shape)} is not [prompt, token, width]")
        return Held(access, mediator, raw, held)
    except (ValueError, IndexError, RuntimeError) as error:
        raise ShapeError(str(error), path=access.name, expected="a value with a row for each prompt's tokens") from None


def keys_of(paths: Sequence[Path], rows: Rows, width: int, spans: Spans | None) -> list[tuple[Path, ...]]:
    """The keys of each site at one value: every position by itself, each once."""
    sites: dict[object, dict[int | Span, Path]] = {}
    for path in paths:
        assert path.position is not None
        for position in concrete(path.position, rows, width, spans):
            sites.setdefault(path.site, {}).setdefault(
                position, path if path.position == position else path.at(position)
            )
    return [tuple(keys[p] for p in sorted(keys, key=position_rank)) for keys in sites.values()]
