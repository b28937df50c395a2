"""Old names of arguments go on working, with a warning that gives the new name."""

# What is tested is what a type checker refuses.
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import nnsplice as ns
from nnsplice.errors import BadType

SITE, PROMPT = "layers[1].output[-1]", "w3 w4 w5"
METRIC = ns.logit_diff("w7", "w8")


def test_captures_by_paths(model, tmp_path: Path) -> None:
    new = ns.capture(model, PROMPT, SITE)
    with pytest.warns(DeprecationWarning, match=r"capture\(paths=...\) is now capture\(sites=...\)"):
        assert ns.capture(model, PROMPT, paths=SITE) == new
    with pytest.warns(DeprecationWarning, match="save_activations"), model.trace(PROMPT):
        saved = ns.save_activations(model, paths=SITE)
    assert saved == new
    with pytest.warns(DeprecationWarning, match="expand"):
        assert ns.expand(model, paths=SITE) == ns.expand(model, SITE)
    with pytest.warns(DeprecationWarning, match="subset"):
        assert new.subset(paths=SITE) == new
    new.to_file(tmp_path / "run.safetensors")
    with pytest.warns(DeprecationWarning, match="from_file"):
        assert ns.SavedActivation.from_file(tmp_path / "run.safetensors", paths=SITE) == new


def test_the_warning_points_at_the_line_that_has_to_change(model) -> None:
    with pytest.warns(DeprecationWarning, match="capture") as told:
        ns.capture(model, PROMPT, paths=SITE)
    assert [one.filename for one in told] == [__file__]


def test_updates_and_fits_by_paths(model) -> None:
    with pytest.warns(DeprecationWarning, match="updates"), model.trace(PROMPT):
        for _, current, update in ns.updates(model, paths=SITE):
            update(current * 0)
        saved = ns.save_activations(model, SITE)
    assert not saved[SITE].any()
    with pytest.warns(DeprecationWarning, match="fit_from_prompts"):
        vector = ns.steering.fit_from_prompts(model, ["w3 w4"], ["w3 w7"], paths=SITE)
    assert vector.keys() == [SITE]


def test_the_module_inside_a_model_by_its_old_name(model) -> None:
    with pytest.warns(DeprecationWarning, match=r"ns.models.peel is now ns.models.unwrap"):
        assert ns.models.peel(model) is ns.models.unwrap(model)
    assert "peel" not in dir(ns.models)


def test_ablations_with(model) -> None:
    heads = "layers[1].heads[:]"
    new = ns.ablate(model, PROMPT, heads, METRIC, operation=torch.neg, progress=False)
    with pytest.warns(DeprecationWarning, match=r"ablate\(with_=...\) is now ablate\(operation=...\)"):
        assert ns.ablate(model, PROMPT, heads, METRIC, with_=torch.neg, progress=False) == new
    assert new != ns.ablate(model, PROMPT, heads, METRIC, progress=False)
    module: Any = ns.models.unwrap(model)
    weight = module.transformer.h[1].attn.c_proj.weight
    with ns.weights.ablate(model, "l1h0", operation="mean"):
        mean = weight.clone()
    with pytest.warns(DeprecationWarning, match="ablate"), ns.weights.ablate(model, "l1h0", with_="mean"):
        assert torch.equal(weight, mean)
    assert not torch.equal(weight, mean)


def test_both_names_at_once_are_refused(model) -> None:
    with pytest.raises(BadType, match="sites and paths="):
        ns.capture(model, PROMPT, SITE, paths=SITE)
    with pytest.raises(BadType, match="operation and with_="):
        ns.ablate(model, PROMPT, SITE, METRIC, operation="zero", with_="mean")


def test_weights_are_swept_in_the_order_of_the_other_questions_and_in_the_old_one(model) -> None:
    tuned: Any = copy.deepcopy(ns.models.unwrap(model))
    with torch.no_grad():
        tuned.transformer.h[1].attn.c_proj.weight.mul_(2.0)
    new = ns.sweep_weights(model, tuned, PROMPT, "layers[:].attn", METRIC, progress=False)
    with pytest.warns(DeprecationWarning, match=r"sweep_weights\(base, tuned, prompts, sites, metric\)"):
        old = ns.sweep_weights(model, tuned, "layers[:].attn", METRIC, PROMPT, progress=False)
    with pytest.warns(DeprecationWarning, match="sweep_weights"):
        named = ns.sweep_weights(model, tuned, "layers[:].attn", METRIC, prompts=PROMPT, progress=False)
    np.testing.assert_array_equal(new.effect().values[0], [0, 1, 0])
    assert old == new == named
