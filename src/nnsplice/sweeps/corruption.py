"""The corruption of a causal trace: embeddings changed in every edited run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from nnsplice.paths import Path


@dataclass(frozen=True, eq=False)
class Corruption:
    """A change of every edited run before its edits: of tokens of the embedding, or of the stream after it."""

    place: Path
    #: For each prompt: positions, and values `[token, width]`.
    positions: tuple[tuple[int, ...], ...]
    values: tuple[Tensor, ...]
    #: Whether the values replace the embeddings, or are added to them.
    overwrites: bool = False

    def take(self, rows: Sequence[int]) -> Corruption:
        """The corruption of these prompts only."""
        positions, values = (tuple(of[row] for row in rows) for of in (self.positions, self.values))
        return replace(self, positions=positions, values=values)

    def apply(self, prompts: Sequence[int], states: Tensor) -> Tensor:
        """A copy of `[row, token, width]`, whose rows are these prompts, with their tokens changed."""
        new = states.clone()
        for row, prompt in enumerate(prompts):
            tokens, value = list(self.positions[prompt]), self.values[prompt].to(new)
            new[row, tokens] = value if self.overwrites else new[row, tokens] + value
        return new
