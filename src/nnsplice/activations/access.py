"""The values of a run that contain a list of sites; used by captures and writes.

Each value is read once, however many of its heads and positions are wanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from torch import Tensor, nn

from nnsplice import closures, engine, wire
from nnsplice.atlas import Site, SiteKind, unwrap
from nnsplice.errors import LateUpdate, MissingPosition, RefusedPlace, ShapeError
from nnsplice.paths import Path, Span, position_rank
from nnsplice.tokens import Rows, Spans, concrete


@dataclass(frozen=True, slots=True)
class Access:
    """One value of the run and the wanted sites in it."""

    place: engine.TracedEnd
    item: int | None
    kind: SiteKind
    tower: str
    paths: tuple[Path, ...]
    root: nn.Module

    @property
    def name(self) -> str:
        """The address in error messages."""
        return str(self.paths[0].place)

    def check_not_past(self, mediator: Any) -> None:
        """Raise if the run has already passed this value."""
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
    """Group sites, given in execution order, by the value that contains them.

    Raises:
        RefusedPlace: on this model a site is not what its address says.
    """
    closures.require(model, paths)
    return [access_to(model, tuple(group)) for _, group in groupby(paths, key=value_key)]


def value_key(path: Path) -> tuple[object, ...]:
    """Equal for sites in the same value of the run."""
    site = site_of(path)
    return (*site.location, site.item, site.kind, site.sae)


def access_to(model: engine.Model, paths: tuple[Path, ...]) -> Access:
    """The access to the value that contains all these sites, for which `closures.require` was called."""
    site = site_of(paths[0])
    return Access(engine.traced_end(model, site), site.item, site.kind, site.tower, paths, unwrap(model))


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
class LiveValue:
    """A value of the run at which the run waits: its tokens as `[prompt, token, width]`, and a way to replace it."""

    access: Access
    mediator: Any
    raw: Any
    tensor: Tensor
    #: Set if the value also contains the rows of other invokes, with all tokens in one flat list.
    scope: engine.Scope | None = None
    #: The sharded tensor of all processes, if the value was gathered from one.
    sharded: Any = None

    def write(self, new: Tensor) -> None:
        """Replace the values of these prompts in the run."""
        access, raw = self.access, self.raw
        if self.sharded is not None:
            if access.kind == "stream":
                raise RefusedPlace("this part of the stream is spread over processes, and cannot be written in place",
                                   path=access.name, expected="layers[i].input or layers[i].output")  # fmt: skip
            self._replace(engine.shard_like(new.flatten(0, 1) if self.sharded.dim() == 2 else new, self.sharded))
            return
        if access.kind == "stream":
            # The only write in place: the skip path carries this very tensor past the module whose input it is. A
            # replaced input would change what the module reads, and not the stream.
            self.tensor.copy_(new)
            return
        inner = engine.first_input(raw) if access.place.end == "input" else raw
        old = wire.unpack(inner, access.item)
        if self.scope is not None:
            all_rows = old.unflatten(0, (self.scope.total, -1)).clone()
            all_rows[self.scope.start : self.scope.start + self.scope.size] = new
            new = all_rows.flatten(0, 1)
        elif old.dim() != 3:
            new = wire.as_held(new, old)
        elif old.shape[0] != new.shape[0] and engine.scope_of(self.mediator) is not None:
            raise RefusedPlace(
                "all prompts of the batch share this value, so it cannot be written for some of them",
                path=access.name,
                expected="a site with rows of its own, or one prompt in the trace",
            )
        self._replace(new)

    def _replace(self, new: Tensor) -> None:
        """Replace the whole tensor."""
        access, raw = self.access, self.raw
        inner = engine.first_input(raw) if access.place.end == "input" else raw
        packed = wire.repack(inner, access.item, new)
        access.place.write(
            self.mediator, engine.with_first_input(raw, packed) if access.place.end == "input" else packed
        )


def live_value(access: Access, mediator: Any, rows: Rows) -> LiveValue:
    """Wait until the run reaches a value."""
    raw = access.place.read(mediator)
    try:
        inner = engine.first_input(raw) if access.place.end == "input" else raw
        inner, sharded = engine.gather(access.root, inner, access.item, access.name)
        tensor = wire.unpack(inner, access.item)
        if sharded is not None:
            return LiveValue(access, mediator, raw, wire.as_rows(tensor, rows.batch), sharded=sharded)
        scope = engine.scope_of(mediator)
        if scope is not None and tensor.dim() == 2 and tensor.shape[0] >= scope.total:
            # nnsight does not cut a flat list of all invokes' tokens into rows.
            all_rows = tensor.unflatten(0, (scope.total, -1))
            return LiveValue(access, mediator, raw, all_rows[scope.start : scope.start + scope.size], scope)
        by_row = wire.as_rows(tensor, rows.batch, site_of(access.paths[0]).columns is not None)
        if tensor.dim() != 3 and rows.new not in (None, by_row.shape[1]):
            raise ValueError(f"a value of shape {list(tensor.shape)} is not [prompt, token, width]")
        return LiveValue(access, mediator, raw, by_row)
    except (ValueError, IndexError, RuntimeError) as error:
        raise ShapeError(str(error), path=access.name, expected="a value with a row for each prompt's tokens") from None


def keys_of(paths: Sequence[Path], rows: Rows, width: int, spans: Spans | None) -> list[tuple[Path, ...]]:
    """The keys of each site in one value: a path for each single position, without repeats."""
    sites: dict[object, dict[int | Span, Path]] = {}
    for path in paths:
        assert path.position is not None
        for position in concrete(path.position, rows, width, spans):
            sites.setdefault(path.site, {}).setdefault(
                position, path if path.position == position else path.at(position)
            )
    return [tuple(keys[p] for p in sorted(keys, key=position_rank)) for keys in sites.values()]
