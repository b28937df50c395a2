"""An add changes exactly `coefficient * vector` at the chosen tokens, and nothing elsewhere: on the stream itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import nnsplice as ns
from nnsplice.steering.padding import padded
from steering.oracle import BLOCKS, WHERE, block, policy
from steering.vectors import ids, precise, vector
from zoo import wrap


def stream(model: Any, family: str, layer: int, rows: Any, mask: Any) -> Any:
    """What leaves a block, as a torch hook outside of everything sees it."""
    found = []
    handle = block(model._module, family, layer).register_forward_hook(
        lambda _m, _a, out: found.append((out[0] if isinstance(out, tuple) else out).clone())
    )
    with torch.no_grad():
        model._module(rows, attention_mask=mask)
    handle.remove()
    return found[0]


@pytest.mark.parametrize("name", [name for name in WHERE if name != "generated"])
@pytest.mark.parametrize("family", BLOCKS)
def test_an_add_is_exactly_that(family: str, name: str) -> None:
    model, direction = precise(family), vector(1)
    step = -1.5 * direction["layers[1].output[-1]"][0]
    rows, mask = padded(ids(model), 0, left=True)
    before = stream(model, family, 1, rows, mask)
    with ns.steering.steer(model, direction, -1.5, where=policy(name)):
        after = stream(model, family, 1, rows, mask)
        earlier = stream(model, family, 0, rows, mask)
    touched = 0
    for row, prompt in enumerate(ids(model)):
        start = rows.shape[1] - len(prompt)
        for position in range(len(prompt)):
            there, here = before[row, start + position], after[row, start + position]
            if WHERE[name](position, len(prompt)):
                assert torch.equal(here, there + step.to(there)), (row, position)
                touched += 1
            else:
                assert torch.equal(here, there), (row, position)
    assert touched
    assert torch.equal(earlier, stream(model, family, 0, rows, mask))
    assert torch.equal(before, stream(model, family, 1, rows, mask))


def test_a_mask_and_a_span_for_each_row() -> None:
    model, direction = precise("llama"), vector(1)
    rows, mask = padded(ids(model), 0, left=True)
    before = stream(model, "llama", 1, rows, mask)
    chosen = [[False, True, False, True], [True], [False, False, False, False, True]]
    wide = torch.zeros(3, 5, dtype=torch.bool)
    for row, flags in enumerate(chosen):
        wide[row, : len(flags)] = torch.tensor(flags)
    spans = [(1, 2), (0, 1), (-1, 9)]
    for where, wanted in (
        (ns.steering.mask(wide), chosen),
        (ns.steering.mask([False, True, True]), [[False, True, True]] * 3),
        (ns.steering.span(spans), [[False, True], [True], [False] * 4 + [True]]),
    ):
        with ns.steering.steer(model, direction, where=where):
            moved = (stream(model, "llama", 1, rows, mask) - before).abs().sum(-1) > 0
        for row, flags in enumerate(wanted):
            own = moved[row, rows.shape[1] - len(ids(model)[row]) :].tolist()
            assert own == [*flags, *[False] * (len(own) - len(flags))][: len(own)]


def test_right_padding_counts_the_same_tokens() -> None:
    model, direction = precise("gpt2"), vector(1)
    rows, mask = padded(ids(model), 0, left=False)
    before = stream(model, "gpt2", 1, rows, mask)
    for name in ("from_token(-1)", "span(1, 3)", "span(-2, -1)"):
        with ns.steering.steer(model, direction, where=policy(name)):
            moved = (stream(model, "gpt2", 1, rows, mask) - before).abs().sum(-1) > 0
        for row, prompt in enumerate(ids(model)):
            expected = [WHERE[name](position, len(prompt)) for position in range(len(prompt))]
            assert moved[row, : len(prompt)].tolist() == expected


SITES = {
    "layers[1].input": "transformer.h.1",
    "layers[1].attn.output": "transformer.h.1.attn",
    "layers[1].mlp.output": "transformer.h.1.mlp",
    "final_norm.output": "transformer.ln_f",
}


@pytest.mark.parametrize("site", [*SITES, "layers[1].heads[2].output", "layers[1].mid", "layers[1].neurons[5].output",
                                  "layers[1].heads[0].q", "embed.output"])  # fmt: skip
def test_other_places_are_steered_as_a_capture_added_to_a_trace_is(site: str) -> None:
    """Two ways that share no code below them: the block here, `add_to` there."""
    model = precise("gpt2")
    width = 4 if "heads" in site else 1 if "neurons" in site else 16
    tensor = torch.randn(1, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    saved = ns.SavedActivation.from_pairs((f"{site}[-1]", tensor))
    prompt = "w3 w4 w5"
    everywhere = ns.SavedActivation.from_pairs(*((f"{site}[{p}]", tensor) for p in range(3)))
    expected = ns.patched_logits(model, prompt, 1.5 * everywhere, add=True)
    with ns.steering.steer(model, saved, 1.5), torch.no_grad():
        found = model._module(torch.tensor([[3, 4, 5]])).logits
        with model.trace(prompt):
            traced = model.output.logits.save()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(traced, expected, rtol=0, atol=1e-12)
    assert not torch.allclose(found, model._module(torch.tensor([[3, 4, 5]])).logits)


def test_layers_that_share_one_module_are_steered_apart() -> None:
    model = wrap("albert")
    ids_ = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        plain = model._module(ids_).logits
        found = []
        for layer in range(3):
            with ns.steering.steer(model, vector(layer)):
                found.append(model._module(ids_).logits)
    assert len({tuple(logits.flatten().tolist()) for logits in [plain, *found]}) == 4
    add = vector(1)
    steps = ns.SavedActivation.from_pairs(*((f"layers[1].output[{p}]", add["layers[1].output[-1]"]) for p in range(3)))
    expected = ns.patched_logits(model, ids_, steps, add=True)
    torch.testing.assert_close(found[1], expected, rtol=0, atol=1e-5)


def test_half_precision_is_added_to_in_its_own_type() -> None:
    model = wrap("llama")
    model._module.bfloat16()
    rows, mask = padded(ids(model), 0, left=True)
    before = stream(model, "llama", 1, rows, mask)
    with ns.steering.steer(model, vector(1), 0.3):
        after = stream(model, "llama", 1, rows, mask)
    step = (0.3 * vector(1)["layers[1].output[-1]"][0]).bfloat16()
    assert after.dtype == torch.bfloat16
    own = mask.bool()
    assert torch.equal(after[own], (before + step)[own])
