"""A transformer that runs on TransformerLens' names and shapes, in plain torch: the meaning of those names, for tests.

One function over a dictionary of tensors; what differs between families is an argument of it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]


def run(state: State, ids: Tensor, config: Any) -> Tensor:
    """Logits of a model whose tensors have TransformerLens' names."""
    kind = config.model_type
    x = state["embed.W_E"][ids]
    if "pos_embed.W_pos" in state:
        x = x + state["pos_embed.W_pos"][: ids.shape[1]]
    layers = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    for number in range(layers):
        block = {n.removeprefix(f"blocks.{number}."): t for n, t in state.items() if n.startswith(f"blocks.{number}.")}
        attended = _attention(block, _norm(block, "ln1", x, config), config, number)
        if "ln1_post.w" in block:
            attended = _norm(block, "ln1_post", attended, config)
        middle = x if kind == "gpt_neox" else x + attended
        added = _mlp(block, _norm(block, "ln2", middle, config), config)
        if "ln2_post.w" in block:
            added = _norm(block, "ln2_post", added, config)
        x = x + attended + added if kind == "gpt_neox" else middle + added
    logits = _norm(state, "ln_final", x, config) @ state["unembed.W_U"] + state["unembed.b_U"]
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


def _norm(state: State, name: str, x: Tensor, config: Any) -> Tensor:
    if f"{name}.b" in state:
        eps = getattr(config, "layer_norm_epsilon", None) or config.layer_norm_eps
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.w"], state[f"{name}.b"], eps)
    return x / (x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * state[f"{name}.w"]


def _attention(block: State, x: Tensor, config: Any, number: int) -> Tensor:
    def heads(letter: str) -> Tensor:
        mark = "_" if f"attn._W_{letter}" in block else ""
        made = torch.einsum("bpm,hmd->bhpd", x, block[f"attn.{mark}W_{letter}"])
        made = made + block[f"attn.{mark}b_{letter}"][None, :, None, :]
        norm = f"attn.{letter.lower()}_norm"
        return _norm(block, norm, made, config) if f"{norm}.w" in block else made

    q, k, v = heads("Q"), heads("K"), heads("V")
    k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], 1) for part in (k, v))
    if config.model_type != "gpt2":
        q, k = (_rotate(part, config) for part in (q, k))
    scale = getattr(config, "query_pre_attn_scalar", None) or q.shape[-1]
    scores = q @ k.mT / math.sqrt(scale)
    cap = getattr(config, "attn_logit_softcapping", None)
    scores = scores if cap is None else torch.tanh(scores / cap) * cap
    place = torch.arange(x.shape[1])
    seen = place[None] <= place[:, None]
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if window is not None and (kinds is None or kinds[number] == "sliding_attention"):
        seen &= place[:, None] - place[None] < window
    pattern = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("bhpd,hdm->bpm", pattern @ v, block["attn.W_O"]) + block["attn.b_O"]


def _rotate(x: Tensor, config: Any) -> Tensor:
    parameters = config.rope_parameters
    width = int(x.shape[-1] * parameters.get("partial_rotary_factor", 1.0))
    speed = parameters["rope_theta"] ** -(torch.arange(0, width, 2, dtype=x.dtype) / width)
    turned = 2 * len(speed)
    angle = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] * speed
    cos, sin = (torch.cat([function(angle)] * 2, -1) for function in (torch.cos, torch.sin))
    part, rest = x[..., :turned], x[..., turned:]
    half = torch.cat([-part[..., turned // 2 :], part[..., : turned // 2]], -1)
    return torch.cat([part * cos + half * sin, rest], -1)


def _mlp(block: State, x: Tensor, config: Any) -> Tensor:
    from transformers.activations import ACT2FN

    name = (
        getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None) or config.activation_function
    )
    made = x @ block["mlp.W_in"] + block["mlp.b_in"]
    made = ACT2FN[name](x @ block["mlp.W_gate"]) * made if "mlp.W_gate" in block else ACT2FN[name](made)
    return made @ block["mlp.W_out"] + block["mlp.b_out"]
