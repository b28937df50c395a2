"""Rows with frozen branches, and the tokens of each that its edits move."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from nnsplice.activations.access import site_of
from nnsplice.atlas import Block, Site
from nnsplice.packed.recording import Recording
from nnsplice.packed.rows import PreparedRow, Row, SiteLocator, prepared
from nnsplice.paths import Path

#: What a row reads, where its edit moved it: positions, and `[position, width]`.
Moved = tuple[tuple[int, ...], Tensor]


@dataclass(frozen=True, slots=True)
class FrozenBranch:
    """One attention or MLP: its layer, and the site of what it adds to the stream."""

    layer: int
    added: Path

    @property
    def site(self) -> Site:
        """The site as the model has it."""
        return site_of(self.added)


@dataclass(frozen=True, slots=True)
class FrozenRow:
    """A row, and the branches that its edits are in: these run freely, all others are frozen."""

    row: Row
    free: frozenset[FrozenBranch]


@dataclass(frozen=True)
class MovedRow:
    """A row whose stream an edit moves at some tokens, which are `prepared.changed`."""

    prepared: PreparedRow
    free: frozenset[FrozenBranch]
    #: Whether no token reads what is moved at another one.
    independent: bool

    @property
    def tokens(self) -> tuple[int, ...]:
        """The tokens whose stream may be moved, as far as that is wanted."""
        return self.prepared.changed


def moved_row(recording: Recording, locator: SiteLocator, frozen: FrozenRow) -> MovedRow:
    """The tokens of a row that its edits move, as far as these are wanted."""
    row = prepared(frozen.row, locator)
    wanted = {position for read in row.reads for position in read.what.positions} | {row.row.end}
    sent = {position for edit in row.edits for position in edit.what.positions}
    independent = not recording.whole.calls and _is_independent(row, recording)
    tokens = sorted(sent & wanted) if independent else range(row.start, row.last + 1) if row.edits else ()
    return MovedRow(replace(row, changed=tuple(tokens), changed_only=independent), frozen.free, independent)


def _is_independent(row: PreparedRow, recording: Recording) -> bool:
    """Whether no token of the row reads what is moved at another one."""
    inside = [edit for edit in row.edits if edit.where not in ("input", "output")]
    # A second edited site would be reached by the first, and attention then mixes its tokens.
    if len({edit.layer for edit in inside}) > 1 or (inside and len(inside) < len(row.edits)):
        return False
    if any(edit.where == "keys" for edit in inside):
        return False
    return not any(_mixed(read.site, recording.tower.blocks[read.layer]) for read in row.reads)


def _mixed(site: Site, block: Block) -> bool:
    """Whether attention has mixed tokens there. Of what stands in it, only the projections are known to come before."""
    home = block.mixes
    if home is None or not (site.module == home or site.module.startswith(f"{home}.")):
        return site.module in (block.mixer_added, block.o)
    if site.module == home:
        return site.end == "output"
    return site.module not in (block.q, block.k, block.v, block.fused)
