"""What a path without a position means, in every question: the row "none" of the README's table of positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import nnsplice as ns
from nnsplice.errors import MissingPosition

CLEAN, CORRUPTED = "w3 w4 w5", "w3 w6 w5"
METRIC = ns.logit_diff("w7", "w8")
HEADS = "layers[:2].heads[:]"
Ask = Callable[..., ns.SweepResult]


def _sweep(model: Any, sites: Any, **options: Any) -> ns.SweepResult:
    return ns.sweep(model, CLEAN, CORRUPTED, sites, METRIC, progress=False, **options)


def _ablate(model: Any, sites: Any, **options: Any) -> ns.SweepResult:
    return ns.ablate(model, CLEAN, sites, METRIC, progress=False, **options)


def _trace(model: Any, sites: Any) -> ns.SweepResult:
    return ns.causal_trace(model, CLEAN, "w4", sites=sites, samples=2, progress=False)


def _path_patch(model: Any, sites: Any, **options: Any) -> ns.SweepResult:
    return ns.path_patch(model, CLEAN, CORRUPTED, sites, "unembed", METRIC, progress=False, **options)


def _attribute(method: str) -> Ask:
    return lambda model, sites: ns.attribute(model, CLEAN, CORRUPTED, sites, METRIC, method=method, progress=False)


EACH = {"sweep": _sweep, "causal_trace": _trace, "atp": _attribute("atp"), "ig": _attribute("ig")}
WHOLE = {"ablate": _ablate, "path_patch": _path_patch, "eap": _attribute("eap"), "exact": _attribute("exact")}


@pytest.mark.parametrize("ask", EACH.values(), ids=EACH)
def test_questions_that_locate_have_a_cell_for_each_token(model, ask: Ask) -> None:
    result = ask(model, HEADS)
    assert result.grid().dims == ("prompt", "layer", "head", "position") and result.grid().sizes["position"] == 3
    assert result == ask(model, f"{HEADS}.output[:]") and "at once" not in repr(result)


@pytest.mark.parametrize("ask", WHOLE.values(), ids=WHOLE)
def test_questions_about_a_whole_part_have_one_cell_and_say_so(model, ask: Ask) -> None:
    result = ask(model, HEADS)
    assert result.grid().dims == ("prompt", "layer", "head")
    assert "layers[:].heads[:].output, all tokens at once" in repr(result)
    each = ask(model, f"{HEADS}.output[:]")
    assert each.grid().dims == ("prompt", "layer", "head", "position") and "at once" not in repr(each)


@pytest.mark.parametrize("ask", [_sweep, _ablate, _path_patch])
def test_together_says_it_otherwise(model, ask: Ask) -> None:
    each, whole = ask(model, HEADS, together=False), ask(model, HEADS, together=True)
    assert each == ask(model, f"{HEADS}.output[:]") and whole.grid().dims == ("prompt", "layer", "head")
    default = ask(model, HEADS)
    assert default == (each if ask is _sweep else whole)
    # The value of a whole cell is that of a set of all its tokens.
    if ask is not _path_patch:
        sets = [[f"layers[{layer}].heads[{head}]"] for layer in range(2) for head in range(4)]
        np.testing.assert_allclose(ask(model, sets).table.values, whole.table.values, atol=1e-5)


@pytest.mark.parametrize("read", [ns.capture, lambda model, _, path: ns.expand(model, path)])
def test_reading_has_to_say_which_tokens(model, read: Any) -> None:
    if read is ns.capture:
        with pytest.raises(MissingPosition, match=r"\[-1\] for the last token, layers\[0\]\.output\[:\] for all"):
            read(model, CLEAN, "layers[:].output")
        with pytest.raises(MissingPosition), model.trace(CLEAN):
            ns.save_activations(model, "layers[:].output")
    else:  # sites alone need no position
        assert len(read(model, CLEAN, "layers[:].output")) == 3
