"""Tiny models from a config's name, and sweeps of them by torch hooks on the bare module."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import transformers as hf
from nnsight.modeling.transformers import TransformersModel

from nnsplice.sweeps import Plan
from zoo import tokenizer


def build(kind: str, arguments: dict[str, Any], attention: str = "sdpa") -> Any:
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    config = getattr(hf, kind)(**arguments)
    model = hf.AutoModelForCausalLM.from_config(config, experts_implementation="eager", attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    torch.random.set_rng_state(state)
    return model.eval().double()


def by_hooks(module: Any, plan: Plan, clean: list[int], corrupted: list[int]) -> np.ndarray:
    """Every block output patched by torch hooks on the bare module."""
    layers, kept = module.model.layers, {}
    hooks = [
        layer.register_forward_hook(lambda _m, _a, out, n=n: kept.__setitem__(n, out.clone()))
        for n, layer in enumerate(layers)
    ]
    with torch.no_grad():
        module(torch.tensor([clean]), use_cache=False)
    for hook in hooks:
        hook.remove()
    values = []
    for target in plan.targets:
        layer, position = target.cell.layer, target.cell.position

        def patch(_m: Any, _a: Any, out: Any, layer: Any = layer, position: Any = position) -> Any:
            out = out.clone()
            out[:, position] = kept[layer][:, position]
            return out

        hook = layers[layer].register_forward_hook(patch)
        with torch.no_grad():
            logits = module(torch.tensor([corrupted]), use_cache=False).logits[0, -1]
        hook.remove()
        values.append(float(logits[7] - logits[8]))
    return np.array(values)


def wrapped(module: Any) -> Any:
    return TransformersModel(module, tokenizer=tokenizer(), task="text-generation")
