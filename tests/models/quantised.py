"""A tiny Llama as a GGUF file, written by the gguf package as llama.cpp's converter would, and its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf
from torch import Tensor

VOCAB, WIDTH, INNER, LAYERS, HEADS, GROUPS, HEAD = 300, 64, 96, 2, 4, 2, 16
#: llama.cpp's name in a block -> ours.
NAMES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip


def config() -> Any:
    return hf.LlamaConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=GROUPS, max_position_embeddings=64, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=0, rms_norm_eps=1e-5,
    )  # fmt: skip


def write(path: Path, seed: int = 0, *, kind: str = "Q4_1", lost: str = "") -> dict[str, Tensor]:
    """Write the file; the weights that a reader has to find are returned.

    Args:
        lost: a tensor that the file does not have.
    """
    import gguf

    torch.manual_seed(seed)
    weights = dict(hf.LlamaForCausalLM(config()).state_dict())
    quantised = getattr(gguf.GGMLQuantizationType, kind)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(GROUPS)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(HEAD)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCAB)
    _add_tokenizer(writer)
    expected: dict[str, Tensor] = {}
    places = [("token_embd", "model.embed_tokens"), ("output_norm", "model.norm")]
    places += [
        (f"blk.{n}.{theirs}", f"model.layers.{n}.{ours}") for n in range(LAYERS) for theirs, ours in NAMES.items()
    ]
    for theirs, ours in places:
        name = f"{ours}.weight"
        heads = HEADS if "attn_q" in theirs else GROUPS if "attn_k" in theirs else 0
        array = rotated(weights[name], heads).numpy()
        if array.ndim == 1:
            found = array
            writer.add_tensor(f"{theirs}.weight", array)
        else:
            packed = gguf.quants.quantize(array, quantised)
            found = gguf.quants.dequantize(packed, quantised)
            if theirs != lost:
                writer.add_tensor(f"{theirs}.weight", packed, raw_dtype=quantised)
        expected[name] = straight(torch.from_numpy(found.copy()), heads)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def rotated(weight: Tensor, heads: int) -> Tensor:
    """Rows of a projection in llama.cpp's order: of each head, the two halves that rotate together side by side."""
    if not heads:
        return weight
    rows = [head * HEAD + half * HEAD // 2 + n for head in range(heads) for n in range(HEAD // 2) for half in (0, 1)]
    return weight[rows]


def straight(weight: Tensor, heads: int) -> Tensor:
    """The same rows in transformers' order again."""
    if not heads:
        return weight
    rows = [head * HEAD + half * HEAD // 2 + n for head in range(heads) for n in range(HEAD // 2) for half in (0, 1)]
    return weight[np.argsort(rows)]


def _add_tokenizer(writer: Any) -> None:
    """One token for each byte, and merges that make the words of the tests."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    alphabet = bytes_to_unicode()
    tokens, merges = ["<|end|>", *alphabet.values()], []
    for word in ("Ġthe", "Ġcat", "Ġsat"):
        for stop in range(2, len(word) + 1):
            if word[:stop] not in tokens:
                tokens.append(word[:stop])
                merges.append(f"{word[: stop - 1]} {word[stop - 1]}")
    tokens += [f"<unused{n}>" for n in range(VOCAB - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_merges(merges)
    writer.add_token_types([3] + [1] * (VOCAB - 1))
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(False)
