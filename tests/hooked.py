"""Tiny models from a config's name, and sweeps of them by torch hooks on the bare module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


#: What a site gets: `[token, width]` as the run has it -> new values, or None to leave it.
Act = Callable[[torch.Tensor], torch.Tensor | None]


def run_with(model: Any, prompt: Sequence[int], acts: Sequence[tuple[Any, Act]]) -> torch.Tensor:
    """The logits `[token, vocab]` of one prompt with torch's hooks at all of these sites at once."""
    root = model._module
    hooks = [_hook(root.get_submodule(site.module), site, act) for site, act in acts]
    try:
        with torch.no_grad():
            return root(input_ids=torch.tensor([list(prompt)])).logits[0]
    finally:
        for hook in hooks:
            hook.remove()


def _hook(module: Any, site: Any, act: Act) -> Any:
    def changed(held: torch.Tensor) -> torch.Tensor | None:
        flat = held.reshape(-1, held.shape[-1]).clone()
        start, stop = site.columns or (0, held.shape[-1])
        new = act(flat[:, start:stop].clone())
        if new is None:
            return None
        flat[:, start:stop] = new
        return flat.reshape(held.shape)

    def before(_m: Any, args: tuple, kwargs: dict) -> Any:
        held = args[0] if args else next(iter(kwargs.values()))
        new = changed(held)
        if new is None:
            return None
        if site.kind == "stream":
            held.copy_(new)  # the skip path holds the same tensor
            return None
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): new})

    def after(_m: Any, _args: Any, out: Any) -> Any:
        held = out if isinstance(out, torch.Tensor) else out[site.item or 0]
        new = changed(held)
        if new is None or isinstance(out, torch.Tensor):
            return new
        parts = list(out)
        parts[site.item or 0] = new
        return type(out)(parts)

    if site.end == "input":
        return module.register_forward_pre_hook(before, with_kwargs=True)
    return module.register_forward_hook(after)


def kept_at(model: Any, prompt: Sequence[int], sites: Sequence[Any]) -> dict[Any, torch.Tensor]:
    """The values of sites in one run: `[token, width]`."""
    kept: dict[Any, torch.Tensor] = {}
    run_with(model, prompt, [(site, lambda held, site=site: kept.__setitem__(site, held)) for site in sites])
    return kept
