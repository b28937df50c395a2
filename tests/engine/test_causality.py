"""Whether a token depends on those before it alone: seen in a run, whatever the config calls it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import nnsplice as ns
from families.build import build
from nnsplice import engine
from zoo import FAMILIES, MASKED, SEQ2SEQ, having, tokenizer, wrap


def _looks_ahead(module: torch.nn.Module) -> bool:
    """The same by gradients: whether the first token's logits depend on the last token's embedding."""
    seen: list[torch.Tensor] = []
    embedding = module.get_input_embeddings()  # pyright: ignore[reportCallIssue]
    hook = embedding.register_forward_hook(lambda _m, _a, out: seen.append(out.detach().requires_grad_()) or seen[-1])
    try:
        logits = module(input_ids=torch.tensor([[3, 4, 5, 6]])).logits
        (found,) = torch.autograd.grad(logits[0, 0].sum(), seen[0])
    finally:
        hook.remove()
    return bool(found[0, -1].abs().max() > 1e-9)


@pytest.mark.parametrize("name", ["xlm", "xlm/causal", "cpmant", "gpt2", "gemma3_text", "bloom", "biogpt"])
def test_it_is_what_gradients_say(name: str) -> None:
    module = build(name)
    assert engine.is_causal(engine.as_model(ns.load(module, tokenizer=tokenizer()))) is not _looks_ahead(module)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in (*SEQ2SEQ, *MASKED)])
def test_decoders_are_causal(family: str) -> None:
    assert engine.is_causal(wrap(family))


def _is_served(model: object, site: str, clean: list[int], corrupted: list[int]) -> bool:
    try:
        ns.plan_sweep(model, clean, corrupted, site, ns.logit_diff(7, 8))
    except ns.errors.RefusedPlace:
        return False
    return True


@pytest.mark.parametrize("name", ["xlm", "cpmant", "inkling_text", "rwkv"])
def test_no_cell_counts_as_known_that_a_later_token_changes(name: str) -> None:
    model = ns.load(build(name), tokenizer=tokenizer())
    clean, corrupted = [3, 9, 5, 6], [3, 9, 15, 6]
    metric = ns.logit_diff(7, 8)
    sites = having(model, ["layers[:].mid", "layers[:].attn.output", "layers[:].mlp.output", "layers[:].output"])
    sites = [site for site in sites if site == "layers[:].output" or _is_served(model, site, clean, corrupted)]
    plan = ns.plan_sweep(model, clean, corrupted, sites, metric)
    result = ns.run(plan, model, executor="auto", progress=False)
    exact = ns.run(plan, model, executor="reference", progress=False)
    every = ns.run(replace(plan, jobs=plan.jobs + plan.known, known=()), model, executor="reference", progress=False)
    scale = float(abs(every.table.values).max())
    assert abs(result.table.values - every.table.values).max() < 1e-6 * scale
    assert abs(exact.table.values - every.table.values).max() < 1e-6 * scale


class ShiftedMlp(torch.nn.Module):
    """An MLP that also reads the token before."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.inner(states) + states.roll(1, dims=1)


class TokenwiseConv(torch.nn.Conv1d):
    """A convolution of width 1, which mixes no tokens."""

    def __init__(self, inner: torch.nn.Module, width: int) -> None:
        super().__init__(width, width, 1)
        self.inner = inner

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.inner(states) + super().forward(states.transpose(1, 2)).transpose(1, 2)


def test_mixing_behind_the_last_attention_is_measured_whatever_the_class_is_called() -> None:
    for replace_mlp, mixes in ((ShiftedMlp, True), (lambda mlp: TokenwiseConv(mlp, 16), False)):
        module = wrap("gpt2")._module
        module.transformer.h[-1].mlp = replace_mlp(module.transformer.h[-1].mlp)
        model = ns.load(module, tokenizer=tokenizer())
        (place,) = engine.expand(model, "layers[-1].attn.output")
        assert engine.after_last_attention(model, place.site) is not mixes


def test_a_family_whose_values_have_other_tokens_counts_as_mixing() -> None:
    """CPM-Ant puts tokens before the prompt's, so nothing behind its last attention can be changed for the test."""
    model = ns.load(build("cpmant"), tokenizer=tokenizer())
    (place,) = engine.expand(model, "layers[-1].attn.output")
    assert not engine.after_last_attention(model, place.site)
