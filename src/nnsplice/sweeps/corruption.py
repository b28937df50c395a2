"""The corruption of a causal trace: embeddings changed in every edited run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from nnsplice.paths import Path


@dataclass(frozen=True, eq=False)
class Corruption:
    """A change of every edited run before its edits, to some tokens of the embedding or of the stream after it."""

    place: Path
    #: The changed tokens of each prompt, and their values `[token, width]`.
    positions: tuple[tuple[int, ...], ...]
    values: tuple[Tensor, ...]
    #: Whether the values replace the embeddings instead of being added to them.
    overwrites: bool = False

    def take(self, rows: Sequence[int]) -> Corruption:
        """The corruption of these prompts only."""
        positions, values = (tuple(of[row] for row in rows) for of in (self.positions, self.values))
        return replace(self, positions=positions, values=values)

    def apply(self, prompts: Sequence[int], states: Tensor) -> Tensor:
        """A copy of states `[row, token, width]`, with the tokens of these prompts changed."""
        new = states.clone()
        for row, prompt in enumerate(prompts):
            tokens, value = list(self.positions[prompt]), self.values[prompt].to(new)
            new[row, tokens] = value if self.overwrites else new[row, tokens] + value
        return new
