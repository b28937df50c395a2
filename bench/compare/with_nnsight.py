"""The ten tasks with nnsight alone."""

from __future__ import annotations

from typing import Any

import torch
from nnsight import LanguageModel, save


def setup(given: Any) -> Any:
    return LanguageModel(given.module, tokenizer=given.tokenizer)


def next_token(model, given):
    with model.trace(given.clean):
        logits = model.lm_head.output[0, -1].save()
    return model.tokenizer.decode(logits.argmax())


def capture(model, given):
    with model.trace(given.clean):
        states = save([layer.output[..., -1, :].reshape(-1) for layer in model.model.layers])
    return torch.stack(states)


def patch(model, given):
    with model.trace(given.clean):
        clean = model.model.layers[10].output[..., 2, :].clone().save()
    with model.trace(given.corrupted):
        model.model.layers[10].output[..., 2, :] = clean
        logits = model.lm_head.output[0, -1].save()
    return logits[given.right] - logits[given.wrong]


def sweep_stream(model, given):
    with model.trace(given.clean):
        clean = save([layer.output.clone() for layer in model.model.layers])
    layers, tokens = len(clean), clean[0].shape[-2]
    grid = torch.zeros(layers, tokens)
    for layer in range(layers):
        for token in range(tokens):
            with model.trace(given.corrupted):
                model.model.layers[layer].output[..., token, :] = clean[layer][..., token, :]
                logits = model.lm_head.output[0, -1].save()
            grid[layer, token] = logits[given.right] - logits[given.wrong]
    return grid


def sweep_heads(model, given):
    heads, width = model.config.num_attention_heads, model.config.head_dim
    with model.trace(given.clean):
        clean = save([layer.self_attn.o_proj.input.clone() for layer in model.model.layers])
    grid = torch.zeros(len(clean), heads)
    for layer in range(len(clean)):
        for head in range(heads):
            columns = slice(head * width, (head + 1) * width)
            with model.trace(given.corrupted):
                model.model.layers[layer].self_attn.o_proj.input[:, -1, columns] = clean[layer][:, -1, columns]
                logits = model.lm_head.output[0, -1].save()
            grid[layer, head] = logits[given.right] - logits[given.wrong]
    return grid


def ablate_heads(model, given):
    heads, width = model.config.num_attention_heads, model.config.head_dim
    kept = []
    for prompt in given.others:  # one by one, as padding would move the last token
        with model.trace(prompt):
            states = save([layer.self_attn.o_proj.input[0, -1].clone() for layer in model.model.layers])
        kept.append(torch.stack(states))
    mean = torch.stack(kept).mean(0)
    grid = torch.zeros(len(mean), heads)
    for layer in range(len(mean)):
        for head in range(heads):
            columns = slice(head * width, (head + 1) * width)
            with model.trace(given.clean):
                model.model.layers[layer].self_attn.o_proj.input[0, -1, columns] = mean[layer, columns]
                logits = model.lm_head.output[0, -1].save()
            grid[layer, head] = logits[given.right] - logits[given.wrong]
    return grid


def pattern(model, given):
    with model.trace(given.clean):
        weights = model.model.layers[20].self_attn.output[1][0, 0, -1].save()
    return weights


def direct_effects(model, given):
    heads, width = model.config.num_attention_heads, model.config.head_dim
    with model.trace(given.clean):
        clean = save([layer.self_attn.o_proj.input[0, -1].clone() for layer in model.model.layers])
    with model.trace(given.corrupted):
        corrupted = save([layer.self_attn.o_proj.input[0, -1].clone() for layer in model.model.layers])
        final = model.model.norm.input[0, -1].clone().save()
    grid = torch.zeros(len(clean), heads)
    for layer in range(len(clean)):
        weight = model.model.layers[layer].self_attn.o_proj.weight
        for head in range(heads):
            columns = slice(head * width, (head + 1) * width)
            change = weight[:, columns] @ (clean[layer] - corrupted[layer])[columns]
            with torch.no_grad():
                logits = given.module.lm_head(given.module.model.norm(final + change))
            grid[layer, head] = logits[given.right] - logits[given.wrong]
    return grid


def steer(model, given):
    with model.trace(given.clean):
        clean = model.model.layers[10].output[..., -1, :].clone().save()
    with model.trace(given.corrupted):
        vector = (clean - model.model.layers[10].output[..., -1, :]).clone().save()
    with model.generate(given.corrupted, max_new_tokens=5, do_sample=False) as tracer:
        for _ in tracer.iter[:5]:  # all() would leave the line behind it unrun
            model.model.layers[10].output[:] += 2.0 * vector
        tokens = tracer.result.save()
    return model.tokenizer.decode(tokens[0, -5:])


def two_lengths(model, given):
    with model.trace([given.clean, given.short]):  # nnsight pads on the left, so the last column is the last token
        states = model.model.layers[10].output[:, -1].clone().save()
    return states
