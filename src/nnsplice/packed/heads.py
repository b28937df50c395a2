"""Final norm and logits of packed rows.

The head (norms, scales, caps) runs in the model's own forward, with the backbone replaced by one that returns the given
states. A metric of a few tokens needs only their columns of the unembedding; where these give the same logits as the
head, only they are computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nnsplice.atlas import Tower

#: The largest number of logits in memory at once.
LOGITS = 1 << 26


@dataclass(frozen=True)
class Head:
    """The part of a model between the output of the last block and the logits."""

    root: nn.Module
    tower: Tower
    #: The output class of the backbone (the model without its head).
    carrier: type
    #: Whether a logit is just the normed state times its column of the unembedding (plus a bias).
    plain: bool
    vocabulary: int = 0

    @classmethod
    @torch.no_grad()
    def of(cls, root: nn.Module, tower: Tower, states: Tensor, last: Tensor, carrier: type) -> Head:
        """The head of a model, checked on the outputs of its last block.

        Args:
            states: the output of the last block, `[token, width]`.
            last: the last hidden state that the backbone returned, `[token, width]`.
            carrier: the output class of the backbone.

        Raises:
            NotImplementedError: there is more than a norm between the two.
        """
        head = cls(root, tower, carrier, plain=False)
        with torch.no_grad():
            normed = head.normed(states)
        if normed.shape != last.shape or not torch.allclose(normed, last.to(normed.device), rtol=1e-3, atol=1e-3):
            raise NotImplementedError("more than a norm stands between its last layer and its head")
        # A softcap hardly changes small logits, so a state with large logits is checked too.
        with torch.no_grad():
            largest = head.logits_of_normed(normed[-1:]).abs().max().clamp_min(1e-6)
            wide = torch.cat([normed[-1:], normed[-1:] * (1000 / largest).to(normed)])
            logits = head.logits_of_normed(wide)
        some = torch.linspace(0, logits.shape[-1] - 1, 5, device=states.device).long()[None].expand(2, -1)
        unembed = root.get_submodule(tower.unembed or "")
        # Columns are taken from plain weights only: not from quantised or offloaded ones.
        read = type(unembed) is nn.Linear and type(unembed.weight) is nn.Parameter and not unembed.weight.is_meta
        columns = _columns(unembed, wide, some) if read else None
        size = logits.abs().amax(-1, keepdim=True).clamp_min(1e-6)
        plain = (
            columns is not None
            and columns.dtype == logits.dtype  # else the model casts its logits afterwards
            and torch.allclose(columns / size, logits.gather(1, some) / size, rtol=1e-4, atol=1e-4)
        )
        return cls(root, tower, head.carrier, plain, logits.shape[-1])

    def normed(self, states: Tensor) -> Tensor:
        """The states `[row, width]` after the final norm, with gradients if they are enabled."""
        return states if self.tower.final_norm is None else self.root.get_submodule(self.tower.final_norm)(states)

    def logits(self, states: Tensor, *, keep_graph: bool = False) -> Tensor:
        """The logits `[row, vocab]` of outputs of the last block.

        Args:
            states: the outputs, `[row, width]`.
            keep_graph: keep the logits in the autograd graph of the states.
        """
        with torch.set_grad_enabled(keep_graph):
            return self.logits_of_normed(self.normed(states))

    def logits_of_normed(self, normed: Tensor) -> Tensor:
        """The logits `[row, vocab]` of states after the final norm, with gradients if they are enabled."""
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
    here = unembed.weight.device  # may be another device than that of the last block
    there = tokens.to(here)
    logits = torch.einsum("rd,rtd->rt", normed.to(here), unembed.weight[there])
    return (logits if unembed.bias is None else logits + unembed.bias[there]).to(tokens.device)
