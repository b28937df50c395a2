"""`relp` is `eap` of a model in which the parts themselves have the rules written into them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.activations import GELUTanh, NewGELUActivation, SiLUActivation
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo.modeling_olmo import OlmoLayerNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.pytorch_utils import Conv1D

import nnsplice as ns
from attribution.oracle import bare
from attribution.test_nodes import linear
from families.build import build, prompt
from nnsplice.attribution import relevance
from nnsplice.attribution.norms import MeasuredNorm, norms_of
from zoo import FAMILIES, MASKED, SEQ2SEQ, double, tokenizer, wrap

CLEAN, CORRUPTED = "w3 w4 w5 w6 w8", "w3 w9 w5 w16 w7"
METRIC = ns.logit_diff("w7", "w8")
SENDERS = ["embed", "layers[:].heads[:]", "layers[:].mlp"]


def scored(model: Any, method: str, **options: Any) -> ns.SweepResult:
    return ns.attribute(model, CLEAN, CORRUPTED, SENDERS, METRIC, method=method, progress=False, **options)


# --- the rules, written into the parts --------------------------------------------------------------------------------


def layer_norm(self: Any, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scale = (centred.pow(2).mean(-1, keepdim=True) + self.eps).sqrt().detach()
    return centred / scale * self.weight + self.bias


def rms_norm(self: Any, x: Tensor) -> Tensor:
    scale = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.variance_epsilon).detach()
    return self.weight * (x.float() * scale).to(x.dtype)


def centred_norm(self: Any, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scale = torch.rsqrt(centred.float().pow(2).mean(-1, keepdim=True) + self.variance_epsilon).detach()
    return (self.weight.float() * (centred.float() * scale)).to(x.dtype)


def bare_norm(self: Any, x: Tensor) -> Tensor:
    centred = x.float() - x.float().mean(-1, keepdim=True)
    return (centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt().detach()).to(x.dtype)


def norm_of_one_and_weight(self: Any, x: Tensor) -> Tensor:
    scale = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps).detach()
    return (x.float() * scale * (1.0 + self.weight.float())).to(x.dtype)


#: Families' norms that are no `nn.LayerNorm`, with the rule written into them.
NORMS: dict[type, Callable[..., Tensor]] = {
    CohereLayerNorm: centred_norm, OlmoLayerNorm: bare_norm, GemmaRMSNorm: norm_of_one_and_weight,
}  # fmt: skip


def new_gelu(self: Any, x: Tensor) -> Tensor:
    inner = (2 / np.pi) ** 0.5 * (x + 0.044715 * x.pow(3))
    return x * (0.5 * (1.0 + inner.tanh())).detach()


def silu(self: Any, x: Tensor) -> Tensor:
    return x * torch.sigmoid(x).detach()


def halved(self: Any, x: Tensor) -> Tensor:
    return nn.functional.linear(x / 2 + (x / 2).detach(), self.weight)


def constant(self: Any, x: Tensor) -> Tensor:
    return nn.functional.linear(x, self.weight, self.bias).detach()


def queries_and_keys_constant(self: Any, x: Tensor) -> Tensor:
    out = x @ self.weight + self.bias
    return torch.cat([out[..., :32].detach(), out[..., 32:]], -1)


def become(module: nn.Module, forward: Callable[..., Tensor]) -> None:
    """The module with another forward, of a class of its own."""
    module.__class__ = type(type(module).__name__, (type(module),), {"forward": forward})


def with_rules(family: str) -> Any:
    bare_model = bare(family)  # before it is wrapped, as that looks at the parts' own methods
    for name, module in list(bare_model.named_modules()):
        last = name.rpartition(".")[2]
        if isinstance(module, nn.LayerNorm):
            become(module, layer_norm)
        elif isinstance(module, LlamaRMSNorm | Qwen2RMSNorm):
            become(module, rms_norm)
        elif type(module) in NORMS:
            become(module, NORMS[type(module)])
        elif isinstance(module, NewGELUActivation):
            become(module, new_gelu)
        elif isinstance(module, SiLUActivation | nn.SiLU):
            become(module, silu)
        elif isinstance(module, GELUTanh):
            become(module, new_gelu)
        elif last == "down_proj":
            become(module, halved)
        elif last in ("q_proj", "k_proj"):
            become(module, constant)
        elif last == "c_attn" and isinstance(module, Conv1D):
            become(module, queries_and_keys_constant)
    return ns.load(bare_model.eval(), tokenizer=wrap(family).tokenizer)


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2", "cohere", "olmo", "gemma"])
def test_the_scores_are_those_of_a_model_with_the_rules_in_its_parts(family: str) -> None:
    found, expected = scored(double(family), "relp").table, scored(with_rules(family), "eap").table
    assert found.edges is not None and expected.edges is not None
    # Norms that compute in float32 round there, beside a line that may be small.
    rounds = 2e-6 if family in ("cohere", "olmo", "gemma") else 1e-7
    np.testing.assert_allclose(found.edges, expected.edges, atol=rounds)
    np.testing.assert_allclose(found.corrupted, expected.corrupted, atol=1e-7)
    plain = scored(double(family), "eap").table.edges
    assert plain is not None and np.nanmax(abs(found.edges - plain)) > 1e-2


CENTRED = {"gpt2": True, "cohere": True, "olmo": True, "llama": False, "gemma": False, "qwen2": False}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", CENTRED)
def test_whether_a_norm_subtracts_the_mean_is_measured(family: str, dtype: torch.dtype) -> None:
    model = wrap(family)
    module = model._module.to(dtype)
    names = [name for name, inner in module.named_modules() if "Norm" in type(inner).__name__]
    found = norms_of(model, names)
    assert len(names) >= 4 and set(found) == set(names)
    for name, norm in found.items():
        assert norm.centred == CENTRED[family]
        own = getattr(module.get_submodule(name), "bias", None)
        assert torch.equal(norm.bias.flatten(), norm.bias.flatten() * 0 if own is None else own)


def test_scores_of_a_norm_whose_mean_is_left_out_are_others(monkeypatch: pytest.MonkeyPatch) -> None:
    right: Any = scored(double("cohere"), "relp").table.edges

    def uncentred(model: Any, names: list[str]) -> dict[str, MeasuredNorm]:
        return {name: replace(norm, centred=False) for name, norm in norms_of(model, names).items()}

    monkeypatch.setattr(relevance, "norms_of", uncentred)
    wrong: Any = scored(double("cohere"), "relp").table.edges
    assert np.nanmax(abs(right - wrong)) > 1e-3


class NormOfHalves(nn.Module):
    """Two scales for each token."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.normalize(x.unflatten(-1, (2, -1)), dim=-1).flatten(-2)


def test_a_norm_with_several_scales_is_refused() -> None:
    module = bare("llama")
    module.model.layers[1].post_attention_layernorm = NormOfHalves().eval()
    model = ns.load(module.eval(), tokenizer=wrap("llama").tokenizer)
    with pytest.raises(ns.errors.RefusedPlace, match=r"layers\.1\.post_attention_layernorm makes is no scaled line"):
        scored(model, "relp")
    assert scored(model, "eap").table.edges is not None


def test_of_a_straight_line_it_is_exact() -> None:
    receivers = ["layers[:].groups[:].v", "layers[:].mlp", "unembed"]
    found, exact = (scored(_with_activation(linear()), m, receivers=receivers).table for m in ("relp", "exact"))
    assert found.edges is not None and exact.edges is not None
    np.testing.assert_allclose(found.edges, exact.edges, atol=1e-11)


#: Mixtures of experts, and norms behind branches.
REFUSED = ("mixtral", "qwen3_moe", "gemma2", "gemma3", "olmo2")


class Doubled(nn.Module):
    """An activation that is a straight line, and no identity."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def _with_activation(model: Any) -> Any:
    for block in model._module.transformer.h:
        block.mlp.act = Doubled().eval()
    return model


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "phi3", "gptj"])
def test_it_changes_no_value_of_a_run_and_leaves_nothing_behind(family: str) -> None:
    model = double(family)
    before, first = scored(model, "eap"), scored(model, "relp")
    np.testing.assert_allclose(first.corrupted, before.corrupted, atol=1e-7)
    np.testing.assert_allclose(first.clean, before.clean, atol=1e-7)
    assert scored(model, "eap") == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model._module.modules())
    norm = next(m for m in model._module.modules() if "Norm" in type(m).__name__)
    assert "relevance" not in str(norm.__dict__.get("forward"))


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in (*SEQ2SEQ, *MASKED)])
def test_a_family_has_scores_or_is_refused_by_name(family: str) -> None:
    if family in REFUSED:
        with pytest.raises(ns.errors.RefusedPlace, match="relp needs"):
            scored(double(family), "relp")
        return
    edges: Any = scored(double(family), "relp").edges()
    assert edges["score"].abs().max() > 1e-3
    assert edges[edges["receiver"].str.endswith((".q", ".k"))]["score"].abs().max() == 0.0


def test_attention_that_reads_more_than_queries_and_keys_is_refused() -> None:
    """The rotated part of a latent key is that of all heads, and a gradient by no rule would come through it."""
    model = ns.load(build("youtu"), tokenizer=tokenizer(), task="text-generation")
    with pytest.raises(ns.errors.RefusedPlace, match="relp has no rule for the attention of layer 0: its keys have a"):
        ns.attribute(model, prompt(9), prompt(9, 23), SENDERS, METRIC, method="relp", progress=False)
