"""Lenses on a pretrained model: the last layer is the model, and the logit difference is the sum of its parts."""

from __future__ import annotations

import numpy as np
import pytest

import nnsplice as ns
from real.pretrained import pretrained

pytestmark = pytest.mark.real
FACT = "The Eiffel Tower is in the city of"


def test_an_answer_appears_in_the_last_layers() -> None:
    model = pretrained("smollm2")
    lens = ns.lens.logit(model, FACT, "layers[20,27,28,29].output[-1]", answers=" Paris")
    probability = lens.grid().squeeze().values
    embed = ns.capture(model, FACT, "embed[-1]")
    logits = ns.patched_logits(model, FACT, embed, positions=-1)  # the run itself
    expected = float(ns.probability(" Paris").bind(model.tokenizer, 1, [FACT])(logits, [0]))
    assert probability[-1] == pytest.approx(expected, rel=1e-4) and expected > 0.4
    assert probability[0] < 0.001 and lens.only("rank").grid().squeeze().values[-1] == 0


def test_name_movers_make_most_of_the_difference() -> None:
    model = pretrained("smollm2")
    pairs = ns.tasks.ioi(model, 6).filter(model)
    parts = ns.lens.direct(model, pairs.clean, pairs.metric)
    np.testing.assert_allclose(parts.table.values.sum(1) + parts.rest, parts.clean, atol=1e-3)
    heads = parts.grid("layers[:].heads[:].output").mean("prompt")
    found = heads.stack(place=("layer", "head")).to_series().sort_values()
    assert set(found.index[-4:]) == {(23, 3), (29, 1), (23, 0), (23, 2)} and found.index[0] == (24, 4)
    assert found.iloc[-4:].sum() > 0.6 * parts.clean.mean()
