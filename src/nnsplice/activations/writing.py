"""Writing captures into a run.

A write replaces: the value is copied, the copy changed and handed to the run. Nothing is changed in place, so no other
reader of the same tensor sees it (the one exception is the stream between attention and MLP; see `access.Held.write`).

What is written where is planned before the first value is waited for, so that every mistake costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from nnsplice import closures, engine, wire
from nnsplice.activations import derived, features
from nnsplice.activations.access import Access, access_to, hold, site_of, value_of
from nnsplice.activations.packs import Pack
from nnsplice.atlas import Kind, host
from nnsplice.atlas.attached import Features
from nnsplice.errors import BadArgument, BadType, DuplicatePath, MissingPosition, OverlappingWrite, ShapeError
from nnsplice.paths import Path, Span
from nnsplice.tokens import Rows, Spans, columns

#: The name of the span that `at=` with a position for each row makes.
AT = "at"
Coefficient = float | Sequence[float] | Tensor
#: A value's place in the run, and the turn of a stop at it.
_Turn = tuple[tuple[int, int], int]


@dataclass(frozen=True, slots=True)
class Entry:
    """What is to be written at one site: its positions and `[prompt, position, width]`."""

    #: The site that was captured, and the one that is written: they differ for derived values.
    path: Path
    target: Path
    positions: tuple[int | Span, ...]
    tensor: Tensor
    #: The site that a derived value is made from, which is read before.
    source: Path | None = None
    #: The SAE that a feature or an error is of.
    sae: Features | None = None

    @property
    def kind(self) -> Kind:
        """What was captured."""
        return site_of(self.path).kind


@dataclass(frozen=True, slots=True)
class Step:
    """One stop of the run: a value that entries are written into, or one that derived entries are made from."""

    access: Access
    entries: tuple[Entry, ...] = ()


@dataclass(slots=True)
class Read:
    """What was read for derived entries on the way."""

    values: dict[object, Tensor] = field(default_factory=dict)


def write(
    model: Any,
    packs: Sequence[Pack],
    coefficient: Coefficient | None,
    *,
    at: int | Sequence[int] | None = None,
    spans: Spans | None = None,
) -> None:
    """Write packs into the run that this block belongs to: replace, or add `coefficient` times."""
    model = engine.as_model(model)
    mediator = engine.worker(model, "writing a capture")
    if not packs:
        raise BadArgument("this capture is empty, so writing it would do nothing", expected="at least one entry")
    packs, spans = moved(packs, at, spans)
    steps = plan(model, packs)
    closures.tell_joint_norms(model, (entry.path for step in steps for entry in step.entries))
    batch = engine.batch_of(model, mediator)
    for step in steps:
        step.access.check_ahead(mediator)
        for entry in step.entries:
            _check_keys(entry, batch)
            _check_rows(entry, batch.rows(step.access.tower))
    factor = None if coefficient is None else _factor(coefficient)
    read = Read()
    for step in steps:
        rows = batch.rows(step.access.tower)
        if not step.entries:
            read.values.update(_sources(step.access, mediator, rows))
            continue
        held = hold(step.access, mediator, rows)
        held.write(written(held.tensor, step.entries, rows, factor, spans, read))


def moved(
    packs: Sequence[Pack], at: int | Sequence[int] | None, spans: Spans | None
) -> tuple[Sequence[Pack], Spans | None]:
    """The packs at another position, if one is given."""
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


# --- plan -------------------------------------------------------------------------------------------------------------


def plan(model: engine.Model, packs: Sequence[Pack]) -> list[Step]:
    """The stops of a run in which these packs are written, in execution order."""
    known = engine.known(model)
    entries = _entries(model, packs, known)
    # A value that is both written and read on the way is written first: derived entries see the run as it goes on.
    stops: list[tuple[_Turn, engine.Rank, Path, Entry | None]] = [
        (*_stop(known, entry.target, 0), entry.target, entry) for entry in entries
    ]
    for source in {entry.source.site: entry.source for entry in entries if entry.source is not None}.values():
        # An expert is read at the output that it is written into, so before that.
        own = [entry.target for entry in entries if entry.source is not None and entry.source.site == source.site]
        first = any(known.rank(target)[:2] == known.rank(source)[:2] for target in own)
        stops.append((*_stop(known, source, -1 if first else 1), source, None))
    stops.sort(key=lambda stop: stop[:2])
    closures.require(model, [path for _, _, path, _ in stops])  # once, as it looks at every parameter
    steps: list[Step] = []
    for _, group in groupby(stops, key=lambda stop: (value_of(stop[2]), stop[0][1])):
        members = list(group)
        written = tuple(entry for *_, entry in members if entry is not None)
        steps.append(Step(access_to(model, tuple(path for _, _, path, _ in members)), written))
    return steps


def _stop(known: engine.Known, path: Path, turn: int) -> tuple[_Turn, engine.Rank]:
    """Where a path stands in a run: its value, its turn at that value, and then its part and position."""
    rank = known.rank(path)
    return (rank[:2], turn), rank


def _entries(model: engine.Model, packs: Sequence[Pack], known: engine.Known) -> list[Entry]:
    where = [(pack, n) for pack in packs for n in range(len(pack.keys))]
    keys = tuple(pack.keys[n] for pack, n in where)
    sites: dict[object, list[tuple[Path, int]]] = {}
    for path, number in known.arrange(keys):
        same = sites.setdefault(path.site, [])
        if any(path.position == earlier.position for earlier, _ in same):
            raise DuplicatePath("in this model this is the same site and position as another key", path=keys[number])
        same.append((path, number))
    derived.refuse_routers(model, [group[0][0] for group in sites.values()])
    return [_entry(model, group, where) for group in sites.values()]


def _entry(model: engine.Model, group: Sequence[tuple[Path, int]], where: Sequence[tuple[Pack, int]]) -> Entry:
    found = [where[number] for _, number in group]
    if all(pack is found[0][0] for pack, _ in found):
        tensor = found[0][0].take([n for _, n in found]).tensor
    else:
        tensor = torch.cat([pack.tensor[:, n : n + 1] for pack, n in found], dim=1)
    path = group[0][0]
    positions: tuple[Any, ...] = tuple(path.position for path, _ in group)
    kind = site_of(path).kind
    if kind == "pattern":
        derived.require_eager(model, path)
        source, target = derived.pattern_places(model, path)
        return Entry(path, target, positions, tensor, source)
    if kind == "ungated":
        return Entry(path, derived.slice_place(path), positions, tensor, derived.gate_place(model, path))
    if kind == "expert":
        return Entry(path, derived.expert_output(path), positions, tensor, path)
    if kind in features.KINDS:
        return Entry(path, host(path), positions, tensor, sae=features.sae_of(model, path))
    if kind == features.TRANSCODED:
        return Entry(path, features.written_at(model, path), positions, tensor, path, features.sae_of(model, path))
    return Entry(path, path, positions, tensor)


def _sources(access: Access, mediator: Any, rows: Rows) -> dict[object, Tensor]:
    if access.kind == "expert":
        made = derived.experts(access, mediator, rows)
        return {path.site: made[site_of(path).index] for path in access.paths}
    tensor = hold(access, mediator, rows).tensor
    if access.kind == features.TRANSCODED:
        return {path.site: tensor for path in access.paths}
    found: dict[object, Tensor] = {}
    for path in access.paths:
        start, stop = site_of(path).columns or (0, tensor.shape[-1])
        found[path.site] = tensor[..., start:stop]
    return found


# --- values -----------------------------------------------------------------------------------------------------------


def _check_keys(entry: Entry, batch: engine.Batch) -> None:
    """Raise for patterns over another tower's tokens where padding stands before prompts."""
    if entry.kind != "pattern" or entry.source is None or site_of(entry.source).tower == site_of(entry.target).tower:
        return
    if any(any(rows.starts or ()) for rows in (batch.encoder, batch.decoder)):
        raise ShapeError(
            "prompts are padded on the left here, and a pattern over the encoder's tokens counts them from the first",
            path=entry.path.place,
            expected="padding on the right, or prompts of one length",
        )


def _check_rows(entry: Entry, rows: Rows) -> None:
    saved = entry.tensor.shape[0]
    if rows.batch is not None and saved not in (1, rows.batch):
        raise ShapeError(
            f"the capture has {saved} rows, the run {rows.batch}",
            path=entry.path.place,
            expected="as many rows as prompts, or one row that serves all",
            write="saved.slice[0:2].apply(model), or saved.mean().apply(model)",
        )


def written(
    values: Tensor,
    entries: Sequence[Entry],
    rows: Rows,
    factor: Tensor | float | None = None,
    spans: Spans | None = None,
    read: Read | None = None,
    before: Tensor | None = None,
) -> Tensor:
    """A copy of `[prompt, token, width]` with all entries in it.

    Args:
        before: what SAEs read, where parts of theirs were written into `values` already.
    """
    batch, width = values.shape[:2]
    before = values if before is None else before
    encoded: dict[tuple[int, int], Tensor] = {}
    for one in check_overlaps(entries, rows, width, spans):
        entry, where = one.entry, one.where
        if entry.sae is not None:
            inputs = before if read is None or entry.source is None else read.values[entry.source.site]
            values = _with_part(entry, where, inputs, values, factor, encoded)
            continue
        part = one.part or (0, values.shape[-1])
        new = entry.tensor
        source = None if read is None or entry.source is None else read.values[entry.source.site]
        if entry.kind == "pattern" and source is not None:
            new = derived.mixed(new, source, rows)
        if entry.kind == "ungated" and source is not None:
            new = new.to(values) * wire.pick(source, where, None).sigmoid().to(values)
        if new.shape[-1] != part[1] - part[0]:
            raise ShapeError(
                f"the capture is {new.shape[-1]} wide, the site {part[1] - part[0]}", path=entry.path.place
            )
        if new.shape[0] not in (1, batch):
            raise ShapeError(f"the capture has {new.shape[0]} rows, the run {batch}", path=entry.path.place)
        new = new.to(values)
        if factor is not None:
            scale = factor.to(values)[:, None, None] if isinstance(factor, Tensor) else factor
            new = wire.pick(values, where, part) + scale * new
        elif entry.kind == "expert" and source is not None:
            # All experts' sum changes by what this one's changes.
            new = wire.pick(values, where, part) + new - wire.pick(source, where, None)
        values = wire.put(values, where, part, new)
    return values


def _with_part(
    entry: Entry,
    where: Any,
    before: Tensor,
    values: Tensor,
    factor: Tensor | float | None,
    encoded: dict[tuple[int, int], Tensor],
) -> Tensor:
    """The values with what a feature, or the error, changes by; parts of one SAE add up.

    Args:
        before: the values that the SAE reads, whatever was written beside it; a transcoder's are of another site.
        encoded: all features of an SAE, by it and what it reads, as many of them may be written.
    """
    assert entry.sae is not None
    site = site_of(entry.path)
    if site.index is None:
        old = features.part(entry.sae, site, before)
    else:
        key = (id(entry.sae), id(before))
        encoded[key] = entry.sae.encode(before) if key not in encoded else encoded[key]
        old = encoded[key][..., site.index : site.index + 1].to(before)
    old = wire.pick(old, where, None)
    new = entry.tensor.to(values)
    if new.shape[-1] != old.shape[-1] or new.shape[0] not in (1, old.shape[0]):
        raise ShapeError(
            f"the capture is {list(new.shape)} here, and what stands there {list(old.shape)}", path=entry.path.place
        )
    if factor is None:
        difference = new - old
    else:
        scale = factor.to(values)[:, None, None] if isinstance(factor, Tensor) else factor
        difference = (scale * new).expand_as(old)
    step = features.moved(entry.sae, site, difference, wire.pick(before, where, None))
    return wire.put(values, where, None, wire.pick(values, where, None) + step)


@dataclass(frozen=True, slots=True)
class Taken:
    """Which numbers of a value an entry means."""

    entry: Entry
    #: The columns of the last axis; None for all.
    part: tuple[int, int] | None
    where: list[int] | Tensor

    @property
    def tokens(self) -> list[list[int]]:
        """The columns by row; one list where they are the same for all."""
        return self.where.tolist() if isinstance(self.where, Tensor) else [self.where]

    def meets(self, other: Taken) -> bool:
        """Whether some number is meant by both."""
        if self.part and other.part and (self.part[0] >= other.part[1] or other.part[0] >= self.part[1]):
            return False
        mine, theirs = self.tokens, other.tokens
        count = max(len(mine), len(theirs))
        pairs = zip(mine * (count // len(mine)), theirs * (count // len(theirs)), strict=True)
        return any(set(a) & set(b) for a, b in pairs)


def check_overlaps(entries: Sequence[Entry], rows: Rows, width: int, spans: Spans | None) -> list[Taken]:
    """Where each entry of a value stands.

    Raises:
        OverlappingWrite: two of them mean the same number; which should win?
    """
    taken: list[Taken] = []
    whole: list[Taken] = []
    for entry in entries:
        one = Taken(entry, site_of(entry.target).columns, columns(entry.positions, rows, width, spans))
        if any(len(set(row)) < len(row) for row in one.tokens):
            raise OverlappingWrite(
                f"two of the positions {', '.join(f'[{p}]' for p in entry.positions)} are the same token of a prompt",
                path=entry.path.place,
                expected="each token once",
            )
        # Experts, and parts of an SAE, add their differences, so any number of them can share a token.
        for other in taken if entry.sae is None else whole:
            added = other.entry.kind == entry.kind == "expert"
            if not added and one.meets(other):
                raise OverlappingWrite(
                    f"{other.entry.path.place} and {entry.path.place} overlap at the same token",
                    expected="one of them, or another position",
                    write=f"saved.subset({str(entry.path.place)!r})",
                )
        taken.append(one)
        if entry.sae is None:
            whole.append(one)
    return taken


def _factor(coefficient: Coefficient) -> Tensor | float:
    if isinstance(coefficient, Tensor):
        if coefficient.dim() > 1:
            raise ShapeError(f"a coefficient of shape {list(coefficient.shape)}", expected="a number, or one per row")
        return coefficient if coefficient.dim() else float(coefficient)
    if isinstance(coefficient, int | float):
        return float(coefficient)
    if isinstance(coefficient, Sequence) and not isinstance(coefficient, str):
        return torch.tensor(list(coefficient), dtype=torch.float64)
    raise BadType(f"a coefficient of type {type(coefficient).__name__}", expected="a number, or one for each row")
