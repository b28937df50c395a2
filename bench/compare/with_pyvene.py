"""The ten tasks with pyvene 0.1.8."""

from __future__ import annotations

from typing import Any

import pyvene
import torch


def setup(given: Any) -> Any:
    given.ids = {text: given.tokenizer(text, return_tensors="pt") for text in given.texts}
    return given.module


def _at(layer, component, unit="pos", kind=pyvene.VanillaIntervention, **more):
    return {"layer": layer, "component": component, "unit": unit, "intervention_type": kind, **more}


def next_token(model, given):
    with torch.no_grad():
        return given.tokenizer.decode(model(**given.ids[given.clean]).logits[0, -1].argmax())


def capture(model, given):
    layers = model.config.num_hidden_layers
    kept = [_at(layer, "block_output", kind=pyvene.CollectIntervention) for layer in range(layers)]
    last = given.ids[given.clean].input_ids.shape[1] - 1
    (_, states), _ = pyvene.IntervenableModel(kept, model=model)(
        given.ids[given.clean], unit_locations={"base": [[[last]]] * layers}
    )
    return torch.stack([state.reshape(-1) for state in states])


def _difference(model, given, config, locations):
    _, out = pyvene.IntervenableModel([config], model=model)(
        given.ids[given.corrupted], [given.ids[given.clean]], {"sources->base": locations}
    )
    return out.logits[0, -1, given.right] - out.logits[0, -1, given.wrong]


def patch(model, given):
    return _difference(model, given, _at(10, "block_output"), (2, 2))


def sweep_stream(model, given):
    layers, tokens = model.config.num_hidden_layers, given.ids[given.clean].input_ids.shape[1]
    grid = torch.zeros(layers, tokens)
    for layer in range(layers):
        for token in range(tokens):
            grid[layer, token] = _difference(model, given, _at(layer, "block_output"), (token, token))
    return grid


def sweep_heads(model, given):
    last = given.ids[given.clean].input_ids.shape[1] - 1
    grid = torch.zeros(model.config.num_hidden_layers, model.config.num_attention_heads)
    for layer in range(grid.shape[0]):
        for head in range(grid.shape[1]):
            config = _at(layer, "head_attention_value_output", "h.pos")
            where = [[[[head]], [[last]]]]
            grid[layer, head] = _difference(model, given, config, (where, where))
    return grid


def steer(model, given):
    last = {text: given.ids[text].input_ids.shape[1] - 1 for text in (given.clean, given.corrupted)}
    found = {}
    for text, at in last.items():
        kept = pyvene.IntervenableModel([_at(10, "block_output", kind=pyvene.CollectIntervention)], model=model)
        (_, states), _ = kept(given.ids[text], unit_locations={"base": at})
        found[text] = states[0].reshape(-1)
    vector = 2.0 * (found[given.clean] - found[given.corrupted])
    steering = pyvene.IntervenableModel(
        [_at(10, "block_output", kind=pyvene.AdditionIntervention, source_representation=vector)], model=model
    )
    _, tokens = steering.generate(
        given.ids[given.corrupted], unit_locations=None, intervene_on_prompt=True, max_new_tokens=5, do_sample=False
    )
    return given.tokenizer.decode(tokens[0, -5:])


def two_lengths(model, given):
    states = []
    for text in (given.clean, given.short):
        kept = pyvene.IntervenableModel([_at(10, "block_output", kind=pyvene.CollectIntervention)], model=model)
        last = given.ids[text].input_ids.shape[1] - 1
        (_, found), _ = kept(given.ids[text], unit_locations={"base": last})
        states.append(found[0].reshape(-1))
    return torch.stack(states)


#: What it has no call for.
MISSING = {
    "ablate_heads": "a constant for each head is an intervention class to be written",
    "pattern": "attention probabilities are no component",
    "direct_effects": "no path patching",
}
