"""Training against a model that was made by hand: what it holds is found, what it does not hold is not."""

from __future__ import annotations

from typing import Any

import pytest

import nnsplice as ns
from alignment.planted import Planted, planted

#: No early stop: the angles go on falling where every answer is right already.
TO_THE_END: dict[str, Any] = {"patience": 1000, "batch_size": 256, "progress": False}


def _align(made: Planted, sites: Any, **options: Any) -> ns.Alignment:
    given = {"held_out": made.mirrored, **TO_THE_END, **options}
    return ns.align(made.model, made.base, made.source, made.answers, sites, **given)


def _column(found: ns.Alignment, name: str) -> list[Any]:
    return found.frame()[name].tolist()


def _iia(found: ns.Alignment) -> dict[str, float]:
    return dict(zip(_column(found, "path"), _column(found, "iia"), strict=True))


def test_a_planted_subspace_is_found_to_a_thousandth() -> None:
    made = planted()
    found = _align(made, ["layers[0].output[0]", "layers[1:].output[1]"], k=2, epochs=150, learning_rate=0.05)
    assert set(_iia(found).values()) == {1.0}
    truth = {"layers[0].output[0]": made.read, "layers[1].output[1]": made.written, "layers[2].output[1]": made.written}
    for path, basis in truth.items():
        assert found.subspace(path).angles(ns.Subspace(path, basis)).max() < 1e-3
    assert set(_column(found, "whole_place")) == {1.0}
    assert max(_column(found, "random_subspace")) < 0.3
    assert max(_column(found, "random_model")) < 0.6


def test_places_that_do_not_hold_it_stay_at_chance() -> None:
    # Of pairs whose answers differ the base run's own answer is never right: chance is what it gives, 0.
    found = _align(planted(), ["layers[0].output[1]", "layers[1].output[0]", "layers[0].mlp.output[0]"], k=4, epochs=20)
    assert set(_iia(found).values()) == {0.0}
    assert set(_column(found, "whole_place")) == {0.0}


@pytest.mark.parametrize(("k", "enough"), [(1, False), (2, False), (3, True), (5, True)])
def test_fewer_dimensions_than_the_variable_has_are_not_enough(k: int, enough: bool) -> None:
    made = planted(rank=3)
    held = made.mirrored[::5]
    found = _align(made, "layers[1].output[1]", k=k, epochs=60, learning_rate=0.05, held_out=held, batch_size=1024)
    accuracy = _iia(found)["layers[1].output[1]"]
    assert accuracy == 1.0 if enough else accuracy < 0.75
    if enough:  # all of the variable lies in what was found
        angles = found.subspace("layers[1].output[1]").angles(ns.Subspace("layers[1].output", made.written))
        assert angles.max() < 0.1


def test_boundless_drops_dimensions_that_do_nothing() -> None:
    made = planted(scale=2.0)
    found = _align(made, "layers[1].output[1]", k=12, method="boundless", epochs=120, learning_rate=0.05)
    subspace = found.subspace("layers[1].output[1]")
    assert _iia(found)["layers[1].output[1]"] == 1.0
    assert 2 <= subspace.k < 8
    assert subspace.angles(ns.Subspace(subspace.place, made.written)).max() < 0.3


def test_a_mask_finds_the_numbers_of_a_variable_that_has_numbers_of_its_own() -> None:
    made = planted(aligned=True, scale=1.0)
    found = _align(made, "layers[1].output[1]", k=4, method="mask", epochs=100)
    assert _iia(found)["layers[1].output[1]"] == 1.0
    rows = sorted(found.subspace("layers[1].output[1]").basis.argmax(0).tolist())
    assert rows == sorted(made.written.abs().sum(1).topk(4).indices.tolist())


def test_a_mask_of_as_many_numbers_fails_where_directions_are_turned() -> None:
    found = _align(planted(scale=1.0), "layers[1].output[1]", k=4, method="mask", epochs=60)
    assert _iia(found)["layers[1].output[1]"] < 0.9
