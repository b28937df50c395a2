"""`updates` walks through sites in the model's order, and writes at once or says why not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import nnsplice as ns
from nnsplice.errors import BadArgument, DuplicatePath, LateUpdate, MissingPosition, PathError, ShapeError
from zoo import wrap

PROMPT = "w3 w4 w5 w6"


@pytest.fixture(scope="module")
def gpt2():
    return wrap("gpt2")


def test_updates_go_in_execution_order_and_write_at_once(gpt2) -> None:
    steer = ns.capture(gpt2, "w9 w8", ["layers[2].output[-1]", "layers[0].output[-1]", "layers[0].output[0]"])
    seen: list[str] = []
    with torch.no_grad(), gpt2.trace(PROMPT):
        for key, current, update in ns.updates(gpt2, reversed(steer.keys())):
            seen.append(key)
            update(current + 3.0 * steer.get(key))
        logits = gpt2.output.logits.save()
    with torch.no_grad(), gpt2.trace(PROMPT):
        steer.add_to(gpt2, 3.0)
        expected = gpt2.output.logits.save()
    assert seen == steer.keys()
    assert torch.allclose(logits, expected, atol=1e-5)


def test_an_update_is_kept_when_the_loop_is_left(gpt2) -> None:
    with torch.no_grad(), gpt2.trace(PROMPT):
        for _, current, update in ns.updates(gpt2, ["layers[0].output[-1]", "layers[1].output[-1]"]):
            update(current * 0)
            break
        logits = gpt2.output.logits.save()
    zero = ns.SavedActivation.from_pairs(("layers[0].output[-1]", torch.zeros(1, 16)))
    assert torch.equal(logits, ns.patched_logits(gpt2, PROMPT, zero))


def test_the_current_value_of_updates_is_a_copy(gpt2) -> None:
    with torch.no_grad(), gpt2.trace(PROMPT):
        for _, current, _ in ns.updates(gpt2, "layers[0].output[-1]"):
            current.zero_()
        logits = gpt2.output.logits.save()
    with torch.no_grad(), gpt2.trace(PROMPT):
        plain = gpt2.output.logits.save()
    assert torch.equal(logits, plain)


def test_a_late_update_is_never_a_silent_no_op(gpt2) -> None:
    with pytest.raises(LateUpdate, match=r"already gone past[\s\S]*layers\[0\]\.output\[-1\]"), gpt2.trace(PROMPT):
        for _, current, update in list(ns.updates(gpt2, ["layers[0].output[-1]", "layers[1].output[-1]"])):
            update(current * 0)


def test_an_update_of_another_shape_says_what_to_write(gpt2) -> None:
    wrong: list[Any] = [0.0, torch.zeros(16)]
    for new in wrong:
        with pytest.raises(ShapeError, match=r"an update of[\s\S]*zeros_like\(current\)"), gpt2.trace(PROMPT):
            for _, _, update in ns.updates(gpt2, "layers[0].output[-1]"):
                update(new)


def test_updates_take_single_places_each_once(gpt2) -> None:
    for paths, kind, message in (
        ("layers[:].output[-1]", PathError, "single sites"),
        ("layers[0].output[:]", PathError, "single sites"),
        (["layers[0].output[-1]", "layers[-3].output[-1]"], DuplicatePath, "same site twice"),
        ([], BadArgument, "nothing to update"),
        ("layers[0].output", MissingPosition, "which tokens"),
    ):
        with pytest.raises(kind, match=message), gpt2.trace(PROMPT):
            ns.updates(gpt2, paths)
