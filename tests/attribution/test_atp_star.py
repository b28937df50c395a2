"""atp*: the QK fix is exact where only a softmax bends the model; GradDrop is what detaching a layer does."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import nnsplice as ns
from attribution.oracle import NAMES, Point, bare, ends, ids, with_first, worth
from attribution.test_nodes import CLEAN, CORRUPTED, METRIC, attribute, scores
from families.build import build as of_family
from families.build import prompt
from nnsplice.attribution.attention import probabilities
from zoo import FAMILIES, MASKED, SEQ2SEQ, build, double, wrap


@contextmanager
def _standing_still(module: nn.Module, branches: list[str]) -> Iterator[None]:
    """What these modules add passes no gradient back."""
    hooks = [
        module.get_submodule(name).register_forward_hook(
            lambda _m, _a, out: with_first(out, (out[0] if isinstance(out, tuple) else out).detach())
        )
        for name in branches
    ]
    yield
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("family", NAMES)
def test_grad_drop_is_the_mean_size_over_layers_that_stand_still(family: str) -> None:
    names, model, module = NAMES[family], double(family), bare(family)
    points = {
        "layers[0].output": Point(names.mlp.format(0).rpartition(".")[0]),
        "layers[1].mlp.output": Point(names.mlp.format(1)),
        "layers[0].heads[2].output": names.z(0, 2),
    }
    owner = {"layers[0].output": None, "layers[1].mlp.output": 1, "layers[0].heads[2].output": 0}
    plain = worth(module, ids(CLEAN), ids(CORRUPTED), list(points.values()))
    dropped: list[dict] = []
    for layer in range(3):
        with _standing_still(module, [names.attn.format(layer), names.mlp.format(layer)]):
            # Values come from runs as they are; only the gradient meets the layer that stands still.
            dropped.append(worth(module, ids(CLEAN), ids(CORRUPTED), list(points.values())))
    result = attribute(model, list(points), "atp*")
    found = dict(zip((cell.path for cell in result.cells), scores(result), strict=True))
    for path, point in points.items():
        layers = [layer for layer in range(3) if layer != owner[path]]
        size = torch.stack([dropped[layer][point].abs() for layer in layers]).mean(0)
        expected = torch.where(plain[point] < 0, -size, size)
        for token in range(5):
            assert abs(found[f"{path}[{token}]"] - float(expected[token].detach())) < 1e-12
    moved = [abs(found[f"{path}[4]"]) - float(plain[point][4].detach().abs()) for path, point in points.items()]
    assert max(map(abs, moved)) > 1e-6


def _one_softmax(family: str, **config: Any) -> Any:
    """A model of two layers whose second attention is all that is no straight line."""
    model = wrap(family, **config)
    module = model._module.double()
    blocks = module.transformer.h if family == "gpt2" else module.model.layers
    for block in blocks:
        if family == "gpt2":
            block.ln_1, block.ln_2, block.mlp.act = nn.Identity(), nn.Identity(), nn.Identity()
        else:
            block.input_layernorm, block.post_attention_layernorm = nn.Identity(), nn.Identity()
            with torch.no_grad():
                block.mlp.down_proj.weight.zero_()
    with torch.no_grad():
        if family == "gpt2":
            blocks[0].attn.c_attn.weight[:, :32] = 0.0
            module.transformer.ln_f = nn.Identity()
        else:
            blocks[0].self_attn.q_proj.weight.zero_()
            module.model.norm = nn.Identity()
    return ns.load(module.eval(), tokenizer=model.tokenizer)


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2", "mistral"])
def test_queries_and_keys_are_exact_where_only_their_softmax_bends(family: str) -> None:
    layers = {"n_layer": 2} if family == "gpt2" else {"num_hidden_layers": 2}
    model = _one_softmax(family, **layers)
    sites = ["layers[1].heads[:].q", "layers[1].groups[:].k", "layers[1].attn.q"]
    exact = ns.sweep(model, CLEAN, CORRUPTED, sites, METRIC, progress=False)
    star, plain = attribute(model, sites, "atp*"), attribute(model, sites)
    assert np.abs(np.abs(scores(star)) - np.abs(scores(exact))).max() < 1e-9
    assert np.abs(scores(star) - scores(exact)).max() < 1e-9
    assert np.abs(scores(plain) - scores(exact)).max() > 1e-3 * np.abs(scores(exact)).max()
    assert len(exact.cells) >= 30
    if family != "gpt2":  # a group's key is read by two heads
        assert ns.Atlas.of(model).towers["decoder"].blocks[1].layout.per_group == 2  # type: ignore[union-attr]


def test_a_certain_softmax_hides_queries_from_atp_and_not_from_atp_star() -> None:
    model = _one_softmax("gpt2", n_layer=2)
    with torch.no_grad():
        model._module.transformer.h[1].attn.c_attn.weight[:, :32] *= 30.0
    sites = ["layers[1].heads[:].q[-2:]", "layers[1].groups[:].k"]
    exact = scores(ns.sweep(model, CLEAN, CORRUPTED, sites, METRIC, progress=False))
    star, plain = scores(attribute(model, sites, "atp*")), scores(attribute(model, sites))
    assert np.abs(exact).max() > 1e-2
    assert np.abs(plain - exact).max() > 0.5 * np.abs(exact).max() and np.abs(star - exact).max() < 1e-9


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in (*SEQ2SEQ, *MASKED)])
def test_the_open_attention_is_the_models_own_or_is_refused(family: str) -> None:
    """On every family queries are scored from the model's true probabilities, or there is an error."""
    model = double(family)
    sites = ["layers[:].heads[:].q", "layers[:].groups[:].k"]
    if family in REFUSED or (family in REFUSED_BEFORE and not asks_the_registry(model)):
        with pytest.raises(ns.errors.BadArgument, match="see the probabilities"):
            attribute(model, sites, "atp*")
        return
    result = attribute(model, sites, "atp*")
    assert abs(result.corrupted[0] - ends(bare(family), ids(CORRUPTED))) < 1e-6
    assert np.isfinite(result.table.values).all() and np.ptp(result.table.values) > 1e-6


REFUSED = ("bloom", "falcon", "falcon_mqa", "falcon_mha", "gpt_neo", "olmo2")
#: Transformers 5.24 gave up their own attention code for its registry of attention functions.
REFUSED_BEFORE = ("gptj", "codegen")


def asks_the_registry(model: Any) -> bool:
    return "ALL_ATTENTION_FUNCTIONS" in inspect.getsource(sys.modules[type(model._module).__module__])


def test_a_model_of_one_layer_has_nothing_to_leave_out() -> None:
    model = wrap("gpt2", n_layer=1)
    model._module.double()
    sites = ["layers[0].mlp", "layers[0].heads[:]"]
    assert np.abs(scores(attribute(model, sites, "atp*")) - scores(attribute(model, sites))).max() < 1e-14


def test_sinks_take_their_share_of_the_probabilities() -> None:
    """Attention with sinks, against softmax written out over one column more."""
    from nnsplice.attribution.attention import AttentionRecord, worth_of_keys, worth_of_queries

    torch.manual_seed(1)
    query, key, other = (torch.randn(1, 2, 4, 3, dtype=torch.float64) for _ in range(3))
    gradient, sinks = torch.randn(1, 2, 4, 4, dtype=torch.float64), torch.randn(2, dtype=torch.float64)
    mask = torch.full((4, 4), float("-inf"), dtype=torch.float64).triu(1)[None, None]
    here = AttentionRecord(query, key, query, 0.5, mask, 3.0, sinks)

    def probabilities(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        scores = (q @ k.transpose(-1, -2) * 0.5 / 3.0).tanh() * 3.0 + mask
        up = scores.exp()
        return up / (up.sum(-1, keepdim=True) + sinks.exp()[None, :, None, None])

    there = AttentionRecord(other, other, query, 0.5, mask, 3.0, sinks)
    moved = ((probabilities(other, key) - probabilities(query, key)) * gradient).sum(-1)
    assert (worth_of_queries(here, there, gradient) - moved).abs().max() < 1e-12
    worths = worth_of_keys(here, there, gradient)
    for token in range(4):
        changed = key.clone()
        changed[:, :, token] = other[:, :, token]
        expected = ((probabilities(query, changed) - probabilities(query, key)) * gradient).sum((-1, -2))
        assert (worths[..., token] - expected).abs().max() < 1e-12


def test_the_oracle_sees_a_layer_that_moves() -> None:
    """The control: a layer that stands still changes the gradient."""
    module = build("gpt2").double()
    point = Point("transformer.h.0.mlp")
    plain = worth(module, ids(CLEAN), ids(CORRUPTED), [point])[point]
    with _standing_still(module, ["transformer.h.1.attn", "transformer.h.1.mlp"]):
        still = worth(module, ids(CLEAN), ids(CORRUPTED), [point])[point]
    assert float((plain - still).abs().max()) > 1e-6


@pytest.mark.parametrize(
    "family", ["mistral", "gemma2", "gemma3_text", "phimoe", "gpt_oss", "cohere2", "qwen2_moe", "llama4_text", "afmoe"]
)
def test_probabilities_are_those_of_models_with_windows_behind_prompts_that_are_longer(family: str) -> None:
    """The window is in the mask that the model makes, so the argument that says it again may be left out."""
    tokens = prompt(12)
    own, exchanged = of_family(family), of_family(family)
    with torch.no_grad():
        expected = own(tokens, output_attentions=True, use_cache=False)
        with probabilities(exchanged) as seen:
            logits = exchanged(tokens, use_cache=False).logits
    assert (logits - expected.logits).abs().max() < 1e-4, "the models' own softmax is in single precision"
    assert len(seen) == len(expected.attentions)
    for attended, pattern in zip(seen.values(), expected.attentions, strict=True):
        assert (attended.probabilities - pattern).abs().max() < 1e-5
        again = attended.softmax(attended.scores(attended.query, attended.key))
        assert (again - pattern).abs().max() < 1e-5
    hidden = [(pattern[0, 0].tril() == 0).sum() - 66 for pattern in expected.attentions]
    assert max(hidden) > 0, "no window is shorter than the prompt"
