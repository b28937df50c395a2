"""Rows: a prompt, the block where it starts, and its edits.

A row is one prompt with some edits: sites that get other values on the way. It asks for the state that leaves the last
block at one token, for values of sites behind the edits, or for both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from nnsplice import engine
from nnsplice.activations import features
from nnsplice.activations.access import site_of
from nnsplice.atlas import Block, Site, Tower
from nnsplice.errors import OverlappingWrite
from nnsplice.packed.sae_edits import PartChange, home, is_part
from nnsplice.paths import Path

#: What becomes of values: `([token, width] as the run computed them, [token, width] that were given or None)` -> new
#: ones. Edits that share one are done in one call.
Change = Callable[[Tensor, Tensor | None], Tensor]
#: The width of a site -> `[position, width]` or a row for each position, or None where the change needs no values.
Values = Callable[[int], Tensor | Sequence[Tensor] | None]


def replaced(current: Tensor, value: Tensor | None) -> Tensor:
    """The change that takes the given values instead of those of the run."""
    assert value is not None
    return value.expand_as(current)


@dataclass(frozen=True, slots=True)
class Edit:
    """What one site of a row gets."""

    #: As `expand` returns it.
    place: Path
    #: Which of the prompt's tokens, each once.
    positions: tuple[int, ...]
    #: A `PartChange` where the site is a feature or an error.
    change: Change | PartChange
    values: Values

    @classmethod
    def of(cls, place: Path, positions: Sequence[int], values: Tensor) -> Edit:
        """These values, `[position, width]`, instead of those of the run."""
        return cls(place, tuple(positions), replaced, lambda width: values)

    @classmethod
    def made(cls, model: Any, place: Path, positions: Sequence[int], change: Change, values: Values) -> Edit:
        """A change of any site, a feature or an error of an attached SAE too."""
        changed = PartChange(features.sae_of(model, place), change) if is_part(place) else change
        return cls(place, tuple(positions), changed, values)


@dataclass(frozen=True, slots=True)
class Cut:
    """Edges of attention that a row does without: the keys get no share, and the others of the query all of it."""

    #: The pattern of one head, as `expand` returns it.
    place: Path
    #: Queries and keys, by their tokens.
    edges: tuple[tuple[int, int], ...]

    @property
    def positions(self) -> tuple[int, ...]:
        """The queries, whose tokens are changed."""
        return tuple(dict.fromkeys(query for query, _ in self.edges))

    @property
    def head(self) -> int:
        """Which head."""
        index = site_of(self.place).index
        assert index is not None
        return index


@dataclass(frozen=True, slots=True)
class Read:
    """A site of a row whose values are wanted, after the edits before it."""

    place: Path
    positions: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """One prompt, what is changed in its run, and what is wanted of it."""

    prompt: int
    #: In the order of the forward pass.
    edits: tuple[Edit, ...]
    #: The token whose state behind the last block is wanted; None where only `reads` are.
    end: int | None
    reads: tuple[Read, ...] = ()
    cuts: tuple[Cut, ...] = ()


@dataclass(frozen=True, slots=True)
class PlacedItem:
    """An edit, a read or a cut with its layer, and how far its effect goes inside that layer."""

    what: Edit | Read | Cut
    layer: int
    #: `input` or `output` of the block itself, `point` inside it where a token's change stays with the token until the
    #: next layer, `keys` where other tokens read it in the same layer.
    where: str

    @property
    def site(self) -> Site:
        """Where the value stands in the model."""
        return home(self.what.place)


@dataclass(frozen=True, slots=True)
class PreparedRow:
    """A row with the first block and the tokens that have to run for it."""

    row: Row
    edits: tuple[PlacedItem, ...]
    reads: tuple[PlacedItem, ...]
    #: The first block that runs for it, and the first token that does.
    layer: int
    start: int
    #: The last token that runs.
    last: int
    #: Its prompt: by its order among the recorded ones, and where it begins among the recorded tokens.
    prompt: int
    base: int
    #: Whether its first block runs for the changed tokens alone: the others come out of it as they were recorded.
    changed_only: bool
    #: The tokens that its first edits change, as far as they can matter.
    changed: tuple[int, ...]
    cuts: tuple[PlacedItem, ...] = ()

    @property
    def length(self) -> int:
        """How many tokens run."""
        return self.last + 1 - self.start

    def runs(self, layer: int) -> bool:
        """Whether anything behind this layer is wanted."""
        return self.row.end is not None or any(read.layer > layer for read in self.reads)

    @property
    def beginning(self) -> tuple[PlacedItem, ...]:
        """The edits of the stream that its first block is given."""
        return tuple(
            edit for edit in self.edits
            if (edit.layer, edit.where) in ((self.layer, "input"), (self.layer - 1, "output"))
        )  # fmt: skip


class Blocks(Protocol):
    """The blocks that rows go through, as a recording has them."""

    @property
    def tower(self) -> Tower:
        """Their parts by name."""
        ...

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        """Their modules."""
        ...

    @property
    def bases(self) -> Mapping[int, int]:
        """Prompt -> where its tokens begin among the recorded ones, in the order of these."""
        ...


class SiteLocator:
    """Finds the block of each site of a tower."""

    def __init__(self, blocks: Blocks) -> None:
        self.recorded: Blocks = blocks
        self.tower: Tower = blocks.tower
        self._layers: dict[str, int] = {block.module: block.index for block in blocks.tower.blocks}
        self._known: dict[Site, tuple[int, str]] = {}

    def located(self, what: Edit | Read | Cut) -> PlacedItem:
        """Where an edit, a read or a cut stands.

        Raises:
            NotImplementedError: its site stands in no block.
        """
        site = site_of(what.place) if isinstance(what, Read) else home(what.place)
        if site not in self._known:
            self._known[site] = self._find(what.place, site, isinstance(what, Cut))
        return PlacedItem(what, *self._known[site])

    def _find(self, place: Path, site: Site, is_cut: bool) -> tuple[int, str]:
        if site.kind not in ("plain", "stream") and not is_cut:
            raise NotImplementedError(f"{place.place} is derived from several values")
        if site.module in self._layers:
            layer = self._layers[site.module]
            return layer, _end(site.end, self.recorded.blocks[layer])
        name = site.module
        while name:
            name = name.rpartition(".")[0]
            if name in self._layers:
                layer = self._layers[name]
                if is_cut:  # what a query attends to is its own until the next layer
                    return layer, "point"
                return layer, _inside(site, self.tower.blocks[layer])
        raise NotImplementedError(f"{place.place} stands in no layer")


def _end(end: str, block: nn.Module) -> str:
    """Where an edit of the block's own input or output is made.

    A value is what a module returned, before hooks of the user's see it, and what it was given, after they did. So
    where there are such hooks the block runs, and the edit is made between the two.
    """
    if end == "input":
        return "keys" if block._forward_pre_hooks or engine.hooks_of(()) else "input"
    return "point" if block._forward_hooks or engine.hooks_of(()) else "output"


def _inside(site: Site, block: Block) -> str:
    """Whether other tokens of the same layer read what is written there."""
    after = {block.o, block.attn_added, block.mlp_added, block.mlp, block.down, block.up, block.gate, block.gate_up}
    after |= {block.mid and block.mid[0]} if block.mid else set()
    if site.module in after or site.module == block.q:
        return "point"
    if site.module == block.mixes and site.end == "output":
        return "point"
    if site.module == block.fused and site.columns is not None and block.layout is not None:
        start, stop = site.columns
        if any(low <= start and stop <= high for low, high in block.layout.whole("q")):
            return "point"
    return "keys"


def prepared(row: Row, locator: SiteLocator, *, allow_partial: bool = True) -> PreparedRow:
    """The row with its first block, its first token and its last.

    Args:
        allow_partial: whether a block can run for some tokens of a prompt without the others.

    Raises:
        NotImplementedError: a site that stands in no block.
        OverlappingWrite: two edits of the row give one number two values.
    """
    reads = tuple(locator.located(read) for read in row.reads)
    last = max((position for read in row.reads for position in read.positions), default=0)
    last = last if row.end is None else max(last, row.end)
    edits = [locator.located(edit) for edit in row.edits]
    _check_overlaps(edits)
    # What is changed behind the last token that is wanted changes nothing of it.
    edits = [edit for edit in edits if any(position <= last for position in edit.what.positions)]
    cuts = [locator.located(cut) for cut in row.cuts if any(position <= last for position in cut.positions)]
    changes = [*edits, *cuts]
    layers = [_first_layer(change) for change in changes] or [read.layer for read in reads]
    layer = min(layers, default=len(locator.tower.blocks))
    first = [change for change in changes if _first_layer(change) == layer]
    own = [*first, *(placed for placed in (*changes, *reads) if placed.layer == layer)]
    return PreparedRow(
        row, tuple(edits), reads, layer,
        start=min((position for edit in (*changes, *reads) for position in edit.what.positions), default=last),
        last=last,
        prompt=list(locator.recorded.bases).index(row.prompt),
        base=locator.recorded.bases[row.prompt],
        changed_only=allow_partial
        and bool(first)
        and all(not isinstance(p.what, Read) and p.where == "point" for p in own),
        changed=tuple(sorted({position for edit in first for position in edit.what.positions if position <= last})),
        cuts=tuple(cuts),
    )  # fmt: skip


def _first_layer(edit: PlacedItem) -> int:
    """The first block that runs otherwise: what leaves a layer enters the next."""
    return edit.layer + (edit.where == "output")


def _check_overlaps(edits: Sequence[PlacedItem]) -> None:
    # Parts of an SAE add what they change by, so they are compared with other edits alone.
    parts = [edit for edit in edits if is_part(edit.what.place)]
    others = [edit for edit in edits if not is_part(edit.what.place)]
    for number, one in enumerate(others):
        for other in (*others[:number], *parts):
            a, b = one.site, other.site
            same = a.location == b.location and columns_overlap(a.columns, b.columns)
            if same and set(one.what.positions) & set(other.what.positions):
                raise OverlappingWrite(
                    f"{other.what.place.place} and {one.what.place.place} overlap at the same token",
                    expected="each number of a run written once",
                )


def columns_overlap(a: tuple[int, int] | None, b: tuple[int, int] | None) -> bool:
    """Whether two slices of one value have a column in common; None is all of it."""
    return a is None or b is None or (a[0] < b[1] and b[0] < a[1])
