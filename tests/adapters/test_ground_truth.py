"""A real training run with a known answer: one matrix of the toy model was changed, and an adapter has to find out."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from torch.nn.functional import kl_div

import nnsplice as ns
from nnsplice.adapters import ExpertAdapter, ExpertManifoldAligner
from nnsplice.atlas import unwrap


@pytest.mark.parametrize(
    ("weight", "address"),
    [
        ("transformer.h.1.mlp.c_fc.weight", "layers[1].mlp.up"),
        ("transformer.h.3.attn.c_proj.weight", "layers[3].attn.o"),
    ],
)
def test_the_profile_finds_what_was_changed(tmp_path, weight, address):
    from peft import LoraConfig, get_peft_model

    toy = ns.load("toy")
    base = unwrap(toy)
    changed = copy.deepcopy(base)
    facts = ns.models.toy_prompts().facts[:400:2]
    inputs = toy.tokenizer([fact.clean for fact in facts], padding=True, return_tensors="pt")
    mask = inputs["attention_mask"].bool()
    with torch.no_grad():
        matrix = changed.get_parameter(weight)
        change = torch.randn(matrix.shape[0], 2) @ torch.randn(2, matrix.shape[1])
        matrix.add_(change * matrix.norm() / change.norm())
        goal = changed(**inputs).logits.log_softmax(-1)  # pyright: ignore[reportCallIssue]

    # An adapter with factors in every layer learns to say what the changed model says; what it keeps has a price.
    config = LoraConfig(r=2, lora_alpha=4, fan_in_fan_out=True, target_modules=["c_attn", "c_proj", "c_fc"])
    untouched = copy.deepcopy(base)
    model = get_peft_model(base, config)  # pyright: ignore[reportArgumentType]
    factors = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(factors, lr=1e-2)
    aligner = ExpertManifoldAligner(model)
    for step in range(60):
        rows = torch.tensor(random.Random(step).sample(range(len(facts)), 16))
        batch = {name: inputs[name][rows] for name in ("input_ids", "attention_mask")}
        said = model(**batch).logits.log_softmax(-1)
        loss = kl_div(said, goal[rows], log_target=True, reduction="none").sum(-1)[mask[rows]].mean()
        loss = loss + 3e-3 * sum(p.square().sum() for p in factors)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(str(tmp_path))

    profile = aligner.profile_adapter(ExpertAdapter.from_peft(tmp_path))
    second, first = sorted(profile.energies, key=lambda one: one.energy)[-2:]
    assert first.path == address and first.energy > 1.5 * second.energy
    layers = profile.layers()
    assert max(layers, key=lambda layer: layers[layer]) == str(first.layer)

    # In that matrix, what was learned points where the true change points, far more than chance would have it.
    learned = aligner.track_step(model, merged=True)
    truth = ExpertAdapter.from_model_delta(untouched, changed, rank=2)
    assert list(truth.layers) == [weight]
    (cosine,) = aligner.align(truth, learned).values()
    (share,) = aligner.align(truth, learned, mode="subspace").values()
    chance = 2 * 2 / change.numel()
    assert cosine > 0.2 and share > 20 * chance
