"""Families that read images: what their tiny configs need, and synthetic images as their processors would give them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

#: The token that stands for a piece of an image, which no prompt of text holds; and how many stand for one image.
IMAGE, PIECES = 63, 4
#: Where the image stands in a prompt of `subject.LONG` tokens.
FIRST = 2
#: Side of the images.
SIDE = 16

_QWEN = {
    "image_token_id": IMAGE,
    "video_token_id": 62,
    "vision_start_token_id": 1,
    "vision_end_token_id": 2,
    "vision_config.patch_size": 8,
    "text_config.rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
    "text_config.head_dim": 16,
}
_QWEN2 = {**_QWEN, "text_config.head_dim": ..., "text_config.rope_parameters": {
    "rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}  # fmt: skip
#: Model type -> what the rule for tiny configs does not know of it; see `sizes.NEEDS`.
NEEDS: dict[str, dict[str, Any]] = {
    "llava": {"image_token_index": IMAGE},
    "paligemma": {"image_token_index": IMAGE, "projection_dim": 32},
    "gemma3": {"image_token_index": IMAGE, "mm_tokens_per_image": PIECES},
    "idefics3": {"image_token_id": IMAGE, "vision_config.patch_size": 4},
    "smolvlm": {"image_token_id": IMAGE, "vision_config.patch_size": 4},
    "internvl": {"image_token_id": IMAGE, "vision_config.patch_size": [4, 4]},
    "mistral3": {"image_token_index": IMAGE, "vision_config.patch_size": 4, "vision_config.head_dim": 8},
    "aya_vision": {"image_token_index": IMAGE, "vision_config.patch_size": 4},
    "qwen2_vl": {**_QWEN2, "vision_config.embed_dim": 32},
    "qwen2_5_vl": {**_QWEN2, "vision_config.out_hidden_size": 32, "vision_config.window_size": 32,
                   "vision_config.fullatt_block_indexes": [1]},
    "qwen3_vl": {**_QWEN, "vision_config.out_hidden_size": 32, "vision_config.deepstack_visual_indexes": [0, 1],
                 "vision_config.num_position_embeddings": 16},
}  # fmt: skip


def pixels(seed: int, *shape: int) -> Tensor:
    """A synthetic image, or what a processor cuts it into."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def _is_image(ids: Tensor) -> Tensor:
    return (ids == IMAGE).long()


def _plain(ids: Tensor, seed: int) -> dict[str, Tensor]:
    return {"pixel_values": pixels(seed, 1, 3, SIDE, SIDE)}


def _grid(ids: Tensor, seed: int) -> dict[str, Tensor]:
    return {
        "pixel_values": pixels(seed, 16, 3 * 2 * 8 * 8),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": _is_image(ids),
    }


#: Model type -> an image of a seed, as its processor gives it beside the tokens.
INPUTS: dict[str, Callable[[Tensor, int], dict[str, Tensor]]] = {
    "llava": _plain,
    "internvl": _plain,
    "aya_vision": _plain,
    "paligemma": lambda ids, seed: {**_plain(ids, seed), "token_type_ids": torch.zeros_like(ids)},
    "gemma3": lambda ids, seed: {**_plain(ids, seed), "token_type_ids": _is_image(ids)},
    "idefics3": lambda ids, seed: {"pixel_values": pixels(seed, 1, 1, 3, SIDE, SIDE)},
    "smolvlm": lambda ids, seed: {"pixel_values": pixels(seed, 1, 1, 3, SIDE, SIDE)},
    "mistral3": lambda ids, seed: {**_plain(ids, seed), "image_sizes": torch.tensor([[SIDE, SIDE]])},
    "qwen2_vl": _grid,
    "qwen2_5_vl": _grid,
    "qwen3_vl": _grid,
}


def with_image(family: str, ids: Tensor, seed: int) -> dict[str, Tensor]:
    """An encoding of one prompt with an image: its tokens are put from `FIRST` on in the place of others."""
    ids = ids.clone()
    ids[:, FIRST : FIRST + PIECES] = IMAGE
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **INPUTS[family](ids, seed)}
