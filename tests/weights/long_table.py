"""The long table: every family whose weights are cut by heads, as a tiny random model made from its config alone.

A row says what the common config gets wrong for that family: other names of the sizes, parts that would be large, and
numbers that have to fit each other. Heads are narrower or wider than `width / heads` wherever the family allows it.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
import transformers as hf

VOCAB = 64
LAYERS = 3
HEADS = 4

_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 1,
}
_WIDE: dict[str, Any] = {"head_dim": 6}
_MOE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
_LOCAL: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
#: A decoder that was made for translation: its own names for depth, width and heads.
_DECODER: dict[str, Any] = {
    "d_model": 16,
    "decoder_layers": LAYERS,
    "decoder_attention_heads": HEADS,
    "decoder_ffn_dim": 24,
    "encoder_layers": LAYERS,
    "encoder_attention_heads": HEADS,
    "encoder_ffn_dim": 24,
    "is_decoder": True,
}
_BERT: dict[str, Any] = {"is_decoder": True}
_SCALED: dict[str, Any] = {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 64}
_GPT: dict[str, Any] = {"n_embd": 16, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 64}

#: Model type, with a variant after a slash -> what is added to the common config.
ROWS: Mapping[str, dict[str, Any]] = {
    "afmoe": {**_WIDE, **_MOE, "num_dense_layers": 1, "num_shared_experts": 1},
    "apertus": {**_WIDE, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "arcee": _WIDE,
    "aria_text": {**_WIDE, "moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
    "cwm": {**_WIDE, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "ernie4_5": _WIDE,
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 12, "moe_num_shared_experts": 1},
    "exaone4": _WIDE,
    "exaone_moe": {**_WIDE, **_MOE, "num_shared_experts": 1, "n_group": 1, "topk_group": 1},
    "gemma": _WIDE,
    "gemma2": _WIDE,
    "gemma3_text": _WIDE,
    "gemma4_text": {
        "head_dim": 6,
        "global_head_dim": 8,
        "vocab_size_per_layer_input": VOCAB,
        "hidden_size_per_layer_input": 4,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
    "glm4_moe": {**_WIDE, **_MOE, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "granite": _WIDE,
    "granitemoe": _LOCAL,
    "granitemoeshared": {**_LOCAL, "shared_intermediate_size": 12},
    "helium": {"head_dim": 4},
    "hunyuan_v1_dense": _WIDE,
    "hunyuan_v1_moe": {**_WIDE, "num_experts": 4, "moe_topk": 2},
    "llama": _WIDE,
    "llama4_text": {**_WIDE, **_LOCAL, "intermediate_size_mlp": 24, "moe_layers": [1]},
    "minimax": {**_WIDE, **_LOCAL, "layer_types": ["linear_attention", "full_attention", "full_attention"]},
    "ministral": _WIDE,
    "ministral3": {**_WIDE, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, **_SCALED}},
    "mistral": _WIDE,
    "mixtral": {**_WIDE, **_LOCAL},
    "nanochat": {},
    "nemotron": _WIDE,
    "olmo": {},
    "phimoe": _LOCAL,
    "qwen3": _WIDE,
    "qwen3_moe": {**_WIDE, **_MOE},
    "smollm3": {},
    "solar_open": {**_WIDE, **_MOE, "n_routed_experts": 4, "n_shared_experts": 1},
    "stablelm": {},
    "vaultgemma": _WIDE,
    "bart": _DECODER,
    "blenderbot": _DECODER,
    "blenderbot-small": _DECODER,
    "mbart": _DECODER,
    "mvp": _DECODER,
    "opt": {"ffn_dim": 24, "word_embed_proj_dim": 16},
    "pegasus": _DECODER,
    "plbart": _DECODER,
    "bert": _BERT,
    "big_bird": {**_BERT, "attention_type": "original_full", "sep_token_id": 2},
    "megatron-bert": _BERT,
    "bert-generation": _BERT,
    "bigbird_pegasus": {**_DECODER, "attention_type": "original_full"},
    "biogpt": {},
    "bloom": {"n_layer": LAYERS, "n_head": HEADS},
    "camembert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "xlm-roberta-xl": _BERT,
    "xmod": {**_BERT, "languages": ["en_XX"], "default_language": "en_XX"},
    # More than four heads: with four, its layout in four parts cannot be told from the plain one.
    "codegen": {**_GPT, "hidden_size": 32, "num_attention_heads": 8, "rotary_dim": 2},
    "cpmant": {
        "hidden_size": 24,
        "dim_head": 6,
        "dim_ff": 24,
        "prompt_types": 4,
        "prompt_length": 2,
        "segment_types": 4,
    },
    "ctrl": {**_GPT, "dff": 24},
    "data2vec-text": _BERT,
    "electra": {**_BERT, "embedding_size": 16},
    "ernie": _BERT,
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon/mha": {"new_decoder_architecture": False, "multi_query": False, "alibi": True, "bias": True},
    "falcon/mqa": {"new_decoder_architecture": False, "multi_query": True},
    "glm": _WIDE,
    "glm4": _WIDE,
    "jais2": _WIDE,
    "qwen2": {},
    "qwen2_moe": {**_MOE, "shared_expert_intermediate_size": 12},
    "seed_oss": _WIDE,
    "starcoder2": {},
    "gpt-sw3": _GPT,
    "gpt2": _GPT,
    "gpt_bigcode": _GPT,
    "gpt_bigcode/mha": {**_GPT, "multi_query": False},
    "gpt_neo": {"num_layers": LAYERS, "num_heads": HEADS, "attention_types": [[["global", "local", "global"], 1]]},
    "gpt_neox": {},
    "gpt_neox_japanese": {},
    "gpt_oss": {**_WIDE, **_LOCAL, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "gptj": {**_GPT, "rotary_dim": 4},
    "lfm2": {"block_auto_adjust_ff_dim": False, "layer_types": ["conv", "full_attention", "full_attention"]},
    "mpt": {"d_model": 16, "n_layers": LAYERS, "n_heads": HEADS, "max_seq_len": 64},
    "openai-gpt": _GPT,
    "persimmon": {},
    "phi": {},
    "phi3": {},
    "rembert": {**_BERT, "input_embedding_size": 16, "output_embedding_size": 16},
    "roberta-prelayernorm": _BERT,
    "roc_bert": {
        **_BERT,
        "pronunciation_vocab_size": 8,
        "pronunciation_embed_dim": 4,
        "shape_vocab_size": 8,
        "shape_embed_dim": 4,
    },
    "roformer": _BERT,
    "trocr": _DECODER,
    "whisper": {**_DECODER, "max_target_positions": 64, "max_source_positions": 32, "decoder_start_token_id": 1},
    "xglm": {"d_model": 16, "num_layers": LAYERS, "attention_heads": HEADS, "ffn_dim": 24},
    "xlm": {"n_words": VOCAB, "emb_dim": 16, "n_layers": LAYERS, "n_heads": HEADS},
}


def build(name: str, **overrides: Any) -> Any:
    """One family, in eval mode; biases and norms are random too, as a zero would hide a wrong site."""
    kind = type(hf.AutoConfig.for_model(name.partition("/")[0]))
    state = torch.random.get_rng_state()
    try:
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            given = {**_COMMON, **ROWS[name], **overrides}
            if not hasattr(kind(), "num_key_value_heads"):
                del given["num_key_value_heads"]  # a family without shared heads
            config = kind(**given)
            model = hf.AutoModelForCausalLM.from_config(config, experts_implementation="eager")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
    finally:
        torch.random.set_rng_state(state)
    return model.eval()
