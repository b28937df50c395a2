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
#: What a user asks, and how the answer begins.
CHATS = [
    ("How was the film that you saw yesterday?", "The film was"),
    ("How is the food at that restaurant?", "The food is"),
    ("What is it like to live in this town?", "Life here is"),
    ("Did you like the book?", "The book was"),
]


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
    tokenizer = pretrained("smollm2").tokenizer
    asked = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        + beginning
        for question, beginning in CHATS
    ]
    grid = ns.steering.sweep(pretrained("smollm2"), asked, direction(), [-0.4, 0.4], moods()[2], progress=False)
    found = grid.grid().squeeze("layer")
    assert grid.baseline.min() > 0.0 and grid.baseline.max() < 7.0, "unsteered, it is friendly"
    assert float(found.sel(coefficient=0.4).min()) > 9.0
    assert float(found.sel(coefficient=-0.4).max()) < -2.5
