"""The cost of runs: forward passes, block calls, tokens, floating point operations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from nnsplice import engine
from nnsplice.activations.prompts import Prompts
from nnsplice.atlas import Atlas, Tower, unwrap


@dataclass(frozen=True, slots=True)
class Cost:
    """The cost of some runs."""

    #: Tokens times blocks that they went through.
    tokens: int = 0
    forwards: int = 0
    block_calls: int = 0
    #: Floating point operations, as `CostModel` counts them.
    flops: float = 0.0
    #: The most tokens that were in memory at once.
    peak: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.tokens + other.tokens,
            self.forwards + other.forwards,
            self.block_calls + other.block_calls,
            self.flops + other.flops,
            max(self.peak, other.peak),
        )

    def as_dict(self) -> dict[str, Any]:
        """The fields of `results.Run`."""
        return {name: getattr(self, name) for name in ("forwards", "block_calls", "tokens", "flops")}


@dataclass(frozen=True)
class CostModel:
    """The operations per token in a model: two for each element of a matrix that the token is multiplied with.

    Attention scores, norms and the like are left out, about a tenth of the whole for short prompts. Keys and values of
    another tower count for the tokens of that tower.
    """

    root: nn.Module
    towers: Mapping[str, Tower]
    #: The number of experts per token.
    routed: int = 1
    _known: dict[str, int] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, model: engine.Model) -> CostModel:
        """The cost model of a model's blocks and unembedding; of all its matrices if it has no blocks."""
        root = unwrap(model)
        config = getattr(root, "config", None)
        return cls(root, Atlas.of(model).towers, getattr(config, "num_experts_per_tok", None) or 1)

    def per_token(self, *parts: str | None) -> int:
        """The operations for one token in these modules, by their names."""
        total = 0
        for part in parts:
            if part is not None and part not in self._known:
                self._known[part] = sum(map(self._own, self.root.get_submodule(part).modules()))
            total += self._known.get(part, 0) if part is not None else 0
        return total

    @property
    def token(self) -> int:
        """The operations for one token in all blocks; in the whole model where it has none."""
        blocks = [block for tower in self.towers.values() for block in tower.blocks]
        return max(sum(self.per_token(*block.modules) for block in blocks) or self.per_token(""), 1)

    def _own(self, module: nn.Module) -> int:
        if isinstance(module, nn.Embedding):  # read, not multiplied with
            return 0
        own = [p.shape for p in module.parameters(recurse=False)]
        matrices = sum(2 * shape.numel() for shape in own if len(shape) == 2)
        return matrices + sum(2 * shape[1:].numel() * min(self.routed, shape[0]) for shape in own if len(shape) == 3)

    def whole(self, prompts: Prompts, rows: Sequence[int], logits: int, skipped: int = 0) -> Cost:
        """The cost of one forward pass of some prompts.

        Args:
            logits: the number of tokens of each prompt whose logits are computed.
            skipped: the number of blocks that are skipped, from the first.
        """
        towers = sorted(self.towers.values(), key=lambda tower: tower.name != "encoder")
        lengths = {name: sum(prompts.lengths(name)[row] for row in rows) for name in ("encoder", "decoder")}
        blocks = [(lengths[tower.name], block) for tower in towers for block in tower.blocks][skipped:]
        flops = sum(tokens * self.per_token(*block.modules) for tokens, block in blocks)
        flops += logits * len(rows) * self.per_token(*(tower.unembed for tower in towers))
        if not towers:
            flops = lengths["decoder"] * self.per_token("")
        return Cost(sum(tokens for tokens, _ in blocks), 1, len(blocks), flops, max(lengths.values()))
