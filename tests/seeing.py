"""A tiny random Llava with the processor that reads texts and images for it, made offline."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import transformers as hf
from PIL import Image

from zoo import VOCAB, tokenizer

SIDE, PATCH = 16, 8
PIECES = (SIDE // PATCH) ** 2
_SIZES: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}


def processor() -> Any:
    """Words `w3 ... w62`, and `<image>` for an image of 4 pieces."""
    words = tokenizer()
    words.add_special_tokens({"additional_special_tokens": ["<image>"]})
    words.padding_side = "right"
    template = (
        "{% for message in messages %}{% if message.content is string %}{{ message.content }} {% else %}"
        "{% for part in message.content %}{% if part.type == 'image' %}<image> {% else %}{{ part.text }} {% endif %}"
        "{% endfor %}{% endif %}{% endfor %}"
    )
    pictures = hf.CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    return hf.LlavaProcessor(
        pictures, words, patch_size=PATCH, vision_feature_select_strategy="default", image_token="<image>",
        num_additional_image_tokens=1, chat_template=template,
    )  # fmt: skip


def build(seed: int = 0) -> Any:
    """The model in float64, with eager attention."""
    torch.manual_seed(seed)
    config = hf.LlavaConfig(
        text_config=hf.LlamaConfig(**_SIZES, vocab_size=VOCAB + 1, max_position_embeddings=64, num_key_value_heads=2),
        vision_config=hf.CLIPVisionConfig(**_SIZES, image_size=SIDE, patch_size=PATCH),
        image_token_index=VOCAB,
    )
    return hf.AutoModelForImageTextToText.from_config(config, attn_implementation="eager").double().eval()


def picture(seed: int) -> Image.Image:
    """Coloured noise."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))
