"""Measure that the branches of a layer add up to its output."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from torch import Tensor

from nnsplice.atlas import Atlas, Block, Tower
from nnsplice.closures.pass_values import PassValues, norms_of
from nnsplice.closures.promises import CROSS, Closure, PromiseKind, gap, tolerance

_NOTHING = float("inf")


def stream(tower: Tower, block: Block, recorded: PassValues) -> Iterator[Closure]:
    """What a layer is given is what the layer before it put out, a vector for each token.

    Whatever hooks of the user's do between the two is the user's question, and not what the model is.
    """
    own = recorded.at(block.module, "given", block.occurrence)
    if own is None:
        return  # whoever asks for it is told that it never runs
    found, missed, allowed = "", 0.0, tolerance(own)
    if own.dim() > 3:
        found, missed = f"it has the shape {list(own.shape)}", _NOTHING
    elif block.index:
        before = tower.blocks[block.index - 1]
        left = recorded.at(before.end or before.module, "passed", before.occurrence)
        if left is not None:
            missed = gap([left], own)
            found = f"the input of layer {block.index} and the output of layer {before.index} differ"
    yield Closure("stream", tower.name, block.index, missed, allowed, found)


class Sums:
    """The values of one layer, and the sums that they may make."""

    def __init__(self, atlas: Atlas, block: Block, recorded: PassValues) -> None:
        self.block: Block = block
        self.visit: int = block.occurrence
        self.recorded: PassValues = recorded
        self.before: Tensor | None = self._at(block.module, "input")
        self.after: Tensor | None = self._at(block.end, "passed") if block.end else self._at(block.module, "output")
        self.attn: Tensor | None = self._scaled(block.mixer_added)
        self.mlp: Tensor | None = self._mlp()
        self.mid: Tensor | None = (
            None if block.mid is None else self._at(block.mid[0], "given" if _is_input(block) else "passed")
        )
        self.norms: list[tuple[Tensor | None, Tensor | None]] = [
            (self._at(n, "given"), self._at(n, "passed")) for n in norms_of(atlas, block)
        ]

    def _at(self, module: str | None, end: str) -> Tensor | None:
        return self.recorded.at(module, end, self.visit)

    def _scaled(self, module: str | None) -> Tensor | None:
        value = self._at(module, "passed")
        return None if value is None else value * self.block.scale

    def _mlp(self) -> Tensor | None:
        if self.block.mlp_added is not None or not self.block.mlp_beside:
            return self._scaled(self.block.mlp_added)
        parts = [self._scaled(module) for module in (self.block.mlp, *self.block.mlp_beside)]
        return None if any(part is None for part in parts) else sum(parts[1:], parts[0])  # pyright: ignore

    @property
    def ends(self) -> list[Tensor]:
        """The layer's output, and where it is normalised at last, what was normalised."""
        if self.after is None:
            return []
        return [self.after, *self._normed_to(self.after)]

    def _normed_to(self, value: Tensor) -> list[Tensor]:
        """What went into norms that made this value."""
        return [
            given
            for given, made in self.norms
            if given is not None and made is not None and made.shape == value.shape and bool((made == value).all())
        ]

    def whole(self) -> float:
        """By how much all of it together misses the output."""
        # A layer may have no MLP, or nothing but one.
        mixed = [] if self.block.mixes is None and not self.block.has_attention else [self.attn]
        fed = [] if self.block.mlp is None else [self.mlp]
        return _best([self.before, *mixed, *fed], [self.after])

    def of_attention(self) -> float:
        """By how much attention alone misses every stream of the layer that is normalised or goes on."""
        return _best([self.before, self.attn], [*(given for given, _ in self.norms), self.mid])

    def of_mlp(self) -> float:
        """The same of the MLP, on the way from such a stream to the output."""
        starts = [*(given for given, _ in self.norms), *(made for _, made in self.norms), self.mid]
        return min((_best([start, self.mlp], self.ends) for start in starts), default=_NOTHING)

    def to_mid(self) -> float:
        """By how much attention misses the stream between the branches."""
        if self.mid is None:
            return _NOTHING
        if self.attn is None or self.block.has_cross or not min(self.whole(), self.of_attention()) <= self.allowed:
            return 0.0  # more than attention comes before it, so the way to the output has to say what it is
        return _best([self.before, self.attn], self._normed_to(self.mid) or [self.mid])

    def of_cross(self) -> float:
        """By how much cross-attention misses every stream that is normalised or goes on, behind the layer's own."""
        cross = None if self.block.cross is None else self._scaled(self.block.cross.attn_added)
        totals = [*(given for given, _ in self.norms), self.mid, *self.ends]
        own = None if self.before is None or self.attn is None else self.before + self.attn
        return min(_best([start, cross], totals) for start in (own, *(made for _, made in self.norms)))

    def from_mid(self, mid: Tensor | None) -> float:
        """By how much the stream between the branches and the MLP miss the output."""
        return _best([mid, self.mlp], self.ends)

    @property
    def allowed(self) -> float:
        """What rounding may do."""
        return tolerance(*(v for v in (self.before, self.after, self.attn, self.mlp, self.mid) if v is not None))


def _is_input(block: Block) -> bool:
    return block.mid is not None and block.mid[1] == "input"


def _best(terms: list[Tensor | None], totals: Iterable[Tensor | None]) -> float:
    """The smallest gap between a sum and any of these; infinite where a part of it is missing."""
    found = [term for term in terms if term is not None]
    if len(found) < len(terms):
        return _NOTHING
    return min((gap(found, total) for total in totals if total is not None), default=_NOTHING)


def branches(tower: Tower, block: Block, sums: Sums) -> Iterator[Closure]:
    """What attention and the MLP add."""
    whole = sums.whole()
    added: tuple[tuple[PromiseKind, str | None, Tensor | None, Callable[[], float]], ...] = (
        ("attn", block.attn_added, sums.attn, sums.of_attention),
        ("mixer", block.mixer_added, sums.attn, sums.of_attention),
        ("mlp", block.mlp_added, sums.mlp, sums.of_mlp),
    )
    for kind, module, value, alone in added:
        if module is None:
            continue  # refused by its name
        if value is None:
            yield Closure(kind, tower.name, block.index, _NOTHING, sums.allowed, f"{module} did not run")
            continue
        missed = whole if whole <= sums.allowed else min(whole, alone())
        found = f"input + {'mixer' if kind == 'mixer' else 'attn'}.output + mlp.output is not the output"
        yield Closure(kind, tower.name, block.index, missed, sums.allowed, found)


def crossing(tower: Tower, block: Block, sums: Sums) -> Iterator[Closure]:
    """What the attention to the other tower adds; nothing where it did not run."""
    cross = block.cross
    if cross is not None and sums.recorded.at(cross.attn_added, "passed", block.occurrence) is not None:
        found = "the layer's stream with cross.output is not the stream behind it"
        yield Closure("cross", CROSS, block.index, sums.of_cross(), sums.allowed, found)


def middle(tower: Tower, block: Block, sums: Sums) -> Iterator[Closure]:
    """The stream between the branches, as it is read."""
    if sums.mid is None:
        return  # refused by its name, or never met, which whoever asks for it is told
    before, after = sums.to_mid(), sums.from_mid(sums.mid)
    found = "input + attn.output is not what stands there" if before > after else "with mlp.output it is not the output"
    yield Closure("mid", tower.name, block.index, max(before, after), sums.allowed, found)


def middle_written(tower: Tower, block: Block, sums: Sums) -> Iterator[Closure]:
    """The stream between the branches, in a pass in which it was written."""
    if block.mid is None or sums.mid is None:
        return
    missed = sums.from_mid(sums.recorded.at(block.mid[0], "written", block.occurrence))
    found = "what is written there does not go on beside the MLP"
    yield Closure("mid", tower.name, block.index, missed, sums.allowed, found)
