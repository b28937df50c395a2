"""What the config of a family needs to be tiny, as plain data: one rule for all, and what it cannot know of each.

Windows and chunks are shorter than the prompts of the tests, so that a mask that is lost is seen. Heads are wider than
`width / heads` wherever a family has a field for it.
"""

from __future__ import annotations

from typing import Any

VOCAB = 64
LAYERS = 3
WIDTH = 32
HEADS = 4
WINDOW = 4

#: Field of a config -> its value, wherever a config has the field.
SIZES: dict[str, Any] = {
    # vocabulary
    **dict.fromkeys(("vocab_size", "n_words", "vocab_size_per_layer_input", "unpadded_vocab_size"), VOCAB),
    **dict.fromkeys(("pad_token_id",), 0),
    **dict.fromkeys(("eos_token_id", "bos_token_id", "decoder_start_token_id"), 1),
    **dict.fromkeys(("sep_token_id",), 2),
    # depth
    **dict.fromkeys(
        (
            "num_hidden_layers",
            "n_layer",
            "n_layers",
            "num_layers",
            "decoder_layers",
            "encoder_layers",
            "num_decoder_layers",
            "num_encoder_layers",
            "depth",
            "num_blocks",
        ),
        LAYERS,
    ),
    # width
    **dict.fromkeys(
        (
            "hidden_size",
            "n_embd",
            "d_model",
            "emb_dim",
            "embedding_size",
            "word_embed_proj_dim",
            "input_embedding_size",
            "output_embedding_size",
            "embedding_dim",
        ),
        WIDTH,
    ),
    **dict.fromkeys(
        (
            "intermediate_size",
            "ffn_dim",
            "n_inner",
            "dff",
            "dim_ff",
            "decoder_ffn_dim",
            "encoder_ffn_dim",
            "d_ff",
            "d_inner",
            "ffn_hidden_size",
            "intermediate_size_mlp",
            "dense_intermediate_size",
            "prefix_dense_intermediate_size",
        ),
        40,
    ),
    **dict.fromkeys(
        (
            "moe_intermediate_size",
            "shared_expert_intermediate_size",
            "shared_intermediate_size",
            "shared_experts_intermediate_size",
            "expert_ffn_hidden_size",
            "moe_shared_expert_intermediate_size",
        ),
        12,
    ),
    # heads
    **dict.fromkeys(
        (
            "num_attention_heads",
            "n_head",
            "n_heads",
            "num_heads",
            "decoder_attention_heads",
            "encoder_attention_heads",
            "attention_heads",
            "num_decoder_attention_heads",
            "num_encoder_attention_heads",
            "swa_num_attention_heads",
        ),
        HEADS,
    ),
    **dict.fromkeys(
        ("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads", "kv_n_heads"),
        HEADS // 2,
    ),
    **dict.fromkeys(("head_dim", "swa_head_dim", "global_head_dim", "dim_head", "kv_channels", "d_kv"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim"), 8),
    "qk_head_dim": 16,
    "v_head_dim": 12,
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "o_lora_rank"), 12),
    "rotary_dim": 4,
    # experts
    **dict.fromkeys(
        ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts", "n_experts"),
        4,
    ),
    **dict.fromkeys(
        (
            "num_experts_per_tok",
            "num_experts_per_token",
            "moe_topk",
            "moe_k",
            "moe_top_k",
            "top_k_experts",
        ),
        2,
    ),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("n_group", "num_expert_group"), 2),
    "topk_group": 1,
    # what a token may look at
    **dict.fromkeys(
        (
            "sliding_window",
            "sliding_window_size",
            "attention_chunk_size",
            "window_size",
            "local_attention",
            "attention_window_size",
            "keep_window_size",
        ),
        WINDOW,
    ),
    **dict.fromkeys(
        (
            "max_position_embeddings",
            "n_positions",
            "n_ctx",
            "max_seq_len",
            "max_target_positions",
            "max_source_positions",
            "model_max_length",
        ),
        64,
    ),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"), 1),
    # state spaces and linear attention
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size"), 8),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_heads"), 2),
    "linear_num_value_heads": HEADS,
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 8),
    "chunk_size": 8,
    # other towers
    "image_size": 16,
    "patch_size": 8,
    # an indexer that chooses fewer keys than the prompts have
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_topk": WINDOW,
    "attention_type": "original_full",
    # layers from the second on slide
    "use_sliding_window": True,
    "max_window_layers": 1,
    # factors that are 1 by default and not in the checkpoints that exist
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.25,
    "embedding_multiplier": 2.0,
    "logits_scaling": 2.0,
    "is_decoder": True,
    # a stream that is kept in float32 in a model of float64 would be rounded
    "residual_in_fp32": False,
}

#: Model type -> what the rule does not know of it. A name with a dot belongs to a config inside the config.
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_chunk_size": 8}
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_SHARED: dict[str, Any] = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    "num_kv_shared_layers": 2,
}
_GEMMA3N: dict[str, Any] = {
    **_SHARED,
    "intermediate_size": [40] * 4,
    "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0],
    "hidden_size_per_layer_input": 4,
    "laurel_rank": 4,
}
_QWEN4: dict[str, Any] = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 4,
    "indexer_compress_ratio": 2,
    "hc_lowrank": 8,
}
_GEMMA4: dict[str, Any] = {**_SHARED, "hidden_size_per_layer_input": 4}
_DOTS_WINDOW = {
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "head_dim": 16,
}
_DOTS: dict[str, Any] = {"head_dim": 16, "layer_types": ["indexed_attention", "sliding_attention", "indexed_attention"]}
NEEDS: dict[str, dict[str, Any]] = {
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": _ROPE, "sliding_attention": {**_ROPE}},
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "blt": {
        "use_cache": False,
        "encoder_hash_byte_group_vocab": 32,
        "encoder_hash_byte_group_size": [3, 4],
        **{f"{part}_config.hidden_size": WIDTH for part in ("patcher", "encoder", "decoder", "global")},
        **{f"{part}_config.hidden_size_global": WIDTH for part in ("encoder", "decoder")},
        **{f"{part}_config.head_dim": 8 for part in ("patcher", "decoder", "global")},
        **{f"{part}_config.vocab_size": VOCAB for part in ("patcher", "encoder", "decoder")},
    },
    "dory": {"n_input_layers": 1, "n_recurrent_layers": 1, "n_output_layers": 1},
    "dbrx": {"attn_config.+rope_theta": 1e4, "attn_config.clip_qkv": 2.0, "ffn_config.hidden_size": 32},
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dots3_note_text": {**_DOTS, "per_layer_config": {1: _DOTS_WINDOW}},
    "dots3_note": {
        **{f"text_config.{key}": value for key, value in _DOTS.items()},
        "text_config.per_layer_config": {1: _DOTS_WINDOW},
        "vision_config.adapter_in_dim": 32,
        "vision_config.adapter_out_dim": 32,
        "audio_config.adapter_out_dim": 32,
        "audio_config.downsample_hidden_size": 8,
        "audio_config.adapter_input_size": 32,
    },
    "falcon_h1": {
        **_MAMBA,
        "mamba_d_ssm": 64,
        "mlp_multipliers": [0.7, 0.8],
        "key_multiplier": 0.6,
        "attention_out_multiplier": 0.9,
        "ssm_out_multiplier": 0.8,
        "attention_in_multiplier": 0.9,
    },
    "gemma4": {f"text_config.{key}": value for key, value in _GEMMA4.items()},
    "gemma4_text": _GEMMA4,
    "got_ocr2": {"vision_config.mlp_dim": 40, "vision_config.output_channels": 8, "vision_config.window_size": 2},
    "hrm_text": {"num_hidden_layers": 16, "num_layers_per_stack": 2, "prefix_lm": False},
    "lfm2": {"layer_types": ["full_attention", "conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "longcat_flash": {"zero_expert_num": 2},
    "laguna": {"num_attention_heads_per_layer": [4, 6, 4]},
    "minimax": {"sliding_window": None},
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"]},
    "musicgen": {"decoder.num_codebooks": 1},
    "musicgen_melody": {"decoder.num_codebooks": 1},
    "phi4_multimodal": {
        "audio_config.ext_pw_out_channel": 32,
        "audio_config.depthwise_separable_out_channel": 32,
        "audio_config.nemo_conv_channels": 8,
    },
    "roc_bert": {
        "pronunciation_vocab_size": 8,
        "pronunciation_embed_dim": 4,
        "shape_vocab_size": 8,
        "shape_embed_dim": 4,
    },
    "dots1": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "gemma3n_text": _GEMMA3N,
    "granitemoehybrid": {**_MAMBA, "layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "helium": {"head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False, "mamba_dt_rank": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 2},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 2},
    "qwen4_exp": {f"text_config.{key}": value for key, value in _QWEN4.items()},
    "qwen4_exp_text": _QWEN4,
    "reformer": {
        "axial_pos_embds": False,
        "attention_head_size": 8,
        "feed_forward_size": 40,
        "attn_layers": ["local", "local", "local"],
        "local_attn_chunk_length": 4,
    },
    "xlstm": {"qk_dim_factor": 1.0, "chunk_size": 16, "hidden_size": 64, "embedding_dim": 64},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "use_mamba_kernels": False,
        "mamba_dt_rank": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}

#: Other wirings of a family that its default config does not have: model type, a slash, a name -> what is other.
VARIANTS: dict[str, dict[str, Any]] = {
    "doge/experts": {"is_moe": True, "num_experts": 4, "num_experts_per_tok": 2},
    "falcon/groups": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon/each": {
        "new_decoder_architecture": False,
        "multi_query": False,
        "parallel_attn": False,
        "alibi": True,
        "bias": True,
        "num_kv_heads": HEADS,
    },
    "gemma4_text/experts": {
        **_GEMMA4,
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 12,
    },
    "gemma4_text/keys": {**_GEMMA4, "attention_k_eq_v": True, "num_global_key_value_heads": 2, "global_head_dim": 16},
    "gpt2/scaled": {"scale_attn_by_inverse_layer_idx": True},
    "gpt_bigcode/each": {"multi_query": False},
    "gpt_neox/sequential": {"use_parallel_residual": False},
    "opt/after": {"do_layer_norm_before": False},
    "opt/projected": {"word_embed_proj_dim": 16},
    "stablelm/parallel": {"use_parallel_residual": True, "qk_layernorm": True},
    "xlm/causal": {"causal": True},
}

#: Model type -> why no tiny model of it is built.
NOT_BUILT: dict[str, str] = {
    "gemma3n": "its vision tower needs the package timm; its text tower is gemma3n_text",
    "gemma4_assistant": "it drafts tokens from the keys and values of another model, and reads no prompt",
    "gemma4_unified_assistant": "it drafts tokens from the keys and values of another model, and reads no prompt",
}

#: Model type -> the config inside its config that its causal class is made from.
PART = {"musicgen": "decoder", "musicgen_melody": "decoder"}

#: Model types whose code has no float64.
FLOAT32 = ("blt", "xglm", "inkling2_text", "inkling2_loop_text", "xlstm")
