"""A condition is asked of each row at its prompt, and the answer is kept while the row goes on."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import nnsplice as ns
from nnsplice.errors import NnspliceError
from steering.vectors import PROMPTS, precise, vector

OPTIONS: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture(scope="module")
def model() -> Any:
    return precise("llama")


@pytest.fixture(scope="module")
def probe(model) -> Any:
    """A direction that the second prompt is most alike, and the bound that tells it from the others."""
    acts = ns.capture(model, PROMPTS, "layers[0].output[-1]")["layers[0].output[-1]"]
    direction = acts[1] - acts.mean(0)
    cosines = torch.nn.functional.cosine_similarity(acts, direction[None], dim=-1)
    bound = float(cosines.sort().values[-2:].mean())
    assert cosines.argmax() == 1
    return direction, bound


@pytest.mark.parametrize("where", ["all", "prompt", "generated"])
def test_each_row_is_asked_for_itself(model, probe, where: str) -> None:
    """Also rows after the first, batched and alone, with a cache and without: rows are what they are alone."""
    direction, bound = probe
    plain = ns.steering.generate(model, PROMPTS, **OPTIONS)
    steered = ns.steering.generate(model, PROMPTS, vector(1), 9.0, where=where, **OPTIONS)
    assert all(a != b for a, b in zip(plain, steered, strict=True))
    for when, chosen in (
        (ns.steering.similar(direction, "layers[0].output[-1]", above=bound), [False, True, False]),
        (ns.steering.similar(direction, "layers[0].output", below=bound), [True, False, True]),
    ):
        expected = [b if own else a for a, b, own in zip(plain, steered, chosen, strict=True)]
        for more in ({}, {"use_cache": False}):
            options: dict[str, Any] = {"where": where, "when": when, **OPTIONS, **more}
            assert ns.steering.generate(model, PROMPTS, vector(1), 9.0, **options) == expected
            alone = [ns.steering.generate(model, p, vector(1), 9.0, **options)[0] for p in PROMPTS]
            assert alone == expected


def test_generations_follow_each_other_with_nothing_to_reset(model, probe) -> None:
    direction, bound = probe
    when = ns.steering.similar(direction, "layers[0].output[-1]", above=bound)
    with ns.steering.steer(model, vector(1), 9.0, when=when):
        first = [ns.steering.generate(model, prompt, **OPTIONS)[0] for prompt in PROMPTS]
        again = [ns.steering.generate(model, prompt, **OPTIONS)[0] for prompt in reversed(PROMPTS)]
    assert first == again[::-1]
    assert first[0] == ns.steering.generate(model, PROMPTS[0], **OPTIONS)[0]
    assert first[1] != ns.steering.generate(model, PROMPTS[1], **OPTIONS)[0]


def test_beams_keep_the_answer_of_their_prompt(model, probe) -> None:
    direction, bound = probe
    when = ns.steering.similar(direction, "layers[0].output[-1]", above=bound)
    beams: dict[str, Any] = {"num_beams": 3, **OPTIONS}
    together = ns.steering.generate(model, PROMPTS, vector(1), 9.0, when=when, where="generated", **beams)
    alone = [ns.steering.generate(model, p, vector(1), 9.0, when=when, where="generated", **beams)[0] for p in PROMPTS]
    assert together == alone


def test_it_reads_the_run_as_it_goes_on(model, probe) -> None:
    """A condition sees what was steered before its site, and not what its own rule does there."""
    direction, _ = probe
    unit = direction / direction.norm()
    away = ns.SavedActivation.from_pairs(("layers[0].output[-1]", unit[None]))
    when = ns.steering.similar(direction, "layers[0].output[-1]", above=0.99)
    ids = torch.tensor([[9, 10, 11]])
    with torch.no_grad():
        plain = model._module(ids).logits
        with ns.steering.steer(model, away, 1000.0, when=when):
            assert torch.equal(model._module(ids).logits, plain)  # asked before the rule changed the state
        later = ns.steering.similar(direction, "layers[1].input[-1]", above=0.99)
        both = ns.steering.steer(model, away, 1000.0) + ns.steering.steer(model, vector(1), when=later)
        with both:
            found = model._module(ids).logits
        with ns.steering.steer(model, away, 1000.0) + ns.steering.steer(model, vector(1)):
            assert torch.equal(found, model._module(ids).logits)


def test_a_capture_that_holds_the_place_is_a_direction(model) -> None:
    acts = ns.capture(model, PROMPTS, "layers[:].output[-1]")
    fitted = ns.steering.fit(acts.slice[0], acts.slice[1])
    when = ns.steering.similar(fitted, "layers[1].output", above=-1.0)
    assert torch.equal(when.direction, fitted["layers[1].output[-1]"])
    assert "above=-1" in str(when)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: ns.steering.similar(torch.ones(16), "layers[0].output[-1]"), "always holds"),
        (lambda: ns.steering.similar(torch.ones(16), "layers[0].output[-1]", above=1.5), "a cosine"),
        (lambda: ns.steering.similar(torch.zeros(16), "layers[0].output[-1]", above=0.5), "similar to nothing"),
        (lambda: ns.steering.similar(torch.ones(2, 16), "layers[0].output[-1]", above=0.5), "2 directions"),
        (lambda: ns.steering.similar(torch.ones(16), "layers[0].output[:]", above=0.5), "at one token"),
        (lambda: ns.steering.similar(vector(1), "layers[0].output[-1]", above=0.5), "nothing of this site"),
        (lambda: ns.steering.similar([1.0], "layers[0].output", above=0.5), "type list"),  # pyright: ignore
    ],
)
def test_a_condition_that_cannot_be_meant_is_answered(make: Any, text: str) -> None:
    with pytest.raises(NnspliceError, match=text):
        make()


def test_a_condition_that_comes_too_late_is_refused(model) -> None:
    late = ns.steering.similar(torch.ones(16), "layers[2].output[-1]", above=0.0)
    with pytest.raises(ValueError, match=r"after layers\[1\].output has already run"):
        ns.steering.steer(model, vector(1), when=late)
    assert ns.steering.steer(model, vector(1), when=late, where="generated").rules[0].when is not None
    several = ns.steering.similar(torch.ones(16), "layers[:].output[-1]", above=0.0)
    with pytest.raises(ValueError, match="one site"):
        ns.steering.steer(model, vector(2), when=several)
    wide = ns.steering.similar(torch.ones(8), "layers[0].output[-1]", above=0.0)
    with pytest.raises(ValueError, match="8 wide, the site 16"):
        with ns.steering.steer(model, vector(1), when=wide):
            model._module(torch.tensor([[3, 4]]))
    beyond = ns.steering.similar(torch.ones(16), "layers[0].output[7]", above=0.0)
    with pytest.raises(ValueError, match="not met before it was needed"):
        with ns.steering.steer(model, vector(1), when=beyond):
            model._module(torch.tensor([[3, 4]]))


def test_a_condition_of_two_bounds_holds_between_them() -> None:
    states = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0], [-1.0, 0.0]])  # cosines 1, 0.71, 0, -1
    between = ns.steering.similar(torch.tensor([1.0, 0.0]), "layers[0].output[-1]", above=-0.5, below=0.9)
    assert between.holds(states).tolist() == [False, True, True, False]
