"""Rows with frozen branches, and the tokens whose stream their edits change."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from nnsplice.activations.access import site_of
from nnsplice.atlas import Block, Site
from nnsplice.packed.recording import Recording
from nnsplice.packed.rows import PreparedRow, Row, SiteLocator, prepared
from nnsplice.paths import Path

#: The changed values of a read: positions, and `[position, width]`.
Moved = tuple[tuple[int, ...], Tensor]


@dataclass(frozen=True, slots=True)
class FrozenBranch:
    """One attention or MLP: its layer, and the site of its output as added to the stream."""

    layer: int
    added: Path

    @property
    def site(self) -> Site:
        """The site of that output in the model."""
        return site_of(self.added)


@dataclass(frozen=True, slots=True)
class FrozenRow:
    """A row, and the branches that its edits are in (`free`); all others are frozen."""

    row: Row
    free: frozenset[FrozenBranch]


@dataclass(frozen=True)
class MovedRow:
    """A row with the tokens whose stream its edits may change, `prepared.changed`."""

    prepared: PreparedRow
    free: frozenset[FrozenBranch]
    #: Whether a changed token has no effect on other tokens, as far as the row reads.
    independent: bool

    @property
    def tokens(self) -> tuple[int, ...]:
        """The tokens whose stream may change and is needed."""
        return self.prepared.changed


def moved_row(recording: Recording, locator: SiteLocator, frozen: FrozenRow) -> MovedRow:
    """A row with the tokens whose stream its edits may change, as far as the row reads them."""
    row = prepared(frozen.row, locator)
    wanted = {position for read in row.reads for position in read.what.positions} | {row.row.end}
    edited = {position for edit in row.edits for position in edit.what.positions}
    independent = not recording.whole.calls and _is_independent(row, recording)
    tokens = sorted(edited & wanted) if independent else range(row.start, row.last + 1) if row.edits else ()
    return MovedRow(replace(row, changed=tuple(tokens), changed_only=independent), frozen.free, independent)


def _is_independent(row: PreparedRow, recording: Recording) -> bool:
    """Whether a changed token of the row has no effect on its reads at other tokens."""
    inside = [edit for edit in row.edits if edit.where not in ("input", "output")]
    # The first edited site reaches a second one, where attention mixes tokens.
    if len({edit.layer for edit in inside}) > 1 or (inside and len(inside) < len(row.edits)):
        return False
    if any(edit.where == "keys" for edit in inside):
        return False
    return not any(_mixed(read.site, recording.tower.blocks[read.layer]) for read in row.reads)


def _mixed(site: Site, block: Block) -> bool:
    """Whether a site is after the mixing of tokens. Inside attention, only q, k and v are known to be before it."""
    home = block.mixes
    if home is None or not (site.module == home or site.module.startswith(f"{home}.")):
        return site.module in (block.mixer_added, block.o)
    if site.module == home:
        return site.end == "output"
    return site.module not in (block.q, block.k, block.v, block.fused)
