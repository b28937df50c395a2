"""Roles in sweeps and traces: what they cost, and pairs whose tokens correspond by their role."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import nnsplice as ns
from nnsplice.errors import BadArgument, ShapeError, ShortRow, SpanError
from zoo import LAYERS, build, double

METRIC = ns.logit_diff("w7", "w8")
#: A subject of two tokens at 1, and one of four at 2, of which the first and the last correspond.
CLEAN, CORRUPTED = "w3 w4 w5 w6 w7 w9 w10", "w13 w11 w14 w15 w16 w17 w6 w9 w20"
SPANS = {"clean": {"subject": (1, 3)}, "corrupted": {"subject": (2, 6)}}
#: By hand: the corrupted token -> the clean one. What stands before the subject, in it and behind it differs in length.
PARTNERS = {2: 1, 5: 2, 6: 3, 8: 6}


def _states(module: Any, text: str, patch: tuple[int, int, Tensor] | None = None) -> tuple[list[Tensor], float]:
    """What each layer gives, and the metric; with one token of one layer replaced."""
    kept: list[Tensor] = []

    def hook(layer: int) -> Any:
        def keep(_module: Any, _args: Any, out: Any) -> Any:
            stream = (out[0] if isinstance(out, tuple) else out).clone()
            if patch is not None and patch[0] == layer:
                stream[0, patch[1]] = patch[2]
            kept.append(stream)
            return (stream, *out[1:]) if isinstance(out, tuple) else stream

        return keep

    blocks = module.transformer.h if hasattr(module, "transformer") else module.model.layers
    handles = [block.register_forward_hook(hook(n)) for n, block in enumerate(blocks)]
    try:
        with torch.no_grad():
            logits = module(torch.tensor([[int(word[1:]) for word in text.split()]])).logits[0, -1]
    finally:
        for handle in handles:
            handle.remove()
    return kept, float(logits[7] - logits[8])


def test_a_span_that_the_corrupted_prompt_lacks_may_be_given_apart() -> None:
    model, sites = double("gpt2"), 'layers[:].output["subject"][-1]'
    with pytest.raises(
        SpanError, match=r"'w4 w5' does not occur[\s\S]*in: corrupted=[\s\S]*\"clean\": [\s\S]*in: ns.plan"
    ):
        ns.sweep(model, CLEAN, CORRUPTED, sites, METRIC, spans={"subject": "w4 w5"}, progress=False)
    with pytest.raises(SpanError) as refused:
        ns.sweep(model, CLEAN, CORRUPTED, sites, METRIC, spans={"subject": "w11 w14"}, progress=False)
    assert "in: corrupted=" not in str(refused.value)


@pytest.mark.parametrize("executor", ["packed", "batched", "reference"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_tokens_correspond_by_their_role(family: str, executor: str) -> None:
    options: Any = {"align": "role", "executor": executor, "progress": False}
    result = ns.sweep(double(family), CLEAN, CORRUPTED, "layers[:].output[:]", METRIC, spans=SPANS, **options)
    module = build(family).double()
    states, _ = _states(module, CLEAN)
    expected = np.full((LAYERS, 9), np.nan)
    for layer in range(LAYERS):
        for here, there in PARTNERS.items():
            expected[layer, here] = _states(module, CORRUPTED, (layer, here, states[layer][0, there]))[1]
    np.testing.assert_allclose(result.grid().values[0], expected, atol=1e-10, rtol=0)
    assert result.by_role().grid().role.values.tolist() == ["subject first", "subject last", "first after", "last"]


def test_stretches_of_one_length_correspond_token_by_token() -> None:
    model, spans = double("gpt2"), {"clean": {"subject": (1, 4)}, "corrupted": {"subject": (1, 4)}}
    clean, corrupted = "w3 w4 w5 w6 w7 w9", "w3 w14 w15 w16 w7 w9"
    by_role, by_position = (
        ns.sweep(
            model, clean, corrupted, "layers[:].output[:]", METRIC, spans=spans, align=align, progress=False
        ).grid()
        for align in ("role", "position")
    )
    np.testing.assert_allclose(by_role.values, by_position.values, atol=1e-12)


def test_aligned_at_the_end_a_metric_reads_the_clean_prompt_as_far_from_its_end() -> None:
    clean, corrupted = ["w11 w3 w4 w5 w6"] * 2, ["w3 w9 w5 w6", "w9 w5 w6"]  # one run, which is read at two tokens
    found = ns.sweep(double("gpt2"), clean, corrupted, "layers[:].output[0]", METRIC.at(1), align="end", progress=False)
    logits = build("gpt2").double()(torch.tensor([[11, 3, 4, 5, 6]])).logits[0, 2:4].detach()
    np.testing.assert_allclose(found.clean, logits[:, 7] - logits[:, 8], rtol=0, atol=1e-12)


def test_a_metric_is_read_at_a_token_with_a_partner() -> None:
    model = double("gpt2")
    ask: Any = {"spans": SPANS, "align": "role", "progress": False}
    with pytest.raises(ShortRow, match="whose role the clean"):
        ns.sweep(model, CLEAN, CORRUPTED, "layers[:].output[2]", METRIC.at(4), **ask)
    found = ns.sweep(model, CLEAN, CORRUPTED, "layers[:].output[2]", METRIC.at(5), **ask)
    logits = build("gpt2").double()(torch.tensor([[3, 4, 5, 6, 7, 9, 10]])).logits[0, 2].detach()
    assert found.clean[0] == pytest.approx(float(logits[7] - logits[8]), abs=1e-12)
    with pytest.raises(SpanError, match="which is not given"):
        ns.sweep(model, CLEAN, CORRUPTED, "layers[:].output", METRIC, align="role")
    with pytest.raises(BadArgument, match='"position", "end" or "role"'):
        ns.sweep(model, CLEAN, CORRUPTED, "layers[:].output", METRIC, align="roles")
    with pytest.raises(ShapeError, match='align="role", with the span "subject"'):
        ns.sweep(model, CLEAN, CORRUPTED, "layers[:].output", METRIC)


# --- traces


def test_a_trace_of_many_prompts_is_averaged_by_role_in_one_call() -> None:
    model = double("gpt2")
    prompts, subjects = ["w3 w4 w5 w6 w7", "w13 w14 w15 w16 w17 w19 w20"], ["w4 w5", "w14 w15 w16"]
    traced = ns.causal_trace(model, prompts, subjects, samples=3, progress=False)
    found = traced.by_role()
    grid = traced.grid().values
    tokens = {
        "subject first": ([1], [1]), "subject middle": ([], [2]), "subject last": ([2], [3]),
        "first after": ([3], [4]), "further": ([], [5]), "last": ([4], [6]),
    }  # fmt: skip
    for role, each in tokens.items():
        for prompt, at in enumerate(each):
            value = found.grid().sel(prompt=prompt, role=role).values
            expected = grid[prompt][:, at].mean(-1) if at else np.full(LAYERS, np.nan)
            np.testing.assert_allclose(value, expected, atol=1e-15)
    assert found.plot().get_xlabel() == "role"


def test_a_trace_of_one_role_pays_for_no_other() -> None:
    model = double("gpt2")
    prompts, subjects = ["w3 w4 w5 w6 w7", "w13 w14 w15 w16 w17 w19 w20"], ["w4 w5", "w14 w15 w16"]
    ask: Any = {"samples": 3, "progress": False, "executor": "packed"}
    whole = ns.causal_trace(model, prompts, subjects, **ask)
    one = ns.causal_trace(model, prompts, subjects, sites='layers[:].output["subject"][-1]', **ask)
    assert len(one.cells) == LAYERS and one.run.tokens < whole.run.tokens - 200
    found, expected = (result.by_role().grid().sel(role="subject last") for result in (one, whole))
    np.testing.assert_allclose(found.values, expected.values, atol=1e-12)
    assert one.by_role().grid().role.values.tolist() == ["subject last"]
    mlps = ns.causal_trace(model, prompts, subjects, sites=["layers[:].mlp[-1]", "layers[:].attn[-1]"], **ask)
    assert mlps.components == ("layers[:].attn.output", "layers[:].mlp.output")
    with pytest.raises(BadArgument, match="beside sites"):
        ns.causal_trace(model, prompts, subjects, sites="layers[:].output", kind="mlp", **ask)
