"""The ten tasks with TransformerLens 4.3."""

from __future__ import annotations

from typing import Any

import torch
from transformer_lens.model_bridge import TransformerBridge


def setup(given: Any) -> Any:
    model = TransformerBridge.boot_transformers(given.folder, hf_model=given.module, tokenizer=given.tokenizer)
    given.ids = {
        text: given.tokenizer(text, return_tensors="pt").input_ids for text in given.texts
    }  # no token in front
    return model


def next_token(model, given):
    return given.tokenizer.decode(model(given.ids[given.clean])[0, -1].argmax())


def capture(model, given):
    _, cache = model.run_with_cache(given.ids[given.clean], names_filter=lambda name: name.endswith("hook_resid_post"))
    return torch.stack([cache[f"blocks.{layer}.hook_resid_post"][0, -1] for layer in range(model.cfg.n_layers)])


def _difference(model, given, prompt, name, at, new):
    def put(value, hook):
        value[at] = new
        return value

    logits = model.run_with_hooks(given.ids[prompt], fwd_hooks=[(name, put)])[0, -1]
    return logits[given.right] - logits[given.wrong]


def patch(model, given):
    _, cache = model.run_with_cache(given.ids[given.clean])
    name, at = "blocks.10.hook_resid_post", (slice(None), 2)
    return _difference(model, given, given.corrupted, name, at, cache[name][at])


def sweep_stream(model, given):
    _, cache = model.run_with_cache(given.ids[given.clean])
    layers, tokens = model.cfg.n_layers, given.ids[given.clean].shape[1]
    grid = torch.zeros(layers, tokens)
    for layer in range(layers):
        for token in range(tokens):
            name, at = f"blocks.{layer}.hook_resid_post", (slice(None), token)
            grid[layer, token] = _difference(model, given, given.corrupted, name, at, cache[name][at])
    return grid


def sweep_heads(model, given):
    _, cache = model.run_with_cache(given.ids[given.clean])
    grid = torch.zeros(model.cfg.n_layers, model.cfg.n_heads)
    for layer in range(model.cfg.n_layers):
        for head in range(model.cfg.n_heads):
            name, at = f"blocks.{layer}.attn.hook_z", (slice(None), -1, head)
            grid[layer, head] = _difference(model, given, given.corrupted, name, at, cache[name][at])
    return grid


def ablate_heads(model, given):
    kept = []
    for prompt in given.others:
        _, cache = model.run_with_cache(given.ids[prompt])
        kept.append(torch.stack([cache[f"blocks.{layer}.attn.hook_z"][0, -1] for layer in range(model.cfg.n_layers)]))
    mean = torch.stack(kept).mean(0)
    grid = torch.zeros(model.cfg.n_layers, model.cfg.n_heads)
    for layer in range(model.cfg.n_layers):
        for head in range(model.cfg.n_heads):
            name, at = f"blocks.{layer}.attn.hook_z", (slice(None), -1, head)
            grid[layer, head] = _difference(model, given, given.clean, name, at, mean[layer, head])
    return grid


def pattern(model, given):
    _, cache = model.run_with_cache(given.ids[given.clean])
    return cache["blocks.20.attn.hook_pattern"][0, 0, -1]


def direct_effects(model, given):
    _, clean = model.run_with_cache(given.ids[given.clean])
    _, corrupted = model.run_with_cache(given.ids[given.corrupted])
    final = corrupted[f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"][0, -1]
    grid = torch.zeros(model.cfg.n_layers, model.cfg.n_heads)
    for layer in range(model.cfg.n_layers):
        name = f"blocks.{layer}.attn.hook_z"
        changes = torch.einsum("hd,hdm->hm", (clean[name] - corrupted[name])[0, -1], model.blocks[layer].attn.W_O)
        for head in range(model.cfg.n_heads):
            logits = model.unembed(model.ln_final((final + changes[head])[None, None]))[0, 0]
            grid[layer, head] = logits[given.right] - logits[given.wrong]
    return grid


def steer(model, given):
    name = "blocks.10.hook_resid_post"
    _, clean = model.run_with_cache(given.ids[given.clean])
    _, corrupted = model.run_with_cache(given.ids[given.corrupted])
    vector = clean[name][0, -1] - corrupted[name][0, -1]
    with model.hooks(fwd_hooks=[(name, lambda value, hook: value + 2.0 * vector)]):
        tokens = model.generate(given.ids[given.corrupted], max_new_tokens=5, do_sample=False, verbose=False)
    return given.tokenizer.decode(tokens[0, -5:])


def two_lengths(model, given):
    states = []
    for text in (given.clean, given.short):  # one by one: positions of a padded batch are columns, not tokens
        _, cache = model.run_with_cache(given.ids[text])
        states.append(cache["blocks.10.hook_resid_post"][0, -1])
    return torch.stack(states)
