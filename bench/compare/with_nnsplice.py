"""The ten tasks with nnsplice."""

from __future__ import annotations

from typing import Any

import nnsplice as ns


def setup(given: Any) -> Any:
    return ns.load(given.module, tokenizer=given.tokenizer)


def next_token(model, given):
    logits = ns.patched_logits(model, given.clean, ns.capture(model, given.clean, "layers[0].output[-1]"), positions=-1)
    return model.tokenizer.decode(logits[0].argmax())


def capture(model, given):
    return ns.capture(model, given.clean, "layers[:].output[-1]").stack()


def patch(model, given):
    clean = ns.capture(model, given.clean, "layers[10].output[2]")
    logits = ns.patched_logits(model, given.corrupted, clean)[0, -1]
    return logits[given.right] - logits[given.wrong]


def sweep_stream(model, given):
    metric = ns.logit_diff(given.right, given.wrong)
    return ns.sweep(model, given.clean, given.corrupted, "layers[:].output", metric, progress=False).grid()


def sweep_heads(model, given):
    metric = ns.logit_diff(given.right, given.wrong)
    return ns.sweep(model, given.clean, given.corrupted, "layers[:].heads[:].output[-1]", metric, progress=False).grid()


def ablate_heads(model, given):
    sites = "layers[:].heads[:].output[-1]"
    mean = ns.capture(model, given.others, sites)
    metric = ns.logit_diff(given.right, given.wrong)
    return ns.ablate(model, given.clean, sites, metric, operation="mean", reference=mean, progress=False).grid()


def pattern(model, given):
    return ns.capture(model, given.clean, "layers[20].heads[0].pattern[-1]").stack()


def direct_effects(model, given):
    metric = ns.logit_diff(given.right, given.wrong)
    sites = "layers[:].heads[:].output[-1]"
    return ns.path_patch(model, given.clean, given.corrupted, sites, "unembed", metric, progress=False).grid()


def steer(model, given):
    site = "layers[10].output[-1]"
    vector = ns.capture(model, given.clean, site) - ns.capture(model, given.corrupted, site)
    return ns.steering.generate(model, given.corrupted, ns.steering.SteeringVector.of(vector), 2.0, max_new_tokens=5)


def two_lengths(model, given):
    return ns.capture(model, [given.clean, given.short], "layers[10].output[-1]").stack()
