"""While generating, positions are absolute: a decode step holds one token, and [-1] is the newest."""

from __future__ import annotations

import pytest
import torch

import nnsplice as ns
from nnsplice.errors import ShortRow
from zoo import wrap

PROMPTS = ["w3 w4 w5", "w6 w7 w8 w9 w10"]
FAMILIES = ("gpt2", "llama", "opt", "mixtral", "bloom")
NEW = 4


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest):
    return wrap(request.param)


def _generated(model, prompt: str) -> torch.Tensor:
    with torch.no_grad():
        return model.generate(prompt, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)[0]


def test_every_step_holds_what_one_pass_over_the_whole_text_holds(model) -> None:
    ids = _generated(model, PROMPTS[0])
    steps = []
    with model.generate(PROMPTS[0], max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False) as tracer:
        for _ in tracer.iter[:NEW]:
            saved = ns.save_activations(model, ["layers[1].output[-1]", "layers[2].heads[1].output[-1]"])
            steps.append(saved)
    assert len(steps) == NEW
    whole = ns.capture(model, ids.tolist(), ["layers[1].output[:]", "layers[2].heads[1].output[:]"])
    for number, saved in enumerate(steps):
        at = len(ids) - NEW - 1 + number
        for place in ("layers[1].output", "layers[2].heads[1].output"):
            assert torch.allclose(saved[f"{place}[-1]"], whole[f"{place}[{at}]"], atol=1e-5)


def test_absolute_positions_are_found_in_the_step_that_computes_them(model) -> None:
    ids = _generated(model, PROMPTS[0])
    found = []
    with model.generate(PROMPTS[0], max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False) as tracer:
        for step in tracer.iter[:NEW]:
            if step == 2:
                found.append(ns.save_activations(model, "layers[1].output[4]"))
    assert found[0].allclose(ns.capture(model, ids.tolist(), "layers[1].output[4]"), atol=1e-5)


def test_a_position_of_another_step_is_refused(model) -> None:
    with pytest.raises(ShortRow, match=r"\[0\] was computed in an earlier step[\s\S]*token 3 or later"):
        with model.generate(PROMPTS[0], max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False) as tracer:
            for step in tracer.iter[:NEW]:
                if step == 1:
                    ns.save_activations(model, "layers[0].output[0]")


def test_padded_rows_generate_and_capture_as_alone(model) -> None:
    steps = []
    with model.generate(PROMPTS, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False) as tracer:
        for step in tracer.iter[:NEW]:
            steps.append(ns.save_activations(model, ["layers[2].output[-1]"]))
            if step == 0:
                first = ns.save_activations(model, "final_norm.output[1]")
    assert first.allclose(ns.capture(model, PROMPTS, "final_norm.output[1]"), atol=1e-5)
    for row, prompt in enumerate(PROMPTS):
        ids = _generated(model, prompt)
        whole = ns.capture(model, ids.tolist(), "layers[2].output[:]")["layers[2].output[:]"][0]
        for number, saved in enumerate(steps):
            at = len(ids) - NEW - 1 + number
            assert torch.allclose(saved["layers[2].output[-1]"][row], whole[at], atol=1e-5)


def test_a_patch_in_one_step_changes_what_follows_and_nothing_before(model) -> None:
    clean = _generated(model, PROMPTS[0])
    push = ns.SavedActivation.from_pairs(("layers[2].output[-1]", 50 * torch.eye(16)[:1]))
    with model.generate(PROMPTS[0], max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False) as tracer:
        for step in tracer.iter[:NEW]:
            if step == 2:
                push.apply(model)
        out = tracer.result.save()
    # The same by hand: the patched step's logits choose the token, then plain decoding goes on.
    ids = clean[: len(clean) - NEW + 2].tolist()
    logits = ns.patched_logits(model, ids, push)
    ids.append(int(logits[0, -1].argmax()))
    assert out[0, : len(ids)].tolist() == ids


def test_every_step_can_be_steered(model) -> None:
    push = ns.SavedActivation.from_pairs(("layers[2].output[-1]", torch.linspace(-9, 9, 16)[None]))
    with model.generate(PROMPTS[0], max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False) as tracer:
        for _ in tracer.iter[:NEW]:
            push.add_to(model, 3.0)
        out = tracer.result.save()
    ids = clean = _generated(model, PROMPTS[0])[: len(_generated(model, PROMPTS[0])) - NEW].tolist()
    for _ in range(NEW):
        # The last block's output of a token is read by no later token, so steering the newest alone is the whole of it.
        ids = [*ids, int(ns.patched_logits(model, ids, push * 3.0, add=True)[0, -1].argmax())]
    assert out[0].tolist() == ids
    assert len(ids) == len(clean) + NEW
