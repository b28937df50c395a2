"""The edges of a circuit as booleans, and which of them can change its run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np

from nnsplice.circuits.addresses import SenderPart, part_of, whole_of
from nnsplice.circuits.members import Edge
from nnsplice.circuits.shape import Shape
from nnsplice.paths import Path


@dataclass(frozen=True, eq=False)
class EdgeMask:
    """The edges of a circuit in the graph of a model."""

    #: `[receiver, sender]`.
    edges: np.ndarray
    #: `(receiver, sender)` -> the parts of the sender that the edge carries, where these are not all of it.
    parts: Mapping[tuple[int, int], frozenset[SenderPart]] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def key(self) -> tuple[bytes, str]:
        """A key that is equal for masks of the same edges."""
        return np.packbits(self.edges).tobytes(), repr(sorted((k, sorted(map(repr, v))) for k, v in self.parts.items()))

    @property
    def experts(self) -> set[tuple[int, int]]:
        """`(sender, expert)` of the experts that are senders by themselves."""
        return {(s, piece) for (_, s), parts in self.parts.items() for _, piece in parts if isinstance(piece, int)}

    def only(self, edges: np.ndarray) -> EdgeMask:
        """Fewer of its edges."""
        return EdgeMask(edges, {at: parts for at, parts in self.parts.items() if edges[at]})


def mask_of(nodes: Sequence[Path], edges: Sequence[Edge], shape: Shape) -> np.ndarray:
    """`[receiver, sender]` of edges; without edges, of all edges from the nodes. A part counts as its sender."""
    found = np.zeros(shape.exists.shape, dtype=bool)
    if nodes:
        found[:, [shape.sender_number[whole_of(node)] for node in nodes]] = True
        return found & shape.exists
    pairs = [(shape.receiver_number[receiver], shape.sender_number[whole_of(sender)]) for sender, receiver in edges]
    if pairs:
        found[tuple(np.array(pairs).T)] = True
    return found


def with_parts(edges: np.ndarray, members: Iterable[Path | Edge], shape: Shape) -> EdgeMask:
    """A mask with the parts of senders that its members name."""
    found: dict[tuple[int, int], set[Any]] = {}
    for member in members:
        sender, receiver = member if isinstance(member, tuple) else (member, None)
        number = shape.sender_number[whole_of(sender)]
        ends = np.flatnonzero(edges[:, number]) if receiver is None else [shape.receiver_number[receiver]]
        for end in ends:
            found.setdefault((int(end), number), set()).add(part_of(sender))
    return EdgeMask(edges, {at: frozenset(parts) for at, parts in found.items() if None not in parts})


def behind(shape: Shape, mask: np.ndarray) -> np.ndarray:
    """`[sender]`: whether anything of a sender gets to `unembed` along the edges of a mask `[receiver, sender]`."""
    useful = mask[-1].copy()
    for number in reversed(range(len(shape.layers))):
        layer, (sender, receiver) = shape.layers[number], shape.starts[number]
        if useful[sender + layer.heads]:
            useful |= mask[receiver + layer.heads + 2 * layer.groups]
        heads = np.flatnonzero(useful[sender : sender + layer.heads])
        if len(heads):
            if layer.mixed:
                read = range(receiver, receiver + layer.heads + 2 * layer.groups)
            else:
                read = sorted({r for head in heads for r in shape.reads_of(sender + int(head))})
            useful |= mask[list(read)].any(0)
    return useful


def reached(shape: Shape, mask: np.ndarray) -> np.ndarray:
    """`[sender]`: whether anything of `embed` gets to a sender along the edges of a mask."""
    found = np.zeros(len(shape.senders), dtype=bool)
    found[0] = True
    for layer, (sender, receiver) in zip(shape.layers, shape.starts, strict=True):
        first = slice(receiver, receiver + layer.heads + 2 * layer.groups)
        reads = np.asarray((mask[first] & found).any(1))
        heads = [reads[[r - receiver for r in shape.reads_of(sender + head)]].any() for head in range(layer.heads)]
        if layer.mixed and reads.any():
            heads = [True] * layer.heads
        found[sender : sender + layer.heads] = heads
        found[sender + layer.heads] = (mask[first.stop] & found).any()
    return found


def needed(shape: Shape, mask: np.ndarray, *, from_embed: bool) -> tuple[np.ndarray, np.ndarray]:
    """The edges of a mask that can change what leaves the model, and the senders that have one of them.

    Args:
        from_embed: whether a sender that nothing of `embed` gets to has its ablated value anyway.
    """
    useful = behind(shape, mask)
    if from_embed:
        useful &= reached(shape, mask)
    mask = mask & useful
    mask[~_alive(shape, useful)] = False
    return mask, np.asarray(mask.any(0))


def ablated(shape: Shape, mask: np.ndarray) -> np.ndarray:
    """`[sender]`: whether a receiver that matters reads a sender's ablated value."""
    read = _alive(shape, behind(shape, mask))
    return np.asarray((shape.exists & ~mask)[read].any(0))


def _alive(shape: Shape, useful: np.ndarray) -> np.ndarray:
    """`[receiver]`: whether its input can reach `unembed`, through the useful senders."""
    alive = np.zeros(len(shape.receivers), dtype=bool)
    alive[-1] = True
    for layer, (sender, receiver) in zip(shape.layers, shape.starts, strict=True):
        mlp = receiver + layer.heads + 2 * layer.groups
        alive[mlp] = useful[sender + layer.heads]
        heads = np.flatnonzero(useful[sender : sender + layer.heads])
        for head in heads:
            alive[list(shape.reads_of(sender + int(head)))] = True
        if len(heads) and layer.mixed:
            alive[receiver:mlp] = True
    return alive
