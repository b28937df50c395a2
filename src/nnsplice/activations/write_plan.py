"""The plan of a write: which sites are written, in which order of the run, and from which other values.

Everything that can be wrong is checked here, before the first value of the run is waited for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from nnsplice import closures, engine
from nnsplice.activations import derived, features
from nnsplice.activations.access import Access, access_to, site_of, value_key
from nnsplice.activations.packs import Pack
from nnsplice.atlas import SiteKind, host
from nnsplice.atlas.attached import Features
from nnsplice.errors import BadArgument, DuplicatePath, MissingPosition, OverlappingWrite, ShapeError
from nnsplice.paths import Path, Span
from nnsplice.tokens import Rows, Spans, columns

#: The name of the span that `at=` with a position for each row makes.
AT = "at"


@dataclass(frozen=True, slots=True)
class SiteWrite:
    """A write to one site: the positions and `[prompt, position, width]`."""

    #: The site that was captured, and the one that is written: they differ for derived values.
    path: Path
    target: Path
    positions: tuple[int | Span, ...]
    tensor: Tensor
    #: The site that a derived value is computed from, which is read before.
    source: Path | None = None
    #: The SAE of a feature or an error.
    sae: Features | None = None

    @property
    def kind(self) -> SiteKind:
        """The kind of the captured site."""
        return site_of(self.path).kind


@dataclass(frozen=True, slots=True)
class PlanStep:
    """One value of the run: it is written, or with no writes it is read as the source of derived writes."""

    access: Access
    writes: tuple[SiteWrite, ...] = ()


@dataclass(frozen=True, slots=True)
class WriteTarget:
    """The numbers of a value that a write replaces."""

    write: SiteWrite
    #: The columns of the last axis; None for all.
    part: tuple[int, int] | None
    #: The token columns: `[position]`, or `[prompt, position]`.
    where: list[int] | Tensor

    @property
    def tokens(self) -> list[list[int]]:
        """The token columns by row; one list where they are the same for all."""
        return self.where.tolist() if isinstance(self.where, Tensor) else [self.where]

    def overlaps(self, other: WriteTarget) -> bool:
        """Whether both replace some number."""
        if self.part and other.part and (self.part[0] >= other.part[1] or other.part[0] >= self.part[1]):
            return False
        mine, theirs = self.tokens, other.tokens
        count = max(len(mine), len(theirs))
        pairs = zip(mine * (count // len(mine)), theirs * (count // len(theirs)), strict=True)
        return any(set(a) & set(b) for a, b in pairs)


def at_position(
    packs: Sequence[Pack], at: int | Sequence[int] | None, spans: Spans | None
) -> tuple[Sequence[Pack], Spans | None]:
    """The packs moved to the positions of `at=`, and the spans of the run; as they are where it is None."""
    if at is None:
        for pack in packs:
            for key in pack.keys:
                if isinstance(key.position, Span) and (spans is None or key.position.name not in spans):
                    raise MissingPosition(
                        f"[{key.position}] names no token of this run",
                        path=key,
                        expected="at= a position of the run, or one for each row",
                        write="saved.apply(model, at=-1)",
                    )
        return packs, spans
    for pack in packs:
        if len(pack.keys) > 1:
            raise BadArgument(
                f"{len(pack.keys)} positions of one site cannot all be written at one",
                path=pack.keys[0].place,
                expected="one position for each site when at= is given",
                write="saved.subset(...) or saved.mean('position')",
            )
    if isinstance(at, int):
        return [Pack((pack.keys[0].at(at),), pack.tensor) for pack in packs], spans
    if any(not isinstance(p, int) or p < 0 for p in at):
        raise BadArgument(f"at={at!r}", expected="a position, or for each row one that counts from its start (>= 0)")
    moved = [Pack((pack.keys[0].at(Span(AT, 0)),), pack.tensor) for pack in packs]
    return moved, {AT: [(p, p + 1) for p in at]}


def plan_write(model: engine.Model, packs: Sequence[Pack]) -> list[PlanStep]:
    """The values of a run that are written or read to write these packs, in execution order."""
    known = engine.map_of(model)
    writes = _site_writes(model, packs, known)
    #: Rank of the value, turn at that value, rank of the path, the path, and its write (None: it is read).
    stops: list[tuple[tuple[int, int], int, engine.Rank, Path, SiteWrite | None]] = []
    # A value that is both written and read is written first (turn 0, then 1): derived writes see the changed run.
    for write in writes:
        rank = known.rank(write.target)
        stops.append((rank[:2], 0, rank, write.target, write))
    for source in {write.source.site: write.source for write in writes if write.source is not None}.values():
        # An expert is read at the output that it is written into, so before that (turn -1).
        targets = [write.target for write in writes if write.source is not None and write.source.site == source.site]
        rank = known.rank(source)
        first = any(known.rank(target)[:2] == rank[:2] for target in targets)
        stops.append((rank[:2], -1 if first else 1, rank, source, None))
    stops.sort(key=lambda stop: stop[:3])
    closures.require(model, [path for *_, path, _ in stops])  # once, as it looks at every parameter
    steps: list[PlanStep] = []
    for _, group in groupby(stops, key=lambda stop: (value_key(stop[3]), stop[1])):
        members = list(group)
        written = tuple(write for *_, write in members if write is not None)
        steps.append(PlanStep(access_to(model, tuple(path for *_, path, _ in members)), written))
    return steps


def _site_writes(model: engine.Model, packs: Sequence[Pack], known: engine.ModelMap) -> list[SiteWrite]:
    entries = [(pack, n) for pack in packs for n in range(len(pack.keys))]
    sites: dict[object, list[tuple[Path, int]]] = {}
    for path, number in known.arrange(tuple(pack.keys[n] for pack, n in entries)):
        same = sites.setdefault(path.site, [])
        if any(path.position == earlier.position for earlier, _ in same):
            pack, n = entries[number]
            raise DuplicatePath("in this model this is the same site and position as another key", path=pack.keys[n])
        same.append((path, number))
    derived.refuse_routers(model, [group[0][0] for group in sites.values()])
    return [
        _site_write(model, [path for path, _ in group], [entries[number] for _, number in group])
        for group in sites.values()
    ]


def _site_write(model: engine.Model, paths: Sequence[Path], entries: Sequence[tuple[Pack, int]]) -> SiteWrite:
    """The write of several positions of one site."""
    first = entries[0][0]
    if all(pack is first for pack, _ in entries):
        tensor = first.take([n for _, n in entries]).tensor
    else:
        tensor = torch.cat([pack.tensor[:, n : n + 1] for pack, n in entries], dim=1)
    path = paths[0]
    positions: tuple[Any, ...] = tuple(path.position for path in paths)
    kind = site_of(path).kind
    if kind == "pattern":
        derived.require_eager(model, path)
        source, target = derived.pattern_places(model, path)
        return SiteWrite(path, target, positions, tensor, source)
    if kind == "ungated":
        return SiteWrite(path, derived.slice_place(path), positions, tensor, derived.gate_place(model, path))
    if kind == "expert":
        return SiteWrite(path, derived.expert_output(path), positions, tensor, path)
    if kind in features.KINDS:
        return SiteWrite(path, host(path), positions, tensor, sae=features.sae_of(model, path))
    if kind == features.TRANSCODED:
        target = features.written_at(model, path)
        return SiteWrite(path, target, positions, tensor, path, features.sae_of(model, path))
    return SiteWrite(path, path, positions, tensor)


# --- checks -----------------------------------------------------------------------------------------------------------


def check_write(write: SiteWrite, tower: str, batch: engine.Batch) -> None:
    """Raise for another number of rows than the run's, and for cross-attention patterns with padding on the left.

    Args:
        tower: the tower of the written value.
    """
    is_cross = write.kind == "pattern" and write.source is not None and site_of(write.source).tower != tower
    if is_cross and any(any(rows.starts or ()) for rows in (batch.encoder, batch.decoder)):
        raise ShapeError(
            "prompts are padded on the left here, and a pattern over the encoder's tokens counts them from the first",
            path=write.path.place,
            expected="padding on the right, or prompts of one length",
        )
    saved, rows = write.tensor.shape[0], batch.rows(tower).batch
    if rows is not None and saved not in (1, rows):
        raise ShapeError(
            f"the capture has {saved} rows, the run {rows}",
            path=write.path.place,
            expected="as many rows as prompts, or one row that serves all",
            write="saved.slice[0:2].apply(model), or saved.mean().apply(model)",
        )


def write_targets(writes: Sequence[SiteWrite], rows: Rows, width: int, spans: Spans | None) -> list[WriteTarget]:
    """The numbers that each write to a value replaces.

    Raises:
        OverlappingWrite: two writes replace the same number.
    """
    targets: list[WriteTarget] = []
    #: Without parts of SAEs, which add their differences, so that several can share a token.
    replacing: list[WriteTarget] = []
    for write in writes:
        target = WriteTarget(write, site_of(write.target).columns, columns(write.positions, rows, width, spans))
        if any(len(set(row)) < len(row) for row in target.tokens):
            raise OverlappingWrite(
                f"two of the positions {', '.join(f'[{p}]' for p in write.positions)} are the same token of a prompt",
                path=write.path.place,
                expected="each token once",
            )
        for other in targets if write.sae is None else replacing:
            added = other.write.kind == write.kind == "expert"  # experts too add their differences
            if not added and target.overlaps(other):
                raise OverlappingWrite(
                    f"{other.write.path.place} and {write.path.place} overlap at the same token",
                    expected="one of them, or another position",
                    write=f"saved.subset({str(write.path.place)!r})",
                )
        targets.append(target)
        if write.sae is None:
            replacing.append(target)
    return targets
