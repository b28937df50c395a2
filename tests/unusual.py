"""Tiny random models of unusual families, built offline: towers beside the text, parts run in turns, mixed heads."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import transformers as hf
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCAB = 64
#: Field of a config -> its value, in every config of a model that has the field.
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "n_words", "vocab_size_per_layer_input"), VOCAB),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "encoder_layers", "decoder_layers", "depth"), 3),
    **dict.fromkeys(("hidden_size", "d_model", "embed_dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim"), 40),
    **dict.fromkeys(("num_attention_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("linear_num_key_heads", "num_key_value_heads"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "patch_size"), 8),
    **dict.fromkeys(("max_position_embeddings", "max_target_positions", "max_source_positions"), 64),
    **dict.fromkeys(("eos_token_id", "bos_token_id", "decoder_start_token_id"), 1),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "linear_num_value_heads"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "kv_lora_rank", "v_head_dim"), 12),
    **dict.fromkeys(("dense_intermediate_size", "prefix_dense_intermediate_size", "unpadded_vocab_size"), VOCAB),
    **dict.fromkeys(("linear_head_dim", "qk_rope_head_dim", "qk_nope_head_dim"), 8),
    **dict.fromkeys(("swa_num_attention_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("swa_num_key_value_heads", "num_experts_per_tok", "num_experts_per_token", "n_group"), 2),
    "swa_head_dim": 16,
    "sliding_window_size": 4,
    "topk_group": 1,
    "pad_token_id": 0,
    "head_dim": 16,
    "image_size": 16,
    "num_layers_per_stack": 3,
    **dict.fromkeys(("vision_output_dim", "projector_input_dim", "projector_output_dim", "intermediate_size_mlp"), 32),
}
_MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
#: Model type -> (class, what its config needs besides; a name with a dot belongs to a config inside it).
_KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "beam": ("BeamForCausalLM", {}),
    "blt": ("BltForCausalLM", {"encoder_hash_byte_group_vocab": 64}),
    "diffllama": ("DiffLlamaForCausalLM", {}),
    "doge": ("DogeForCausalLM", {}),
    "evolla": ("EvollaForProteinText2Text", {}),
    "gemma3": ("Gemma3ForConditionalGeneration", {}),
    "hrm_text": ("HrmTextForCausalLM", {"num_hidden_layers": None, "layer_types": None}),
    "idefics2": ("Idefics2ForConditionalGeneration", {}),
    "inkling_text": ("InklingForCausalLM", {}),
    "instructblip": ("InstructBlipForConditionalGeneration", {}),
    "kimi_linear": ("KimiLinearForCausalLM", {}),
    "laguna": ("LagunaForCausalLM", {"num_attention_heads_per_layer": [4, 8, 4]}),
    "lfm3": ("Lfm3ForCausalLM", {}),
    "llama4": ("Llama4ForConditionalGeneration", {}),
    "llava": ("LlavaForConditionalGeneration", {}),
    "moonshine": ("MoonshineForConditionalGeneration", {}),
    "pi0": ("PI0ForConditionalGeneration", {}),
    "qwen2_vl": ("Qwen2VLForConditionalGeneration", {"text_config.rope_parameters": _MROPE}),
    "qwen3_5": ("Qwen3_5ForConditionalGeneration", {}),
    "t5gemma": ("T5GemmaForConditionalGeneration", {}),
    "video_llava": ("VideoLlavaForConditionalGeneration", {}),
    "whisper": ("WhisperForConditionalGeneration", {"num_mel_bins": 8, "max_source_positions": 16}),
}


def build(name: str) -> Any:
    """One model in float64 and eval mode, with eager attention; the same weights on every call."""
    kind, needs = _KINDS[name]
    if name not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {name}")
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        config = _small(CONFIG_MAPPING[name], needs)
        config._attn_implementation = config._experts_implementation = "eager"
        model = getattr(hf, kind)(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.double().eval()


def _small(kind: Any, given: dict[str, Any]) -> Any:
    default = kind()
    small: dict[str, Any] = {}
    for key, value in vars(default).items():
        if isinstance(value, hf.PretrainedConfig):
            small[key] = _small(
                type(value), {k[len(key) + 1 :]: v for k, v in given.items() if k.startswith(f"{key}.")}
            )
        elif key in _SIZES and value is not None:
            small[key] = _SIZES[key]
    depth = getattr(default, "num_hidden_layers", None)
    small |= {
        key: value[-3:] for key, value in vars(default).items() if isinstance(value, list) and len(value) == depth
    }
    small |= {key: value for key, value in given.items() if "." not in key}
    return kind(**{key: value for key, value in small.items() if value is not None})
