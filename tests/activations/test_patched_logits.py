"""`patched_logits` of chosen positions, in batches, and with gradients: against whole runs and torch's own autograd."""

from __future__ import annotations

import pytest
import torch

import nnsplice as ns
from nnsplice.errors import BadArgument, BadType, ShortRow
from zoo import VOCAB, double, wrap

PROMPTS = ["w6 w7 w8 w9", "w9 w10", "w11 w12 w13 w4"]


@pytest.mark.parametrize("family", ["gpt2", "llama", "gptj", "gemma2", "t5"])
def test_logits_of_chosen_positions_are_those_of_the_whole_run(family: str) -> None:
    model = double(family)
    saved = ns.capture(model, "w3 w4 w5", "layers[1].output[-1]")
    whole = ns.patched_logits(model, PROMPTS, saved)
    torch.testing.assert_close(ns.patched_logits(model, PROMPTS, saved, positions=-1), whole[:, -1], rtol=0, atol=1e-12)
    if family == "t5":  # its decoder has one token
        return
    two = ns.patched_logits(model, PROMPTS, saved, positions=[0, -2], batch_size=1)
    expected = torch.stack([whole[row, [at, -2]] for row, at in enumerate((0, 2, 0))])
    torch.testing.assert_close(two, expected, rtol=0, atol=1e-12)
    assert not two.requires_grad


def test_only_the_logits_that_are_asked_for_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    inner = torch.nn.Linear.forward

    def counting(layer: torch.nn.Linear, states: torch.Tensor) -> torch.Tensor:
        if layer.out_features == VOCAB:  # the head; code around it would be given all tokens
            seen.append(states.shape[1])
        return inner(layer, states)

    monkeypatch.setattr(torch.nn.Linear, "forward", counting)
    model = double("llama")
    saved = ns.capture(model, "w3 w4 w5", "layers[1].output[-1]")
    ns.patched_logits(model, PROMPTS, saved, positions=-1)
    ns.patched_logits(model, PROMPTS, saved)
    written = ns.capture(model, "w3 w4 w5", "unembed.output[-1]")
    seen.clear()
    ns.patched_logits(model, PROMPTS, saved, positions=-1)
    assert seen == [1, 1]
    logits = ns.patched_logits(model, PROMPTS, written, positions=-1)
    torch.testing.assert_close(logits[0], written["unembed.output[-1]"][0])


@pytest.mark.parametrize("path", ["layers[1].output[-1]", "layers[1].mid[-1]", "layers[1].heads[2].output[-1]"])
def test_gradients_reach_the_capture_as_they_reach_a_value_written_by_a_hook(path: str) -> None:
    model = double("gpt2")
    value = ns.capture(model, "w3 w4 w5", path)[path].clone().requires_grad_()
    logits = ns.patched_logits(
        model, PROMPTS[0], ns.SavedActivation.from_pairs((path, value)), positions=-1, keep_graph=True
    )
    (found,) = torch.autograd.grad(logits[0, 5], value)
    step = 1e-6
    direction = torch.randn(value.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ends = [
        ns.patched_logits(
            model,
            PROMPTS[0],
            ns.SavedActivation.from_pairs((path, (value + sign * step * direction).detach())),
            positions=-1,
        )[0, 5]
        for sign in (1, -1)
    ]
    slope = float(ends[0] - ends[1]) / (2 * step)
    assert abs(float((found * direction).sum()) - slope) < 1e-7
    assert abs(slope) > 1e-4


def test_bad_positions_are_answered() -> None:
    model = double("gpt2")
    saved = ns.capture(model, "w3 w4 w5", "layers[1].output[-1]")
    with pytest.raises(ShortRow, match=r"prompt 1 has 2 tokens, and no position \[3\]"):
        ns.patched_logits(model, PROMPTS, saved, positions=3)
    with pytest.raises(BadType, match="positions"):
        ns.patched_logits(model, PROMPTS, saved, positions=[])
    with pytest.raises(BadArgument, match="batch_size=0"):
        ns.patched_logits(model, PROMPTS, saved, batch_size=0)
    with pytest.raises(BadArgument, match="cross the wire"):
        ns.patched_logits(model, PROMPTS, saved, keep_graph=True, remote=True)


def test_a_bar_counts_prompts_and_can_be_silenced(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("nnsplice.progress.DELAY", 0.0)
    model = wrap("llama")
    saved = ns.capture(model, PROMPTS, "layers[0].output[-1]", progress=False)
    ns.patched_logits(model, PROMPTS, saved, positions=-1, batch_size=1, progress=False)
    assert capsys.readouterr().err == ""
    ns.patched_logits(model, PROMPTS, saved, positions=-1, batch_size=1)
    assert f"{len(PROMPTS)}/{len(PROMPTS)}" in capsys.readouterr().err
