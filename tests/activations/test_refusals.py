"""Calls in the wrong place, in the wrong order or of the wrong things are told, most before the run."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import nnsplice as ns
from nnsplice.errors import (
    BadArgument,
    BadType,
    DuplicatePath,
    LateUpdate,
    NeverFired,
    NnspliceError,
    OutsideTrace,
    OverlappingWrite,
    ShapeError,
    UnknownPath,
)
from zoo import build, wrap

PROMPT = "w3 w4 w5 w6"
SPANNED = 'layers[0].output["s"][-1]'


@pytest.fixture(scope="module")
def gpt2():
    return wrap("gpt2")


@pytest.fixture(scope="module")
def llama():
    return wrap("llama")


def test_out_of_order_calls_are_told_before_a_pass_is_wasted(gpt2) -> None:
    with pytest.raises(LateUpdate, match=r"layers\[0\]\.output has already run"), gpt2.trace(PROMPT):
        gpt2.transformer.h[1].output.save()
        ns.save_activations(gpt2, "layers[0].output[-1]")
    saved = ns.capture(gpt2, PROMPT, "layers[0].output[-1]")
    with pytest.raises(LateUpdate, match="has already run"), gpt2.trace(PROMPT):
        gpt2.transformer.h[1].output.save()
        saved.apply(gpt2)


def test_overlapping_writes_are_refused(llama) -> None:
    both = ["layers[0].heads[3].output[-1]", "model.model.layers[0].self_attn.o_proj.input[-1]"]
    saved = ns.capture(llama, PROMPT, both)
    with pytest.raises(OverlappingWrite, match="overlap at the same token"):
        ns.patched_logits(llama, PROMPT, saved)
    twice = ns.capture(llama, PROMPT, ["layers[0].output[-1]", "layers[0].output[3]"])
    with pytest.raises(OverlappingWrite, match="same token"):
        ns.patched_logits(llama, PROMPT, twice)
    assert ns.patched_logits(llama, PROMPT + " w9", twice).shape == (1, 5, 64)  # there they are two tokens
    apart = ns.capture(llama, PROMPT, ["layers[0].heads[3].output[-1]", "layers[0].heads[2].output[-1]"])
    assert ns.patched_logits(llama, PROMPT, apart).shape == (1, 4, 64)


def test_the_same_place_under_two_names_is_written_once_only(gpt2) -> None:
    row = torch.zeros(1, 16)
    saved = ns.SavedActivation.from_pairs(("layers[2].output[-1]", row), ("model.transformer.h[-1].output[-1]", row))
    with pytest.raises(DuplicatePath, match=r"same site and position as another key[\s\S]*h\[-1\]"):
        ns.patched_logits(gpt2, PROMPT, saved)


def test_a_place_that_never_fires_is_told_before_the_run(gpt2) -> None:
    with pytest.raises(NnspliceError, match=r"transformer\.h"):
        ns.capture(gpt2, PROMPT, "model.transformer.h.output[-1]")
    with pytest.raises(NeverFired, match=r"never called"):
        ns.capture(wrap("opt"), PROMPT, "model.model.output[-1]")


@pytest.mark.parametrize(
    ("path", "kind", "message"),
    [
        ("layers[3].output[-1]", IndexError, "past the last layer"),
        ("layers[0].heads[4].output[-1]", IndexError, "past the last head"),
        ("model.transformer.h[3].output[-1]", IndexError, r"h\[0\] to h\[2\]"),
        ("model.transformer.hh[0].output[-1]", KeyError, r"\^"),
        ("layers[0].output", ValueError, r"which tokens[\s\S]*layers\[0\]\.output\[-1\]"),
        ("layers[0].output[9]", IndexError, "4 tokens"),
        ("layers[0].attn.o.heads[1]", ValueError, r"layers\[0\]\.heads\[1\]\.output"),
        ("layers[0].attn.c_proj.weight", ValueError, r"layers\[0\]\.attn\.c_proj"),
    ],
)
def test_a_wrong_path_is_answered_before_the_run(gpt2, path: str, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message) as caught:
        ns.capture(gpt2, PROMPT, path)
    assert isinstance(caught.value, NnspliceError)
    with pytest.raises(kind, match=message), gpt2.trace(PROMPT):
        ns.save_activations(gpt2, path)


def test_wrong_arguments_are_named(gpt2) -> None:
    saved = ns.capture(gpt2, ["w3 w4", "w5 w6"], "layers[0].output[-1]")
    number: Any = 3
    table: Any = {}
    cases = [
        (lambda: ns.capture(gpt2, PROMPT, []), BadArgument, "no paths"),
        (lambda: ns.capture(gpt2, [], "layers[0].output[-1]"), BadArgument, "no prompts"),
        (lambda: ns.capture(gpt2, "", "layers[0].output[-1]"), BadArgument, "no tokens"),
        (lambda: ns.capture(gpt2, number, "layers[0].output[-1]"), BadType, "is no prompt"),
        (lambda: ns.capture(gpt2, torch.ones(1, 5), "layers[0].output[-1]"), BadType, r"integers[\s\S]*ids\.long"),
        (
            lambda: ns.capture(gpt2, [[3], [3, 64]], "embed.output[-1]"),
            BadArgument,
            r"1 has the token id 64[\s\S]*0 to 63",
        ),
        (lambda: ns.capture(gpt2, [3, -1], "embed.output[-1]"), BadArgument, "0 has the token id -1"),
        (
            lambda: ns.capture(gpt2, [3] * 65, "embed.output[-1]"),
            BadArgument,
            "65 tokens, and the model has positions for 64",
        ),
        (lambda: ns.capture(gpt2, PROMPT, SPANNED, spans=number), BadType, "spans is an int[\\s\\S]*spans={"),
        (lambda: ns.capture(gpt2, PROMPT, SPANNED, spans={"s": number}), BadType, 'span "s" is 3[\\s\\S]*a text'),
        (lambda: ns.capture(gpt2, PROMPT, number), BadType, "path"),
        (lambda: ns.capture(gpt2, PROMPT, ["layers[0].output[-1]", number]), BadType, "a path is a text or a Path"),
        (lambda: ns.capture(build("gpt2"), PROMPT, "layers[0].output[-1]"), BadType, r"ns\.load"),
        (lambda: ns.capture("gpt2", PROMPT, "layers[0].output[-1]"), BadType, r"ns\.load\(name_or_folder\)"),
        (lambda: ns.capture(gpt2.transformer, PROMPT, "layers[0].output[-1]"), BadArgument, "the whole model"),
        (lambda: ns.capture(gpt2, PROMPT, "layers[0].output[-1]", batch_size=0), BadArgument, "batch_size"),
        (lambda: ns.patched_logits(gpt2, ["w3", "w4", "w5"], saved), ShapeError, "2 rows, and there are 3 prompts"),
        (lambda: ns.patched_logits(gpt2, "w3", ns.SavedActivation()), BadArgument, "empty"),
        (lambda: ns.patched_logits(gpt2, "w3", table), BadType, r"no capture[\s\S]*from_pairs"),
        (lambda: saved.apply(gpt2), OutsideTrace, "inside a trace"),
        (lambda: ns.updates(gpt2, saved.keys()), OutsideTrace, "inside a trace"),
        (lambda: saved["layers[1].output[-1]"], UnknownPath, r"layers\[0\]\.output\[-1\]"),
    ]
    for call, kind, message in cases:
        with pytest.raises(kind, match=message):
            call()


def test_a_capture_of_another_width_or_number_of_rows_is_refused(gpt2) -> None:
    narrow = ns.SavedActivation.from_pairs(("layers[0].output[-1]", torch.zeros(1, 8)))
    with pytest.raises(ShapeError, match="8 wide, the site 16"):
        ns.patched_logits(gpt2, PROMPT, narrow)
    three = ns.SavedActivation.from_pairs(("layers[0].output[-1]", torch.zeros(3, 16)))
    with pytest.raises(ShapeError, match=r"3 rows, the run 2[\s\S]*slice"), gpt2.trace(["w3 w4", "w5 w6"]):
        three.apply(gpt2)


def test_a_capture_of_another_model_is_asked_for_by_its_own_paths(gpt2, llama) -> None:
    portable, native = (ns.capture(gpt2, PROMPT, path) for path in ("l1[-1]", "model.transformer.h[1].output[-1]"))
    for _ in range(2):
        assert torch.isfinite(ns.patched_logits(llama, PROMPT, portable)).all()
        with pytest.raises(UnknownPath, match="no part transformer"):
            ns.patched_logits(llama, PROMPT, native)


def test_a_position_for_each_row_is_no_position_of_patched_logits(gpt2) -> None:
    saved: Any = ns.capture(gpt2, PROMPT, "layers[1].output[-1]")
    with pytest.raises(TypeError, match="one position for all prompts"):
        ns.patched_logits(gpt2, PROMPT, saved, at=[1])  # type: ignore[arg-type]
