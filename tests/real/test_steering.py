"""A direction of mood turns what a chat model says."""

from __future__ import annotations

from functools import cache

import pytest

import nnsplice as ns
from real.pretrained import pretrained

pytestmark = pytest.mark.real
LAYER = 25
PROMPTS = [
    "I watched the film yesterday and I thought that it was", "The food at the new restaurant was",
    "My day at work was", "The weather in the town was",
]  # fmt: skip


@cache
def moods() -> tuple[list[str], list[str], ns.Metric]:
    """Reviews in a good mood, the same in a bad one, and the metric of the mood of the next word."""
    task = ns.tasks.sentiment(pretrained("smollm2"), 40)
    good = [one.clean if one.variables["mood"] == "good" else one.corrupted for one in task]
    bad = [one.corrupted if one.variables["mood"] == "good" else one.clean for one in task]
    words = next((one.answer, one.wrong) for one in task if one.variables["mood"] == "good")
    each = len(PROMPTS)
    return good, bad, ns.logit_diff([words[0]] * each, [words[1]] * each)


@cache
def direction() -> ns.steering.SteeringVector:
    good, bad, _ = moods()
    return ns.steering.fit_from_prompts(
        pretrained("smollm2"), good, bad, f"layers[{LAYER}].output[-1]"
    ).in_residual_norms()


def test_the_direction_turns_the_mood_of_sentences_it_was_not_fitted_on() -> None:
    grid = ns.steering.sweep(pretrained("smollm2"), PROMPTS, direction(), [-0.4, 0.4], moods()[2], progress=False)
    found = grid.grid().squeeze("layer")
    assert float(found.sel(coefficient=0.4).min()) > 5.0
    assert float(found.sel(coefficient=-0.4).max()) < -2.0


def test_it_turns_the_answer_in_a_chat() -> None:
    model = pretrained("smollm2")
    chat = [{"role": "user", "content": "How was the film that you saw yesterday? Answer in one sentence."}]
    texts = {}
    for coefficient in (-0.4, 0.4):
        with ns.steering.steer(model, direction(), coefficient):
            texts[coefficient] = str(ns.steering.generate(model, [chat], max_new_tokens=25)).lower()
    good, bad = (
        ("great", "wonderful", "excited", "incredible", "love", "amazing"),
        ("horr", "stupid", "crap", "bad", "terr"),
    )
    assert any(word in texts[0.4] for word in good) and not any(word in texts[0.4] for word in bad), texts
    assert any(word in texts[-0.4] for word in bad), texts
