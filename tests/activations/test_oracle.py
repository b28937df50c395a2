"""Capture and replay of every family against torch hooks, bit for bit, in random order of random sites."""

from __future__ import annotations

import random

import pytest
import torch

import nnsplice as ns
from activations.oracle import run, values
from activations.places import places_of
from zoo import FAMILIES, build, inputs, wrap

LENGTH, ROWS = 5, 2


def _inputs(family: str, shift: int = 0) -> dict[str, torch.Tensor]:
    given = {name: (ids - 3 + shift) % 61 + 3 for name, ids in inputs(family, LENGTH, ROWS).items()}
    return {**given, "attention_mask": torch.ones(ROWS, LENGTH, dtype=torch.long)}


def _at(path: ns.Path) -> int:
    assert isinstance(path.position, int)
    return path.position


@pytest.mark.parametrize("family", FAMILIES)
def test_a_capture_holds_what_hooks_see_at_every_site(family: str) -> None:
    model, module = wrap(family), build(family)
    places = places_of(model)
    expected = values(module, _inputs(family), [path.site for path in places])
    rng = random.Random(family)
    asked = [path.at(rng.randrange(-LENGTH, LENGTH)) for path in places for _ in range(2)]
    rng.shuffle(asked)
    with torch.no_grad(), model.trace(**_inputs(family)):
        saved = ns.save_activations(model, [str(path) for path in asked])
    assert len(places) > 20
    for path in asked:
        assert torch.equal(saved[str(path)], expected[path.site][:, _at(path)]), path


@pytest.mark.parametrize("family", FAMILIES)
def test_a_replay_does_what_hooks_do(family: str) -> None:
    model, module = wrap(family), build(family)
    rng = random.Random(family)
    places = [path for path in places_of(model) if path.steps[0].name != "unembed"]
    # A value may be met under two names (the input of a layer, the stream before it); each is written once.
    chosen = {path.site.location: path for path in rng.sample(places, len(places))}
    paths = [path.at(rng.randrange(-LENGTH, LENGTH)) for path in rng.sample(sorted(chosen.values(), key=str), 8)]
    other = values(module, _inputs(family, shift=20), [path.site for path in paths])
    saved = ns.SavedActivation.from_pairs(*((str(p), other[p.site][:, _at(p)]) for p in paths))

    def replaced(path: ns.Path):
        def edit(value: torch.Tensor) -> torch.Tensor:
            value[:, _at(path)] = other[path.site][:, _at(path)]
            return value

        return edit

    expected = run(module, _inputs(family), {path.site: replaced(path) for path in paths})
    clean = run(module, _inputs(family), {})
    with torch.no_grad(), model.trace(**_inputs(family)):
        saved.apply(model)
        logits = model.output.logits.save()
    assert torch.equal(logits, expected)
    assert not torch.equal(logits, clean)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_added_capture_does_what_hooks_do(family: str) -> None:
    model, module = wrap(family), build(family)
    (path,) = ns.expand(model, "layers[1].output[2]")
    direction = torch.linspace(-1, 1, module.config.hidden_size)[None]
    saved = ns.SavedActivation.from_pairs((path, direction))

    def edit(value: torch.Tensor) -> torch.Tensor:
        value[:, 2] += torch.tensor([[1.5], [-2.0]]) * direction
        return value

    with torch.no_grad(), model.trace(**_inputs(family)):
        saved.add_to(model, [1.5, -2.0])
        logits = model.output.logits.save()
    assert torch.equal(logits, run(module, _inputs(family), {path.site: edit}))


@pytest.mark.parametrize("family", FAMILIES)
def test_replaying_a_run_into_itself_changes_nothing(family: str) -> None:
    model = wrap(family)
    with torch.no_grad():
        with model.trace(**_inputs(family)):
            saved = ns.save_activations(model, "layers[:].output[:]")
            clean = model.output.logits.save()
        with model.trace(**_inputs(family)):
            saved.apply(model)
            again = model.output.logits.save()
    assert torch.equal(clean, again)
