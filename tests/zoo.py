"""Tiny random models of many families, built offline from configs, with a word-level tokenizer that fits them all.

`build(name)` is a bare transformers model in eval mode with the same weights on every call; `wrap(name)` is the same
model inside nnsight. Three layers, width 16, 4 heads, 2 key/value heads where the family can, 64 words.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers

VOCAB = 64
LAYERS = 3
HEADS = 4

_TOKENS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
_COMMON = {"vocab_size": VOCAB, "max_position_embeddings": 64, **_TOKENS}
_MODERN = {
    **_COMMON,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
}
_MHA = {k: v for k, v in _MODERN.items() if k != "num_key_value_heads"}
_GPT = {"vocab_size": VOCAB, "n_embd": 16, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 64, **_TOKENS}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "decoder_sparse_step": 1}
_FALCON = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 1,
}
_BART = {
    **_COMMON,
    "d_model": 16,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}

#: Name -> (config class, its arguments). Head sizes differ from width / heads wherever the family allows it.
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", _GPT),
    "gptj": ("GPTJConfig", {**_GPT, "rotary_dim": 4}),
    "gpt_neo": (
        "GPTNeoConfig",
        {
            **_COMMON,
            "hidden_size": 16,
            "num_layers": LAYERS,
            "num_heads": HEADS,
            "attention_types": [[["global", "local", "global"], 1]],
            "window_size": 3,
        },
    ),
    "gpt_neox": ("GPTNeoXConfig", _MHA),
    "bloom": (
        "BloomConfig",
        {"vocab_size": VOCAB, "hidden_size": 16, "n_layer": LAYERS, "n_head": HEADS, **_TOKENS},
    ),
    "opt": (
        "OPTConfig",
        {
            **_COMMON,
            "hidden_size": 16,
            "ffn_dim": 32,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "word_embed_proj_dim": 16,
        },
    ),
    "falcon": ("FalconConfig", {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon_mqa": ("FalconConfig", {**_FALCON, "new_decoder_architecture": False, "multi_query": True}),
    "falcon_mha": (
        "FalconConfig",
        {
            **_FALCON,
            "new_decoder_architecture": False,
            "multi_query": False,
            "parallel_attn": False,
            "alibi": True,
            "bias": True,
        },
    ),
    "llama": ("LlamaConfig", {**_MODERN, "head_dim": 6}),
    "mistral": ("MistralConfig", {**_MODERN, "head_dim": 6, "sliding_window": 3}),
    "qwen2": ("Qwen2Config", _MODERN),
    "qwen3": ("Qwen3Config", {**_MODERN, "head_dim": 6}),
    "gemma2": ("Gemma2Config", {**_MODERN, "head_dim": 6, "sliding_window": 4}),
    "gemma3": ("Gemma3TextConfig", {**_MODERN, "head_dim": 6, "sliding_window": 4}),
    "phi3": ("Phi3Config", _MODERN),
    "phi": ("PhiConfig", _MODERN),
    "olmo2": ("Olmo2Config", _MODERN),
    "mixtral": ("MixtralConfig", {**_MODERN, "head_dim": 6, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": ("Qwen3MoeConfig", {**_MODERN, "head_dim": 6, **_MOE}),
    "gpt_bigcode": ("GPTBigCodeConfig", {**_GPT, "multi_query": True}),
    "gpt_bigcode_mha": ("GPTBigCodeConfig", {**_GPT, "multi_query": False}),
    # More than four heads: with four, its layout in four parts cannot be told from the plain one.
    "codegen": ("CodeGenConfig", {**_GPT, "n_embd": 32, "n_head": 8, "rotary_dim": 2}),
    "stablelm": ("StableLmConfig", _MODERN),
    "t5": (
        "T5Config",
        {
            "vocab_size": VOCAB,
            "d_model": 16,
            "d_kv": 6,
            "d_ff": 32,
            "num_layers": LAYERS,
            "num_decoder_layers": LAYERS,
            "num_heads": HEADS,
            "relative_attention_num_buckets": 8,
            "decoder_start_token_id": 0,
            "pad_token_id": 0,
            "eos_token_id": 1,
        },
    ),
    "bart": ("BartConfig", _BART),
    "bert": ("BertConfig", {**_MHA, "type_vocab_size": 2}),
    "gpt_oss": (
        "GptOssConfig",
        {
            **_MODERN,
            "head_dim": 6,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "mpt": (
        "MptConfig",
        {"vocab_size": VOCAB, "d_model": 16, "n_layers": LAYERS, "n_heads": HEADS, "max_seq_len": 64},
    ),
    "cohere": ("CohereConfig", {**_MODERN, "logit_scale": 0.25}),
    "olmo": ("OlmoConfig", _MODERN),
    "gemma": ("GemmaConfig", {**_MODERN, "head_dim": 6}),
    "lfm2": ("Lfm2Config", {**_MODERN, "layer_types": ["full_attention", "conv", "full_attention"]}),
    "granite": ("GraniteConfig", {**_MODERN, "residual_multiplier": 0.5}),
    "albert": ("AlbertConfig", {**_MHA, "embedding_size": 8, "inner_group_num": 1}),
}

#: Families that every oracle test runs over.
FAMILIES: tuple[str, ...] = tuple(
    n for n in _CONFIGS if n not in ("granite", "albert", "gpt_oss", "mpt", "cohere", "lfm2", "olmo", "gemma")
)
SEQ2SEQ = ("t5", "bart")
MASKED = ("bert", "albert")


def task(name: str) -> str:
    """What the family is for, in the words of transformers' pipelines."""
    return "fill-mask" if name in MASKED else "text-generation"


def build(name: str, *, seed: int = 0, **overrides: Any) -> Any:
    """A tiny random model of one family, in eval mode; `overrides` replace arguments of its config.

    Attention probabilities need `attn_implementation="eager"`.

    Biases and norm weights are drawn at random too: at zero and one, a misplaced bias or norm would go unnoticed.
    """
    kind, arguments = _CONFIGS[name]
    config = getattr(hf, kind)(**{**arguments, **overrides})
    auto = (
        hf.AutoModelForMaskedLM
        if name in MASKED
        else hf.AutoModelForSeq2SeqLM
        if name in SEQ2SEQ
        else hf.AutoModelForCausalLM
    )
    state = torch.random.get_rng_state()
    try:
        torch.manual_seed(seed)
        # The fused kernel for experts has no float64.
        model = auto.from_config(config, experts_implementation="eager")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
    finally:
        torch.random.set_rng_state(state)
    return model.eval()


def tokenizer() -> hf.PreTrainedTokenizerFast:
    """One token per word: `<pad> <eos> <unk> w3 ... w63`, split at white space."""
    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2, **{f"w{i}": i for i in range(3, VOCAB)}}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", mask_token="<unk>"
    )


def inputs(name: str, length: int = 5, rows: int = 2) -> dict[str, torch.Tensor]:
    """Token ids that the family's forward takes as they are."""
    ids = (torch.arange(rows * length).reshape(rows, length) * 7 + 3) % (VOCAB - 3) + 3
    return {"input_ids": ids, "decoder_input_ids": ids.flip(-1)} if name in SEQ2SEQ else {"input_ids": ids}


def wrap(name: str, *, seed: int = 0, **overrides: Any) -> Any:
    """The same tiny model inside nnsight."""
    from nnsight.modeling.transformers import TransformersModel

    with warnings.catch_warnings():
        # BERT calls some of its modules `output`; what nnsight calls them then is no news here.
        warnings.filterwarnings("ignore", message=".*submodule named 'output'")
        return TransformersModel(build(name, seed=seed, **overrides), tokenizer=tokenizer(), task=task(name))


def double(name: str, **overrides: Any) -> Any:
    """The same tiny model inside nnsight, in float64."""
    model = wrap(name, **overrides)
    model._module.double()
    return model


def having(model: Any, sites: Iterable[str]) -> list[str]:
    """Those of the sites that the model has."""
    import nnsplice as ns

    found = []
    for site in sites:
        try:
            ns.expand(model, site)
        except ns.errors.NnspliceError:
            continue
        found.append(site)
    return found
