"""The graph of a model: its senders, receivers, and the edges between them.

Plain data: a circuit carries it along, so that complements and files need no model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from nnsplice.errors import FileError
from nnsplice.paths import Path, parse_path


@dataclass(frozen=True, slots=True)
class LayerShape:
    """One layer: query heads, key/value heads, and whether attention and MLP read the same stream."""

    heads: int
    groups: int
    parallel: bool
    #: Whether a head reads the queries and keys of all heads of its layer (a norm over the whole projection). Known of
    #: a model, and no part of which edges there are.
    mixed: bool = field(default=False, compare=False)


@dataclass(frozen=True)
class Shape:
    """All layers of a model."""

    layers: tuple[LayerShape, ...]

    @cached_property
    def senders(self) -> tuple[Path, ...]:
        """In the order in which they run."""
        texts = ["embed"]
        for number, layer in enumerate(self.layers):
            texts += [f"layers[{number}].heads[{head}]" for head in range(layer.heads)] + [f"layers[{number}].mlp"]
        return tuple(map(parse_path, texts))

    @cached_property
    def receivers(self) -> tuple[Path, ...]:
        """In the order in which they run."""
        texts: list[str] = []
        for number, layer in enumerate(self.layers):
            texts += [f"layers[{number}].heads[{head}].q" for head in range(layer.heads)]
            texts += [f"layers[{number}].groups[{group}].k" for group in range(layer.groups)]
            texts += [f"layers[{number}].groups[{group}].v" for group in range(layer.groups)]
            texts.append(f"layers[{number}].mlp")
        return tuple(map(parse_path, (*texts, "unembed")))

    @cached_property
    def sender_number(self) -> Mapping[Path, int]:
        """Sender -> its index among the senders."""
        return {path: number for number, path in enumerate(self.senders)}

    @cached_property
    def receiver_number(self) -> Mapping[Path, int]:
        """Receiver -> its index among the receivers."""
        return {path: number for number, path in enumerate(self.receivers)}

    @cached_property
    def exists(self) -> np.ndarray:
        """`[receiver, sender]`: whether the sender runs before the receiver reads."""
        adds, reads = [0], []
        for number, layer in enumerate(self.layers):
            start = 2 * number
            adds += [start + (2 if layer.parallel else 1)] * layer.heads + [start + 2]
            reads += [start] * (layer.heads + 2 * layer.groups) + [start + (0 if layer.parallel else 1)]
        reads.append(2 * len(self.layers))
        found = np.array(adds)[None] <= np.array(reads)[:, None]
        found.setflags(write=False)
        return found

    @cached_property
    def n_edges(self) -> int:
        """The number of edges."""
        return int(self.exists.sum())

    @cached_property
    def starts(self) -> tuple[tuple[int, int], ...]:
        """For each layer, the numbers of its first sender and of its first receiver."""
        sender, receiver = 1, 0
        found: list[tuple[int, int]] = []
        for layer in self.layers:
            found.append((sender, receiver))
            sender, receiver = sender + layer.heads + 1, receiver + layer.heads + 2 * layer.groups + 1
        return tuple(found)

    def edges(self, mask: np.ndarray) -> tuple[tuple[Path, Path], ...]:
        """The edges of a mask `[receiver, sender]`, by sender and then by receiver."""
        return tuple((self.senders[s], self.receivers[r]) for s, r in zip(*np.nonzero(mask.T), strict=True))

    def reads_of(self, sender: int) -> tuple[int, ...]:
        """The receivers that a sender is made of: a head's queries, keys and values, an MLP itself; none of `embed`."""
        return self._reads[sender]

    @cached_property
    def _reads(self) -> tuple[tuple[int, ...], ...]:
        found: list[tuple[int, ...]] = [()]
        for layer, (_, first) in zip(self.layers, self.starts, strict=True):
            for head in range(layer.heads):
                group = head * layer.groups // layer.heads
                keys = first + layer.heads + group
                found.append((first + head, keys, keys + layer.groups))
            found.append((first + layer.heads + 2 * layer.groups,))
        return tuple(found)

    # --- as plain data

    def as_list(self) -> list[list[int]]:
        """For files."""
        return [[one.heads, one.groups, int(one.parallel), *([1] if one.mixed else [])] for one in self.layers]

    @classmethod
    def read(cls, listed: Any) -> Shape:
        """The graph of `as_list`.

        Raises:
            FileError: it is something else.
        """
        if not isinstance(listed, Sequence) or not listed or not all(map(_is_layer, listed)):
            raise FileError("the file does not say how many heads each layer has", expected="[[heads, groups, 0 or 1]]")
        return cls(tuple(LayerShape(one[0], one[1], bool(one[2]), len(one) > 3) for one in listed))


def _is_layer(listed: Any) -> bool:
    if not isinstance(listed, Sequence) or len(listed) not in (3, 4) or not all(isinstance(n, int) for n in listed):
        return False
    heads, groups, parallel, *mixed = listed
    return mixed in ([], [1]) and 0 < groups <= heads <= 1 << 16 and heads % groups == 0 and parallel in (0, 1)
