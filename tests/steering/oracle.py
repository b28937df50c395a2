"""Steering written down as plainly as it can be: one prompt alone, no cache, no padding, a torch hook, a loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

#: (position of a token, how long the prompt is) -> whether it is steered.
Chosen = Callable[[int, int], bool]

WHERE: dict[str, Chosen] = {
    "all": lambda p, n: True,
    "prompt": lambda p, n: p < n,
    "generated": lambda p, n: p >= n,
    "from_token(4)": lambda p, n: p >= 4,
    "from_token(-1)": lambda p, n: p >= n - 1,
    "span(1, 3)": lambda p, n: 1 <= p < 3,
    "span(-2, -1)": lambda p, n: p == n - 2,
}

BLOCKS = {"gpt2": "transformer.h", "llama": "model.layers", "bloom": "transformer.h", "mixtral": "model.layers",
          "gemma2": "model.layers", "opt": "model.decoder.layers", "gpt_neox": "gpt_neox.layers",
          "qwen3_moe": "model.layers", "mistral": "model.layers", "falcon_mha": "transformer.h",
          "gptj": "transformer.h", "phi": "model.layers"}  # fmt: skip


def block(module: Any, family: str, layer: int) -> Any:
    """The block itself."""
    return module.get_submodule(f"{BLOCKS[family]}.{layer}")


def added(step: Tensor, chosen: Chosen, prompt: int) -> Any:
    """A torch hook that adds a step to chosen tokens of one prompt that runs whole."""

    def hook(_module: Any, _args: Any, output: Any) -> Any:
        states = output[0] if isinstance(output, tuple) else output
        which = torch.tensor([chosen(p, prompt) for p in range(states.shape[1])])
        new = torch.where(which[None, :, None], states + step.to(states), states)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    return hook


def greedy(module: Any, ids: list[int], new: int, where: Any, hook: Callable[[int], Any]) -> list[int]:
    """The tokens that follow, one whole forward pass for each."""
    row = list(ids)
    handle = where.register_forward_hook(hook(len(ids)))
    try:
        with torch.no_grad():
            for _ in range(new):
                row.append(int(module(torch.tensor([row]), use_cache=False).logits[0, -1].argmax()))
    finally:
        handle.remove()
    return row[len(ids) :]


def policy(name: str) -> Any:
    """The same rule in nnsplice's words."""
    import nnsplice as ns

    return name if name in ("all", "prompt", "generated") else eval(name, {**vars(ns.steering)})
