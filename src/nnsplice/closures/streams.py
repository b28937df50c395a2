"""Measure that the branches of a layer add up to its output."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from torch import Tensor

from nnsplice.atlas import Atlas, Block, Tower
from nnsplice.closures.pass_values import PassValues, norms_of
from nnsplice.closures.promises import CROSS, UNMEASURED, Closure, PromiseKind, gap, tolerance


def stream(tower: Tower, block: Block, recorded: PassValues) -> Iterator[Closure]:
    """The input of a layer is the output of the layer before it, a vector for each token.

    Compared after the hooks of the layer before and before those of this layer, so that the user's do not matter.
    """
    own = recorded.at(block.module, "given", block.occurrence)
    if own is None:
        return  # the layer does not run; a read of it raises NeverFired
    found, missed, allowed = "", 0.0, tolerance(own)
    if own.dim() > 3:
        found, missed = f"it has the shape {list(own.shape)}", UNMEASURED
    elif block.index:
        before = tower.blocks[block.index - 1]
        left = recorded.at(before.end or before.module, "passed", before.occurrence)
        if left is not None:
            missed = gap([left], own)
            found = f"the input of layer {block.index} and the output of layer {before.index} differ"
    yield Closure("stream", tower.name, block.index, missed, allowed, found)


class Sums:
    """The values of one layer, and how far its branches are from adding up.

    Each method returns the smallest gap over the sums that the layer may compute.
    """

    def __init__(self, atlas: Atlas, block: Block, recorded: PassValues) -> None:
        self.block: Block = block
        self.visit: int = block.occurrence
        self.recorded: PassValues = recorded
        self.before: Tensor | None = self._at(block.module, "input")
        self.after: Tensor | None = self._at(block.end, "passed") if block.end else self._at(block.module, "output")
        self.attn: Tensor | None = self._scaled(block.mixer_added)
        self.mlp: Tensor | None = self._mlp()
        self.mid: Tensor | None = None
        if block.mid is not None:
            module, end = block.mid
            self.mid = self._at(module, "given" if end == "input" else "passed")
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
        """The layer's output, and the inputs of norms that produced it (post-norm)."""
        if self.after is None:
            return []
        return [self.after, *self._normed_to(self.after)]

    def _normed_to(self, value: Tensor) -> list[Tensor]:
        """The inputs of norms whose output is this value."""
        return [
            given
            for given, made in self.norms
            if given is not None and made is not None and made.shape == value.shape and bool((made == value).all())
        ]

    def whole(self) -> float:
        """The gap between input + attention + MLP and the output."""
        # A layer may have no MLP, or only an MLP.
        mixed = [] if self.block.mixes is None and not self.block.has_attention else [self.attn]
        fed = [] if self.block.mlp is None else [self.mlp]
        return _best([self.before, *mixed, *fed], [self.after])

    def of_attention(self) -> float:
        """The gap between input + attention and a state of the stream: the input of a norm, or `mid`."""
        return _best([self.before, self.attn], [*(given for given, _ in self.norms), self.mid])

    def of_mlp(self) -> float:
        """The gap between such a state (or its norm) + MLP and the output."""
        starts = [*(given for given, _ in self.norms), *(made for _, made in self.norms), self.mid]
        return min((_best([start, self.mlp], self.ends) for start in starts), default=UNMEASURED)

    def to_mid(self) -> float:
        """The gap between input + attention and `mid`."""
        if self.mid is None:
            return UNMEASURED
        if self.attn is None or self.block.has_cross or not min(self.whole(), self.of_attention()) <= self.allowed:
            return 0.0  # something else is added before `mid`, so only `from_mid` is measured
        return _best([self.before, self.attn], self._normed_to(self.mid) or [self.mid])

    def of_cross(self) -> float:
        """The gap between the state after self-attention + cross-attention and a later state of the stream."""
        cross = None if self.block.cross is None else self._scaled(self.block.cross.attn_added)
        totals = [*(given for given, _ in self.norms), self.mid, *self.ends]
        own = None if self.before is None or self.attn is None else self.before + self.attn
        return min(_best([start, cross], totals) for start in (own, *(made for _, made in self.norms)))

    def from_mid(self, mid: Tensor | None) -> float:
        """The gap between `mid` + MLP and the output."""
        return _best([mid, self.mlp], self.ends)

    @property
    def allowed(self) -> float:
        """The gap that rounding may cause."""
        return tolerance(*(v for v in (self.before, self.after, self.attn, self.mlp, self.mid) if v is not None))


def _best(terms: list[Tensor | None], totals: Iterable[Tensor | None]) -> float:
    """The smallest gap between the sum of terms and any of the totals; `UNMEASURED` if a term is missing."""
    found = [term for term in terms if term is not None]
    if len(found) < len(terms):
        return UNMEASURED
    return min((gap(found, total) for total in totals if total is not None), default=UNMEASURED)


def branches(tower: Tower, block: Block, sums: Sums) -> Iterator[Closure]:
    """The closures of `attn.output`, `mixer.output` and `mlp.output`."""
    whole = sums.whole()
    added: tuple[tuple[PromiseKind, str | None, Tensor | None, Callable[[], float]], ...] = (
        ("attn", block.attn_added, sums.attn, sums.of_attention),
        ("mixer", block.mixer_added, sums.attn, sums.of_attention),
        ("mlp", block.mlp_added, sums.mlp, sums.of_mlp),
    )
    for kind, module, value, own_gap in added:
        if module is None:
            continue  # refused when the path is expanded
        if value is None:
            yield Closure(kind, tower.name, block.index, UNMEASURED, sums.allowed, f"{module} did not run")
            continue
        missed = whole if whole <= sums.allowed else min(whole, own_gap())
        found = f"input + {'mixer' if kind == 'mixer' else 'attn'}.output + mlp.output is not the output"
        yield Closure(kind, tower.name, block.index, missed, sums.allowed, found)


def crossing(tower: Tower, block: Block, sums: Sums) -> Iterator[Closure]:
    """The closure of `cross.output`; nothing if cross-attention did not run."""
    cross = block.cross
    if cross is not None and sums.recorded.at(cross.attn_added, "passed", block.occurrence) is not None:
        found = "the layer's stream with cross.output is not the stream behind it"
        yield Closure("cross", CROSS, block.index, sums.of_cross(), sums.allowed, found)


def middle(tower: Tower, block: Block, sums: Sums) -> Iterator[Closure]:
    """The closure of `mid` as it is read."""
    if sums.mid is None:
        return  # refused when the path is expanded, or not run
    before, after = sums.to_mid(), sums.from_mid(sums.mid)
    found = "input + attn.output is not what stands there" if before > after else "with mlp.output it is not the output"
    yield Closure("mid", tower.name, block.index, max(before, after), sums.allowed, found)


def middle_written(tower: Tower, block: Block, sums: Sums) -> Iterator[Closure]:
    """The closure of `mid` in a pass in which it was written: the MLP's output is added to the written value."""
    if block.mid is None or sums.mid is None:
        return
    missed = sums.from_mid(sums.recorded.at(block.mid[0], "written", block.occurrence))
    found = "what is written there does not go on beside the MLP"
    yield Closure("mid", tower.name, block.index, missed, sums.allowed, found)
