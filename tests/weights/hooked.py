"""A tree of the shape that TransformerLens gives its models: projections are parameters of the attention itself."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

VOCAB, WIDTH, HEADS, HEAD, INNER = 23, 8, 4, 3, 10


class Table(nn.Module):
    def __init__(self, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape) * 0.5))

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...


class Norm(Table):
    def __init__(self) -> None:
        super().__init__(w=(WIDTH,), b=(WIDTH,))

    def forward(self, x):
        return nn.functional.layer_norm(x, (WIDTH,), self.w, self.b)


class Attention(Table):
    def __init__(self, groups: int) -> None:
        shared = "" if groups == HEADS else "_"
        of_groups = {f"{shared}{kind}_{role}": role for role in "KV" for kind in "Wb"}
        shapes: dict[str, Any] = {"W_Q": (HEADS, WIDTH, HEAD), "W_O": (HEADS, HEAD, WIDTH)}
        shapes |= {name: (groups, WIDTH, HEAD) if "W" in name else (groups, HEAD) for name in of_groups}
        super().__init__(**shapes, b_Q=(HEADS, HEAD), b_O=(WIDTH,))
        self.shared, self.hook_z = shared, nn.Identity()

    def forward(self, x):
        def project(role):
            shared = "" if role == "Q" else self.shared
            weight, bias = getattr(self, f"{shared}W_{role}"), getattr(self, f"{shared}b_{role}")
            out = torch.einsum("btd,hde->bthe", x, weight) + bias
            return out.repeat_interleave(HEADS // out.shape[2], dim=2)

        q, k, v = map(project, "QKV")
        scores = torch.einsum("bqhe,bkhe->bhqk", q, k).tril().softmax(-1)
        z = self.hook_z(torch.einsum("bhqk,bkhe->bqhe", scores, v))
        return torch.einsum("bqhe,hed->bqd", z, self.W_O) + self.b_O


class MLP(Table):
    def __init__(self, gated: bool) -> None:
        gate = {"W_gate": (WIDTH, INNER)} if gated else {}
        super().__init__(W_in=(WIDTH, INNER), b_in=(INNER,), W_out=(INNER, WIDTH), b_out=(WIDTH,), **gate)

    def forward(self, x):
        inner = x @ self.W_in + self.b_in
        inner = torch.sigmoid(x @ self.W_gate) * inner if hasattr(self, "W_gate") else torch.tanh(inner)
        return inner @ self.W_out + self.b_out


class Block(nn.Module):
    def __init__(self, groups: int, mlp: bool) -> None:
        super().__init__()
        self.ln1, self.attn = Norm(), Attention(groups)
        if mlp:
            self.ln2, self.mlp = Norm(), MLP(gated=groups != HEADS)

    def forward(self, x):
        x = x + self.attn(self.ln1(x))
        return x + self.mlp(self.ln2(x)) if hasattr(self, "mlp") else x


class HookedTransformer(nn.Module):
    def __init__(self, groups: int = HEADS, *, mlp: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cfg = SimpleNamespace(n_heads=HEADS, d_head=HEAD)
        self.embed, self.pos_embed = Table(W_E=(VOCAB, WIDTH)), Table(W_pos=(7, WIDTH))
        self.blocks = nn.ModuleList(Block(groups, mlp) for _ in range(12))
        self.ln_final, self.unembed = Norm(), Table(W_U=(WIDTH, VOCAB), b_U=(VOCAB,))

    def forward(self, ids):
        x: Any = self.embed.W_E[ids] + self.pos_embed.W_pos[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.ln_final(x) @ self.unembed.W_U + self.unembed.b_U
