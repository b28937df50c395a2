"""The streams that the receivers of circuits read, as sums of the senders' differences from their ablated values.

What a sender gives is kept as its difference from the ablated value. So the stream that a receiver reads is the ablated
stream and the differences of its senders: one product of matrices for all receivers of a layer.

Where a norm stands behind the output projection (Gemma, OLMo 2), what heads give to the stream is no sum. There the
heads' differences are kept before it, and every receiver has the norm of just its heads: what path patching writes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from nnsplice.circuits.addresses import Piece
from nnsplice.circuits.recording import SenderValues, ended, projected
from nnsplice.circuits.wiring import LayerWires, Wiring
from nnsplice.packed.cost import Cost


@dataclass(frozen=True)
class AblatedStreams:
    """The ablated values of all senders, for prompts of one length, and the streams that they add up to."""

    #: `[prompt, token, width]`
    values: SenderValues
    #: The heads' values after the output projection of each layer.
    projected: tuple[Tensor, ...]
    #: The stream as each layer's attention reads it and as its MLP does; at last, complete.
    streams: tuple[Tensor, ...]

    @classmethod
    def of(cls, root: nn.Module, wiring: Wiring, values: SenderValues) -> AblatedStreams:
        """The stream of these values."""
        made = [projected(root, layer, z) for layer, z in zip(wiring.layers, values.z, strict=True)]
        stream, streams = values.embed, []
        for layer, projection, mlp in zip(wiring.layers, made, values.mlp, strict=True):
            middle = stream + ended(root, layer, projection) * layer.block.scale
            streams += [stream, stream if layer.mid is None else middle]
            stream = middle + mlp * layer.block.scale
        return cls(values, tuple(made), (*streams, stream))


@dataclass(frozen=True)
class Slot:
    """A recorded sender: its whole output, or a part of it."""

    sender: int
    #: An expert of an MLP, or a feature or the error of an SAE of its output.
    piece: Piece = None
    #: `[prompt, token, 1]`: 1 at the tokens that are meant; None for all of them.
    tokens: Tensor | None = None


def whole_slots(edges: np.ndarray) -> tuple[list[Slot], np.ndarray]:
    """All of every sender that an edge `[circuit, receiver, sender]` starts from, and `[circuit, receiver, slot]`."""
    kept = np.flatnonzero(edges.any((0, 1)))
    return [Slot(int(sender)) for sender in kept], edges[:, :, kept]


@dataclass
class SenderDifferences:
    """The senders' differences from their ablated values, of some circuits in one pass over prompts of one length."""

    root: nn.Module
    wiring: Wiring
    ablated: AblatedStreams
    slots: Sequence[Slot]
    #: `[circuit, receiver, slot]`: which of them each receiver reads.
    reads: np.ndarray
    #: Whether gradients flow to the ablated values. Of one circuit only: a sum of a few senders then costs no memory,
    #: and one product for all circuits would keep every stream.
    keep_graph: bool = False
    cost: Cost = field(default_factory=Cost)

    def __post_init__(self) -> None:
        self.circuits: int = len(self.reads)
        assert not self.keep_graph or self.circuits == 1
        self.prompts: int
        self.tokens: int
        self.width: int
        self.prompts, self.tokens, self.width = self.ablated.values.embed.shape
        #: Sender -> the numbers of its slots.
        self.slots_of: dict[int, list[int]] = {}
        for number, slot in enumerate(self.slots):
            self.slots_of.setdefault(slot.sender, []).append(number)
        dtype = self.ablated.values.embed.dtype
        self.dtype: torch.dtype = dtype if dtype in (torch.float32, torch.float64) else torch.float32
        shape = (self.circuits, 0 if self.keep_graph else len(self.slots), self.prompts, self.tokens, self.width)
        #: `[circuit, slot, prompt, token, width]`; of heads before a norm, the difference before that.
        self.values: Tensor = self.ablated.values.embed.new_zeros(shape, dtype=self.dtype)
        #: The same by slot, where the graph is kept.
        self.values_of: dict[int, Tensor] = {}
        self.edges: Tensor = torch.from_numpy(self.reads).to(self.values)

    @property
    def rows(self) -> int:
        """The number of rows: circuit after circuit, each with all prompts."""
        return self.circuits * self.prompts

    def between(self, values: Tensor, ablated: Tensor) -> Tensor:
        """`[circuit, prompt, token, width]`: values of all rows less the ablated ones."""
        found = values.reshape(self.circuits, self.prompts, self.tokens, -1).to(self.dtype)
        return found - ablated.to(found)

    def keep(self, sender: int, difference: Tensor, pieces: Mapping[Piece, Tensor] | None = None) -> None:
        """Keep a sender's difference in its slots.

        Args:
            pieces: the values of its pieces, if it has some.
        """
        for number in self.slots_of[sender]:
            slot = self.slots[number]
            part = difference if slot.piece is None or pieces is None else pieces[slot.piece]
            part = part.to(self.values) if slot.tokens is None else part.to(self.values) * slot.tokens.to(self.values)
            if self.keep_graph:
                self.values_of[number] = part
            else:
                self.values[:, number] = part

    def pieces_of(self, sender: int) -> list[Piece]:
        """The pieces of a sender that have a slot."""
        return [self.slots[number].piece for number in self.slots_of.get(sender, ())]

    # --- streams

    def streams(self, number: int, receivers: Sequence[int], at: int, *, own_heads: bool = False) -> Tensor:
        """`[receiver, row, token, width]`: the stream that each receiver reads; without senders, the ablated one.

        Args:
            number: the layers before this one have run.
            at: the number of the ablated stream.
            own_heads: and so has the attention of this one.
        """
        base = self.ablated.streams[at].to(self.dtype)
        if not receivers:
            return base.repeat(self.circuits, 1, 1)[None]
        edges = self.edges[:, list(receivers)]
        made = self._sums(edges).unflatten(-1, (self.prompts, self.tokens, self.width)) + base
        for before in range(number + own_heads):
            layer = self.wiring.layers[before]
            if layer.norm is not None:
                made += self._through_norm(before, layer, edges)
        return made.transpose(0, 1).flatten(1, 2)

    def _sums(self, edges: Tensor) -> Tensor:
        """`[circuit, receiver, prompt * token * width]`, of the senders whose differences are those of the stream."""
        edges = edges * self._in_stream
        used = edges.flatten(0, 1).any(0).nonzero().flatten()
        if not len(used):
            return self.values.new_zeros(*edges.shape[:2], self.prompts * self.tokens * self.width)
        if self.keep_graph:
            return self._sum_by_slot(edges, range(len(self.slots)))
        stop = int(used[-1]) + 1
        some = len(used) * 2 < stop
        edges, values = (edges[..., used], self.values[:, used]) if some else (edges[..., :stop], self.values[:, :stop])
        self.cost += Cost(flops=2 * edges.numel() * values[0, 0].numel())
        return torch.bmm(edges, values.flatten(2))

    def _sum_by_slot(self, edges: Tensor, slots: Sequence[int]) -> Tensor:
        """`bmm` of the edges `[1, receiver, slot]` and the differences, slot by slot."""
        made: list[Tensor] = []
        for chosen in edges[0].bool().tolist():
            parts = [
                self.values_of[slot]
                for slot, is_in in zip(slots, chosen, strict=True)
                if is_in and slot in self.values_of
            ]
            made.append(sum(parts[1:], parts[0]) if parts else self.values.new_zeros(1, *self.values.shape[2:]))
        return torch.stack(made, 1).flatten(2)

    @cached_property
    def _in_stream(self) -> Tensor:
        """`[slot]`: 1 if the recorded difference is one of the stream, 0 if a norm comes first."""
        found = torch.ones(len(self.slots))
        for layer, (sender, _) in zip(self.wiring.layers, self.wiring.shape.starts, strict=True):
            for head in range(len(layer.q)) if layer.norm is not None else ():
                found[self.slots_of.get(sender + head, [])] = 0.0
        return found.to(self.values)

    def _through_norm(self, number: int, layer: LayerWires, edges: Tensor) -> Tensor:
        """`[circuit, receiver, prompt, token, width]`: how far the norm of a receiver's heads is from the ablated."""
        sender = self.wiring.shape.starts[number][0]
        slots = [slot for head in range(len(layer.q)) for slot in self.slots_of.get(sender + head, ())]
        before = self.ablated.projected[number]
        if not slots:
            return before.new_zeros((), dtype=self.dtype)
        picked = edges[:, :, slots]
        different, which = torch.unique(picked.transpose(0, 1).flatten(1), dim=0, return_inverse=True)
        different = different.unflatten(1, (self.circuits, len(slots))).transpose(0, 1)
        if self.keep_graph:
            summed = self._sum_by_slot(different, slots)
        else:
            summed = torch.bmm(different, self.values[:, slots].flatten(2))
        summed = summed.unflatten(-1, (self.prompts, self.tokens, self.width))
        ends = ended(self.root, layer, (before.to(summed) + summed).to(before)).to(summed)
        apart = (ends - ended(self.root, layer, before).to(summed)) * layer.block.scale
        return apart[:, which]
