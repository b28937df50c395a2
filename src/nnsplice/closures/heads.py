"""Measure that slices before the output projection are heads, and that patterns mix values into them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, islice
from math import comb
from typing import Literal

import torch
from torch import Tensor

from nnsplice import wire
from nnsplice.atlas import Atlas, Block, Layout, Tower
from nnsplice.atlas.layouts import ROLES, Role
from nnsplice.atlas.tree import is_norm
from nnsplice.closures.pass_values import PassValues
from nnsplice.closures.promises import UNMEASURED, Closure, gap, largest, tolerance


def rebuilt(atlas: Atlas, tower: Tower, block: Block, recorded: PassValues) -> Iterator[Closure]:
    """The output of the output projection is what attention adds to the stream, or the input of a norm before that."""
    made = recorded.at(block.o, "passed", block.occurrence)
    if made is None or block.layout is None:
        return
    added = block.attn_added or block.attn
    end = "given" if added is not None and added != block.o and is_norm(atlas.tree, added) else "output"
    total = recorded.at(added, end, block.occurrence) if added != block.o else made
    missed = UNMEASURED if total is None else gap([made], total)
    found = "the output projection does not make attn.output of them"
    yield Closure("heads", tower.name, block.index, missed, tolerance(made), found)


#: The inputs of a head: its q, k and v, and its gate in some families.
HeadInput = Literal["q", "k", "v", "gate"]


# --- one head, one slice ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeadSlices:
    """The slices of one layer's heads before the output projection, and the projections that they depend on."""

    block: Block
    layout: Layout
    #: `[token, width]`: the input of the output projection; each head has a range of columns.
    slots: Tensor
    #: The outputs of the projections of q, k and v, as leaves of the autograd graph of `slots`.
    leaves: Mapping[Role, Tensor]
    #: The module output with the gates of heads, as a leaf; None without gates.
    gates: Tensor | None = None

    @property
    def parts(self) -> tuple[HeadInput, ...]:
        """The inputs of heads in this layer."""
        return (*ROLES, "gate") if self.gates is not None else ROLES

    @property
    def all(self) -> list[Tensor]:
        """All leaves."""
        return [*self.leaves.values(), *([] if self.gates is None else [self.gates])]

    def leaf(self, part: HeadInput) -> Tensor:
        """The leaf with an input of the heads."""
        if part == "gate":
            assert self.gates is not None
            return self.gates
        return self.leaves[part]

    @cached_property
    def columns(self) -> dict[HeadInput, tuple[Tensor, Tensor]]:
        """For each input, by column of its leaf: the index of the head or group, or -1; and whether it is its first."""
        found: dict[HeadInput, tuple[Tensor, Tensor]] = {}
        for part in self.parts:
            width = self.leaf(part).shape[-1]
            owner, leads = torch.full((width,), -1), torch.zeros(width, dtype=torch.bool)
            for index, (start, stop) in self._ranges(part):
                owner[start:stop], leads[start : start + 1] = index, True
            found[part] = owner, leads
        return found

    def _ranges(self, part: HeadInput) -> Iterator[tuple[int, tuple[int, int]]]:
        if part == "gate":
            gates = ((head, self.block.gate_of(head)) for head in range(self.layout.n_heads))
            yield from ((head, gate[1]) for head, gate in gates if gate is not None)
            return
        for index in range(self.layout.count(part)):
            yield index, self.layout.range(part, index)

    def last(self, heads: Iterable[int], columns: Iterable[int]) -> Tensor:
        """A weighted sum of one column of each head's slice at the last token; the weights prevent cancellation."""
        d = self.layout.head_dim
        at = [head * d + column for head, column in zip(heads, columns, strict=True)]
        weights = torch.linspace(1.0, 2.0, len(at), device=self.slots.device, dtype=self.slots.dtype)
        return (self.slots[-1, at] * weights).sum()


def head_slices(block: Block, recorded: PassValues) -> HeadSlices | None:
    """The slices of a layer; None if they do not depend on recorded projections."""
    slots = recorded.slots.get((str(block.o), block.occurrence))
    leaves = {role: recorded.leaves.get((str(block.source(role)), block.occurrence)) for role in ROLES}
    if slots is None or block.layout is None or not slots.requires_grad or any(v is None for v in leaves.values()):
        return None
    gate = block.gate_of(0)
    gates = recorded.leaves.get((gate[0], block.occurrence)) if gate else None
    return HeadSlices(block, block.layout, slots.reshape(-1, slots.shape[-1]), leaves, gates)  # pyright: ignore


def codewords(count: int) -> list[frozenset[int]]:
    """A set of numbers for each head, none a subset of another: a few sums over heads then identify each head.

    >>> from nnsplice.closures.heads import codewords
    >>> len(codewords(32)), len(frozenset().union(*codewords(32)))
    (32, 7)
    """
    length = next(n for n in range(1, 99) if comb(n, n // 2) >= count)
    return (
        [frozenset(word) for word in islice(combinations(range(length), length // 2), count)]
        if count > 1
        else [frozenset((0,))]
    )


_NAMES: dict[HeadInput, str] = {"q": "query", "k": "key", "v": "value", "gate": "gate"}


def influence(tower: Tower, layers: list[HeadSlices]) -> Iterator[Closure]:
    """Which columns of q, k, v and gates each slice depends on, for all layers together."""
    outside = {(t.block.index, role, part): 0.0 for t in layers for role in t.parts for part in ("heads", "tokens")}
    for by in ("head", "group"):
        # If each head has its own keys and values, the first round covers them.
        there = [t for t in layers if by == "head" or t.layout.n_heads != t.layout.n_kv]
        words = {t.block.index: codewords(t.layout.n_heads if by == "head" else t.layout.n_kv) for t in there}
        for number in sorted(frozenset().union(*(word for of in words.values() for word in of))):
            chosen = {t.block.index: _chosen(t.layout, by, words[t.block.index], number) for t in there}
            summed = [t for t in there if chosen[t.block.index]]
            total = torch.stack(
                [t.last(of, [0] * len(of)).cpu() for t in summed for of in [chosen[t.block.index]]]
            ).sum()
            leaves = list(dict.fromkeys(leaf for t in summed for leaf in t.all))
            grads = torch.autograd.grad(total, leaves, retain_graph=True, allow_unused=True)
            found = dict(zip(leaves, grads, strict=True))
            for t in summed:
                for role in t.parts:
                    if t.layout.n_heads != t.layout.n_kv and (role in ("q", "gate")) != (by == "head"):
                        continue
                    shares = _outside(t, role, found[t.leaf(role)], chosen[t.block.index])
                    for part, share in zip(("heads", "tokens"), shares, strict=True):
                        outside[t.block.index, role, part] = max(outside[t.block.index, role, part], share)
    for t in layers:
        allowed = tolerance(t.slots)
        for role in t.parts:
            of_heads, of_tokens = (outside[t.block.index, role, part] for part in ("heads", "tokens"))
            # Adjacent columns are mistaken for each other: a query and its gate, a key and its value.
            beside: HeadInput | None = "gate" if t.layout.gate_dim else None
            beside = beside if role == "q" else "v" if role == "k" and t.layout.shares("k") else None
            if beside is not None:
                of_heads = max(of_heads, outside[t.block.index, beside, "heads"])
            found = f"a {_NAMES[role]} moves " + (
                "slices of other heads" if of_heads >= of_tokens else "slices of other tokens"
            )
            yield Closure(role, tower.name, t.block.index, max(of_heads, of_tokens), allowed, found)
            if role == "q":
                found = "a slice depends on the query of another head"
                yield Closure("heads", tower.name, t.block.index, of_heads, allowed, found)


def _chosen(layout: Layout, by: str, words: list[frozenset[int]], number: int) -> list[int]:
    if by == "head":
        return [head for head, word in enumerate(words) if number in word]
    return [head for group, word in enumerate(words) if number in word for head in layout.heads_of(group)]


def _outside(t: HeadSlices, role: HeadInput, grad: Tensor | None, heads: list[int]) -> tuple[float, float]:
    """The largest gradient at other heads' columns, and at other tokens, as shares of the largest gradient."""
    if grad is None:
        return 0.0, 0.0  # nothing depends on it, as for a zeroed head
    grad = grad.reshape(-1, grad.shape[-1]).abs().double().cpu()
    owner, leads = t.columns[role]
    chosen = torch.zeros(t.layout.n_heads + 1, dtype=torch.bool)  # the last entry is for columns of no head
    chosen[[head if role in ("q", "gate") else t.layout.group_of(head) for head in heads]] = True
    own = chosen[owner]
    if role in ("v", "gate"):  # these act column by column
        own &= leads
    size = float(grad[:, owner >= 0].max())
    if not size:
        return 0.0, 0.0
    others = float((grad * ((owner >= 0) & ~own)).max()) / size
    # The query and the gate of the last token are used by that token only.
    return others, float((grad * own)[:-1].max()) / size if role in ("q", "gate") and len(grad) > 1 else 0.0


# --- gates ------------------------------------------------------------------------------------------------------------


def before_gates(tower: Tower, t: HeadSlices) -> Iterator[Closure]:
    """A slice is the head's mixed values times the sigmoid of its gate. Yields nothing for heads without gates.

    The first token attends to itself only, so its mixed value is the value of its group.
    """
    block, layout = t.block, t.layout
    if t.gates is None:
        return
    slots, gates, values = (
        tensor.detach().reshape(-1, tensor.shape[-1])[0].double().cpu() for tensor in (t.slots, t.gates, t.leaves["v"])
    )
    missed = 0.0
    for head in range(layout.n_heads):
        gate = block.gate_of(head)
        assert gate is not None
        made = values[slice(*layout.range("v", layout.group_of(head)))] * gates[slice(*gate[1])].sigmoid()
        slot = slots[head * layout.head_dim : (head + 1) * layout.head_dim]
        missed = max(missed, largest((slot - made).abs(), slot.abs() + made.abs()))
    found = "the first token's slices are not its values times the sigmoids of the gates"
    yield Closure("ungated", tower.name, block.index, missed, tolerance(t.slots), found)


# --- patterns ---------------------------------------------------------------------------------------------------------


def keys(tower: Tower, block: Block, width: int, given: int | None) -> Iterator[Closure]:
    """The keys of a pattern are the prompt's own tokens, without soft tokens.

    Args:
        width: the number of tokens in the layer.
        given: the number of input tokens; None if unknown.
    """
    if given is not None and width != given:
        found = f"its keys are {width} tokens, and the model was given {given}: there are soft tokens among them"
        yield Closure("pattern", tower.name, block.index, UNMEASURED, 0.0, found)
        yield Closure("written pattern", tower.name, block.index, UNMEASURED, 0.0, found)


def patterns(tower: Tower, t: HeadSlices, recorded: PassValues) -> Iterator[Closure]:
    """Attention probabilities mix the values into slices. Yields nothing if the attention returns none."""
    block, layout = t.block, t.layout
    assert block.pattern is not None
    shares = _shares(recorded.patterns.get((block.pattern[0], block.occurrence)), block.pattern[1])
    if shares is None:
        return
    values, tokens = t.leaves["v"].detach(), t.slots.shape[0]
    keys = values.numel() // values.shape[-1]
    allowed = tolerance(shares, values, t.slots)
    if shares.dim() != 4 or tuple(shares.shape[-3:]) != (layout.n_heads, tokens, keys) or shares.shape[0] != 1:
        found = f"what is returned has the shape {list(shares.shape)}, for {layout.n_heads} heads and {tokens} tokens"
        yield Closure("pattern", tower.name, block.index, UNMEASURED, allowed, found)
        yield Closure("written pattern", tower.name, block.index, UNMEASURED, allowed, found)
        return
    shares = shares[0].double().cpu()
    values = values.reshape(keys, -1).double().cpu()
    slots = t.slots.detach().double().cpu()
    own = torch.stack([values[:, slice(*layout.range("v", layout.group_of(h)))] for h in range(layout.n_heads)])
    slices = slots.unflatten(-1, (layout.n_heads, layout.head_dim)).transpose(0, 1)
    size = shares.abs() @ own.abs() + slices.abs()
    written = largest((shares @ own - slices).abs(), size)
    yield Closure("written pattern", tower.name, block.index, written, allowed, "pattern @ v is not the head's slice")
    over = max(float(-shares.min()), float(shares.sum(-1).max()) - 1, 0.0)
    # With a larger tolerance: some families round the probabilities before use, and softmax sums in float32.
    if over > (limit := max(allowed, torch.finfo(torch.float32).eps * 4)):
        yield Closure("pattern", tower.name, block.index, over, limit, "its rows are no shares of one")
        return
    mixes = 0.0 if written <= allowed else _mixing(t, shares)
    found = "values are not mixed with these shares"
    yield Closure("pattern", tower.name, block.index, mixes, max(allowed, 1e-6), found)


def _shares(output: object, item: int) -> Tensor | None:
    try:
        return wire.unpack(output, item).detach()
    except (ValueError, IndexError, TypeError):
        return None


def _mixing(t: HeadSlices, shares: Tensor) -> float:
    """The difference between the last token's probabilities and the gradients of slices with respect to values.

    Up to a factor for each head: norms of values, and gates after the mixing, scale what a head writes.
    """
    layout = t.layout
    heads = range(layout.n_heads)
    if layout.per_group > layout.head_dim:
        return UNMEASURED
    columns = [head % layout.per_group for head in heads]
    (grad,) = torch.autograd.grad(t.last(heads, columns), [t.leaves["v"]], retain_graph=True, allow_unused=True)
    if grad is None:
        return UNMEASURED
    grad = grad.reshape(-1, grad.shape[-1]).double().cpu()
    missed = 0.0
    for head, column in zip(heads, columns, strict=True):
        moved, share = grad[:, layout.range("v", layout.group_of(head))[0] + column], shares[head, -1]
        factor = (moved @ share) / (share @ share).clamp_min(1e-300)
        if not bool(moved.any()):
            return UNMEASURED
        missed = max(missed, float((moved - factor * share).abs().max() / moved.abs().max()))
    return missed
