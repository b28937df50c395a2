"""Final norm and logits of packed rows.

The head is code of the model's own forward (norms, scales, caps), so that is what runs, with the rest of the model
standing still. A metric that asks for the logits of two tokens needs two columns of the unembedding, though, and where
those alone give the logits that the head gives, the others are not computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nnsplice.atlas import Tower

#: Logits that are in memory at once; more rows are measured in turns.
LOGITS = 1 << 26


@dataclass(frozen=True)
class Head:
    """What stands between the last block and the logits."""

    root: nn.Module
    tower: Tower
    #: What the model without its head returns, to carry hidden states into the head.
    carrier: type
    #: Whether a logit is nothing but its column of the unembedding times the normed state.
    plain: bool
    vocabulary: int = 0

    @classmethod
    @torch.no_grad()
    def of(cls, root: nn.Module, tower: Tower, states: Tensor, last: Tensor, carrier: type) -> Head:
        """The head of a model, tried on the states that left its last block.

        Args:
            states: what left the last block, `[token, width]`.
            last: what the model without its head made of that.
            carrier: what it returned that in.

        Raises:
            NotImplementedError: more than a norm stands there.
        """
        head = cls(root, tower, carrier, plain=False)
        with torch.no_grad():
            normed = head.normed(states)
        if normed.shape != last.shape or not torch.allclose(normed, last.to(normed.device), rtol=1e-3, atol=1e-3):
            raise NotImplementedError("more than a norm stands between its last layer and its head")
        # A cap on logits leaves small ones nearly as they are, so that a state is looked at that has large ones, too.
        with torch.no_grad():
            largest = head.logits_of_normed(normed[-1:]).abs().max().clamp_min(1e-6)
            wide = torch.cat([normed[-1:], normed[-1:] * (1000 / largest).to(normed)])
            logits = head.logits_of_normed(wide)
        some = torch.linspace(0, logits.shape[-1] - 1, 5, device=states.device).long()[None].expand(2, -1)
        unembed = root.get_submodule(tower.unembed or "")
        # Columns are read of plain numbers: not of quantised ones, nor of those that are elsewhere between uses.
        read = type(unembed) is nn.Linear and type(unembed.weight) is nn.Parameter and not unembed.weight.is_meta
        columns = _columns(unembed, wide, some) if read else None
        size = logits.abs().amax(-1, keepdim=True).clamp_min(1e-6)
        plain = (
            columns is not None
            and columns.dtype == logits.dtype  # else the logits are rounded to other numbers afterwards
            and torch.allclose(columns / size, logits.gather(1, some) / size, rtol=1e-4, atol=1e-4)
        )
        return cls(root, tower, head.carrier, plain, logits.shape[-1])

    def normed(self, states: Tensor) -> Tensor:
        """Behind the final norm, of states that left the last block, with gradients where those are on."""
        return states if self.tower.final_norm is None else self.root.get_submodule(self.tower.final_norm)(states)

    def logits(self, states: Tensor, *, keep_graph: bool = False) -> Tensor:
        """`[row, vocab]` of states that left the last block, `[row, width]`.

        Args:
            states: these states.
            keep_graph: leave the logits in the autograd graph of the states.
        """
        with torch.set_grad_enabled(keep_graph):
            return self.logits_of_normed(self.normed(states))

    def logits_of_normed(self, normed: Tensor) -> Tensor:
        """`[row, vocab]` of states behind the final norm, with gradients where those are on."""
        backbone: Any = self.root.get_submodule(self.tower.prefix)
        returned = self.carrier(last_hidden_state=normed[:, None])
        before = backbone.__dict__.get("forward")
        backbone.forward = lambda *_, **__: returned
        try:
            ids = torch.zeros(normed.shape[0], 1, dtype=torch.long, device=normed.device)
            return self.root(input_ids=ids, use_cache=False).logits[:, -1]
        finally:
            if before is None:
                del backbone.forward
            else:
                backbone.forward = before

    @torch.no_grad()
    def logits_of(self, states: Tensor, tokens: Tensor) -> Tensor:
        """The logits of a few tokens for each row: `[row, token]`."""
        return _columns(self.root.get_submodule(self.tower.unembed or ""), self.normed(states), tokens)


def _columns(unembed: Any, normed: Tensor, tokens: Tensor) -> Tensor:
    here = unembed.weight.device  # which may be another than that of the last block
    there = tokens.to(here)
    logits = torch.einsum("rd,rtd->rt", normed.to(here), unembed.weight[there])
    return (logits if unembed.bias is None else logits + unembed.bias[there]).to(tokens.device)
