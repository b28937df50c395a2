"""Rows: a prompt, the block where it starts, and its edits.

A row is one prompt with some edits of sites. Its result is the output of the last block at one token, the values of
other sites, or both.
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
from nnsplice.packed.sae_edits import PartChange, host_site, is_part
from nnsplice.paths import Path

#: A function of the current values `[token, width]` and the given values `[token, width]` or None: the new values.
#: Edits with the same function are done in one call.
Change = Callable[[Tensor, Tensor | None], Tensor]
#: A function of a site's width: the given values, `[position, width]` or a row per position; None if none are needed.
Values = Callable[[int], Tensor | Sequence[Tensor] | None]


def replaced(current: Tensor, value: Tensor | None) -> Tensor:
    """The change that replaces the current values by the given ones."""
    assert value is not None
    return value.expand_as(current)


@dataclass(frozen=True, slots=True)
class Edit:
    """An edit of one site of a row."""

    #: The site, as `expand` returns it.
    place: Path
    #: The edited tokens of the prompt, each once.
    positions: tuple[int, ...]
    #: A `PartChange` where the site is a feature or an error.
    change: Change | PartChange
    values: Values

    @classmethod
    def of(cls, place: Path, positions: Sequence[int], values: Tensor) -> Edit:
        """Replace the values of a site by these, `[position, width]`."""
        return cls(place, tuple(positions), replaced, lambda width: values)

    @classmethod
    def made(cls, model: Any, place: Path, positions: Sequence[int], change: Change, values: Values) -> Edit:
        """An edit of any site, also of a feature or the error of an attached SAE."""
        changed = PartChange(features.sae_of(model, place), change) if is_part(place) else change
        return cls(place, tuple(positions), changed, values)


@dataclass(frozen=True, slots=True)
class Cut:
    """Attention edges that are cut before the softmax, so that the query's other keys share all of it."""

    #: The pattern of one head, as `expand` returns it.
    place: Path
    #: Pairs of a query and a key position.
    edges: tuple[tuple[int, int], ...]

    @property
    def positions(self) -> tuple[int, ...]:
        """The positions of the queries, which are the changed tokens."""
        return tuple(dict.fromkeys(query for query, _ in self.edges))

    @property
    def head(self) -> int:
        """The index of the head."""
        index = site_of(self.place).index
        assert index is not None
        return index


@dataclass(frozen=True, slots=True)
class Read:
    """A site of a row whose values are returned, with the effect of all edits before it."""

    place: Path
    positions: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """One prompt, the edits of its run, and the values to return."""

    prompt: int
    #: In the order of the forward pass.
    edits: tuple[Edit, ...]
    #: The token whose output of the last block is returned; None if only `reads` are.
    end: int | None
    reads: tuple[Read, ...] = ()
    cuts: tuple[Cut, ...] = ()


@dataclass(frozen=True, slots=True)
class PlacedItem:
    """An edit, a read or a cut, with its layer and its place within the layer."""

    what: Edit | Read | Cut
    layer: int
    #: `input` or `output`: of the block itself. `point`: inside it, where a change affects only its own token until the
    #: next layer. `keys`: inside it, where other tokens may read it.
    where: str

    @property
    def site(self) -> Site:
        """The site in the model; for a part of an SAE, the site that the SAE is attached to."""
        return host_site(self.what.place)


@dataclass(frozen=True, slots=True)
class PreparedRow:
    """A row with the first block and the tokens that have to run."""

    row: Row
    edits: tuple[PlacedItem, ...]
    reads: tuple[PlacedItem, ...]
    #: The first block and the first token that run.
    layer: int
    start: int
    #: The last token that runs.
    last: int
    #: The index of its prompt among the recorded prompts, and of the prompt's first token among the recorded tokens.
    prompt: int
    base: int
    #: Whether only the changed tokens run through its first block: the outputs of the others are as recorded.
    changed_only: bool
    #: The tokens that its first edits change, up to `last`.
    changed: tuple[int, ...]
    cuts: tuple[PlacedItem, ...] = ()

    @property
    def length(self) -> int:
        """The number of tokens that run."""
        return self.last + 1 - self.start

    def runs(self, layer: int) -> bool:
        """Whether blocks after this layer have to run."""
        return self.row.end is not None or any(read.layer > layer for read in self.reads)

    @property
    def beginning(self) -> tuple[PlacedItem, ...]:
        """The edits of the stream at the input of its first block."""
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
        """An edit, a read or a cut with its place in the layers.

        Raises:
            NotImplementedError: its site is in no block, or derived from several values.
        """
        site = site_of(what.place) if isinstance(what, Read) else host_site(what.place)
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
                if is_cut:  # a cut changes only its query's token until the next layer
                    return layer, "point"
                return layer, _inside(site, self.tower.blocks[layer])
        raise NotImplementedError(f"{place.place} stands in no layer")


def _end(end: str, block: nn.Module) -> str:
    """The `PlacedItem.where` of an edit of the block's own input or output.

    An input is edited after the user's hooks have run, and an output before they run. So with such hooks the edit has
    to be made inside a call of the block.
    """
    if end == "input":
        return "keys" if block._forward_pre_hooks or engine.hooks_of(()) else "input"
    return "point" if block._forward_hooks or engine.hooks_of(()) else "output"


def _inside(site: Site, block: Block) -> str:
    """The `PlacedItem.where` of a site inside a block: `keys` if other tokens may read it in the same layer."""
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
    # Edits after the last needed token have no effect on it.
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
    """The first block whose input or inside an edit changes."""
    return edit.layer + (edit.where == "output")


def _check_overlaps(edits: Sequence[PlacedItem]) -> None:
    # Edits of SAE parts add a difference, so they overlap with other kinds of edits only.
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
    """Whether two column ranges of one value overlap; None is all columns."""
    return a is None or b is None or (a[0] < b[1] and b[0] < a[1])
