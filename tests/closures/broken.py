"""Small models whose layers do something that their names do not say, and families of transformers that do so."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import transformers as hf
from torch import Tensor, nn

import nnsplice as ns
from zoo import VOCAB, build, tokenizer

_SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 1,
    "sliding_window": 4,
}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_chunk_size": 8, "mamba_d_state": 8}
_LATENT = {"q_lora_rank": 12, "kv_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6,
           "head_dim": 4, "num_key_value_heads": 4}  # fmt: skip
_EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
#: Model type -> what its config needs beside small numbers.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "afmoe": {**_EXPERTS, "num_dense_layers": 1},
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "bitnet": {"head_dim": 4},
    "diffllama": {},
    "doge": {},
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 32},
    "gemma4_text": {"hidden_size_per_layer_input": 4, "layer_types": ["sliding_attention", "full_attention"],
                    "vocab_size_per_layer_input": VOCAB},
    "granite_swa": {},
    "hyperclovax": {"residual_multiplier": 0.5},
    "jamba": {**_EXPERTS, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4},
    "laguna": {**_EXPERTS, "num_attention_heads_per_layer": [4, 4],
               "layer_types": ["sliding_attention", "full_attention"]},
    "lfm3": {"layer_types": ["full_attention", "conv"]},
    "minimax": {"num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": ["full_attention", "linear_attention"],
                "sliding_window": None},
    "qwen3_next": {**_EXPERTS, "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
                   "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
                   "shared_expert_intermediate_size": 12},
    "deepseek_v3": {**_LATENT, "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 12,
                    "first_k_dense_replace": 1, "num_experts_per_tok": 2},
    "minicpm3": _LATENT,
    "mamba": {"state_size": 8, "residual_in_fp32": False},
    "nemotron_h": {**_EXPERTS, "layers_block_type": ["linear_attention", "full_attention"], "mamba_num_heads": 4,
                   "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 2, "chunk_size": 8, "n_routed_experts": 4},
    "recurrent_gemma": {"lru_width": 16, "block_types": ["recurrent", "attention"], "attention_window_size": 4},
}  # fmt: skip


def family(name: str, dtype: torch.dtype = torch.float64, change: Callable[[nn.Module], None] | None = None) -> Any:
    """A small model of a family with eager attention, its norms and biases random too.

    Args:
        change: what to do to each attention module.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = CONFIG_MAPPING[name](**{**_SMALL, **FAMILIES[name]})
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = hf.AutoModelForCausalLM.from_config(
                config, attn_implementation="eager", experts_implementation="eager"
            )
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.2)
    for module in [m for m in model.modules() if change is not None and type(m).__name__.endswith("Attention")]:
        change(module)  # pyright: ignore[reportOptionalCall]
    return ns.load(model.to(dtype).eval(), tokenizer())


def llama(change: Callable[[nn.Module], None] | None = None, dtype: torch.dtype = torch.float64) -> Any:
    """A small Llama, changed in its second layer."""
    model = build("llama").to(dtype)
    model.set_attn_implementation("eager")
    if change is not None:
        change(model.model.layers[1])
    return ns.load(model, tokenizer())


def before_the_head(change: Callable[[Tensor, Tensor], Tensor]) -> Any:
    """A small Llama that changes the last layer's output, with the first one's at hand, before its final norm."""
    model = build("llama").to(torch.float64)
    model.set_attn_implementation("eager")
    first: list[Tensor] = []
    _around(model.model.layers[0], lambda out, *_: first.append(out) or out)
    _in_front(model.model, model.model.norm, lambda last: change(last, first[-1]))
    return ns.load(model, tokenizer())


def beside_the_head(change: Callable[[Tensor, Tensor], Tensor]) -> Any:
    """A small Llama whose final norm is given the last layer's output as it is, and whose head reads more than that."""
    model = build("llama").to(torch.float64)
    model.set_attn_implementation("eager")
    first: list[Tensor] = []
    _around(model.model.layers[0], lambda out, *_: first.append(out) or out)
    _in_front(model, model.lm_head, lambda normed: change(normed, first[-1]))
    return ns.load(model, tokenizer())


def gates_first(attn: Any) -> None:
    """Let an attention take the halves of each head's queries the other way round."""
    chunk, inner = torch.chunk, attn.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with mock.patch.object(torch, "chunk", lambda *a, **k: chunk(*a, **k)[::-1]):
            return inner(*args, **kwargs)

    attn.forward = forward


def values_first(attn: Any) -> None:
    """Let latent attention take values before keys: what its layer makes for each head has them so."""
    inner = attn.expand_kv

    class Turned(nn.Module):
        """The layer, with each head's columns turned by those of its value."""

        def forward(self, x: Tensor) -> Tensor:
            made = layer(x)
            return made.unflatten(-1, (attn.num_heads, -1)).roll(-attn.v_head_dim, -1).flatten(-2)

    layer = attn.kv_b_proj

    def expand(kv: Tensor, rotated: Tensor) -> Any:
        attn._modules["kv_b_proj"] = turned
        try:
            return inner(kv, rotated)
        finally:
            attn._modules["kv_b_proj"] = layer

    turned = Turned()
    attn.expand_kv = expand


def _around(module: Any, change: Callable[..., Any]) -> None:
    """Let a module's own code make something else (a hook would be somebody else's)."""
    inner = module.forward
    module.forward = lambda *args, **kwargs: change(inner(*args, **kwargs), *args)


def _in_front(module: nn.Module, inside: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """Let a module's own code change what it gives to a module inside."""
    inner = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        handle = inside.register_forward_pre_hook(lambda _, given: (change(given[0]),), prepend=True)
        try:
            return inner(*args, **kwargs)
        finally:
            handle.remove()

    module.forward = forward


def scaled_attention(layer: Any) -> None:
    """The layer adds half of what attention makes."""
    inner = layer.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        handle = layer.self_attn.register_forward_hook(lambda _, given, out: (out[0] / 2, out[1]))
        try:
            return inner(*args, **kwargs)
        finally:
            handle.remove()

    layer.forward = forward


def gated_heads(layer: Any) -> None:
    """The slices go through a gate in front of the output projection, inside the attention."""
    gate = torch.linspace(0.5, 1.5, layer.self_attn.o_proj.in_features).to(layer.self_attn.o_proj.weight)
    _in_front(layer.self_attn, layer.self_attn.o_proj, lambda slices: slices * gate)


def mixed_heads(layer: Any) -> None:
    """The first slice has some of the third in it, which is of another group."""
    d = layer.self_attn.head_dim

    def mix(tensor: Tensor) -> Tensor:
        return torch.cat([tensor[..., :d] + 0.1 * tensor[..., 2 * d : 3 * d], tensor[..., d:]], dim=-1)

    _in_front(layer.self_attn, layer.self_attn.o_proj, mix)


def detached_mid(layer: Any) -> None:
    """The MLP's norm is given a copy of the stream, so that a write to it does not go on beside the MLP."""
    _in_front(layer, layer.post_attention_layernorm, torch.clone)


def scaled_mlp(layer: Any) -> None:
    """The MLP makes something that is no multiple of what its last matrix makes."""
    _around(layer.mlp, lambda out, *_: out.tanh())


def false_pattern(layer: Any) -> None:
    """What is returned as probabilities is not what was used."""
    _around(layer.self_attn, lambda out, *_: (out[0], out[1].roll(1, dims=1)))


def scores_for_pattern(layer: Any) -> None:
    """What is returned are no probabilities."""
    _around(layer.self_attn, lambda out, *_: (out[0], out[1] * 3))
