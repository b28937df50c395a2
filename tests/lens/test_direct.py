"""Direct attribution: the parts are what plain arithmetic on the bare module says, and add up to the metric."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import nnsplice as ns
from families.lenses_of import direct_law
from families.subject import Subject, hooks
from nnsplice.atlas import unwrap
from nnsplice.errors import BadArgument, NnspliceError, RefusedPlace
from nnsplice.lens.linear import FrozenNorm
from zoo import wrap

#: Norms with and without a mean and a bias, before, behind and around branches; caps; parallel branches; experts.
QUICK = ["gpt2", "llama", "gemma2", "cohere", "olmo2", "mixtral", "phi", "openai-gpt"]
DIFF = ns.logit_diff(7, 8)
IDS = torch.tensor([[5, 9, 6, 4, 11]])


@pytest.mark.parametrize("family", QUICK)
def test_all_parts_are_the_metric(family: str) -> None:
    said = direct_law(Subject(family))
    assert said.refused == "" and said.gap is not None and said.gap < 1e-10


@pytest.mark.parametrize("family", ["bert", "mamba", "granite"])
def test_other_models_are_refused_by_name(family: str) -> None:
    said = direct_law(Subject(family))
    assert said.gap is None and said.refused


def test_the_law_sees_another_unembedding() -> None:
    """A control of the law itself: the bare module's head is a little off."""
    subject = Subject("llama")
    with torch.no_grad():
        subject.bare.lm_head.weight[7].mul_(1 + 1e-6)
    said = direct_law(subject)
    assert said.gap is not None and said.gap > 1e-10


# --- by hand ----------------------------------------------------------------------------------------------------------


def kept(root: Any, ids: Tensor, **modules: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """What modules were given and made at the last token."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str) -> Any:
        def hook(_: Any, args: Any, out: Any) -> None:
            out = out[0] if isinstance(out, tuple) else out
            seen[name] = args[0][0, -1].clone(), out.reshape(-1, out.shape[-1])[-1].clone()

        return hook

    made = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    with torch.no_grad(), hooks(*made):
        root(ids)
    return seen


def rms_behind(seen: tuple[Tensor, Tensor], gain: Tensor, towards: Tensor, eps: float) -> Tensor:
    return towards * gain / (seen[0].pow(2).mean() + eps).sqrt()


def test_heads_of_llama_by_hand() -> None:
    model = wrap("llama").to(torch.float64)
    root: Any = unwrap(model)
    layers = root.model.layers
    modules = {f"o{n}": layer.self_attn.o_proj for n, layer in enumerate(layers)}
    seen = kept(root, IDS, norm=root.model.norm, **modules)
    towards = root.lm_head.weight[7] - root.lm_head.weight[8]
    towards = rms_behind(seen["norm"], root.model.norm.weight, towards, root.config.rms_norm_eps)
    grid = ns.lens.direct(model, IDS, DIFF, "layers[:].heads[:]").grid()[0]
    width = root.config.head_dim
    for n, layer in enumerate(layers):
        for head in range(root.config.num_attention_heads):
            columns = slice(head * width, (head + 1) * width)
            expected = towards @ layer.self_attn.o_proj.weight[:, columns] @ seen[f"o{n}"][0][columns]
            assert abs(float(grid.sel(layer=n, head=head)) - float(expected.detach())) < 1e-6


def test_heads_go_through_the_norm_behind_the_projection() -> None:
    subject = Subject("olmo2")
    root = subject.bare
    layers = root.model.layers
    modules = {f"o{n}": layer.self_attn.o_proj for n, layer in enumerate(layers)}
    modules |= {f"n{n}": layer.post_attention_layernorm for n, layer in enumerate(layers)}
    seen = kept(root, subject.ids, norm=root.model.norm, **modules)
    eps = root.config.rms_norm_eps
    last = rms_behind(seen["norm"], root.model.norm.weight, root.lm_head.weight[7] - root.lm_head.weight[8], eps)
    grid = ns.lens.direct(subject.model, subject.ids, DIFF, "layers[:].heads[:]").grid()[0]
    width = layers[0].self_attn.head_dim
    for n, layer in enumerate(layers):
        towards = rms_behind(seen[f"n{n}"], layer.post_attention_layernorm.weight, last, eps)
        for head in range(grid.sizes["head"]):
            columns = slice(head * width, (head + 1) * width)
            expected = towards @ layer.self_attn.o_proj.weight[:, columns] @ seen[f"o{n}"][0][columns]
            assert abs(float(grid.sel(layer=n, head=head)) - float(expected.detach())) < 1e-6


def test_biases_are_the_rest() -> None:
    """GPT-2 with all its branches: what is left are the biases of the norm and the head, to the last digit."""
    model = wrap("gpt2").to(torch.float64)
    root: Any = unwrap(model)
    with torch.no_grad():
        root.transformer.ln_f.bias.normal_()
    parts = ns.lens.direct(model, IDS, DIFF, ["embed", "layers[:].attn", "layers[:].mlp"])
    towards = root.lm_head.weight[7] - root.lm_head.weight[8]
    assert abs(float(parts.rest[0]) - float((towards @ root.transformer.ln_f.bias).detach())) < 1e-12


# --- parts of parts ---------------------------------------------------------------------------------------------------


def test_heads_and_the_bias_are_their_attention() -> None:
    model = Subject("gemma2").model
    heads = ns.lens.direct(model, IDS, DIFF, ["layers[1].heads[:]", "layers[0].attn"])
    whole = ns.lens.direct(model, IDS, DIFF, ["layers[1].attn", "layers[0].attn"])
    assert abs(float(heads.grid("layers[:].heads[:].output").sum()) - float(whole.grid()[0, 1])) < 1e-7
    assert np.allclose(heads.grid("layers[:].attn.output").values[0, 0], whole.grid().values[0, 0], rtol=0, atol=1e-12)


def test_neurons_are_their_mlp() -> None:
    model = Subject("llama").model
    neurons = ns.lens.direct(model, IDS, DIFF, "layers[0].neurons[:]").grid()
    assert abs(float(neurons.sum()) - float(ns.lens.direct(model, IDS, DIFF, "layers[0].mlp").grid().squeeze())) < 1e-10
    some = ns.lens.direct(model, IDS, DIFF, "layers[0].neurons[1,3]")
    assert np.allclose(some.grid().values[0, 0], neurons.values[0, 0, [1, 3]])
    assert abs(float(some.table.values.sum() + some.rest[0] - some.clean[0])) < 1e-10


def test_experts_are_their_mlp() -> None:
    model = Subject("mixtral").model
    experts = ns.lens.direct(model, IDS, DIFF, "layers[:].experts[:]")
    whole = ns.lens.direct(model, IDS, DIFF, "layers[:].mlp")
    np.testing.assert_allclose(experts.grid().sum("expert").values, whole.grid().values, atol=1e-9)
    assert (experts.grid().values == 0).any(), "an expert that a token was not sent to adds nothing"


def test_a_token_is_its_logit(model) -> None:
    prompts = ["w3 w4 w5", "w6 w7"]
    parts = ns.lens.direct(model, prompts, ["w7", "w8"])
    for row, (prompt, answer) in enumerate(zip(prompts, ["w7", "w8"], strict=True)):
        logits = ns.patched_logits(model, prompt, ns.capture(model, prompt, "embed[-1]"), positions=-1)
        expected = logits[0, model.tokenizer(answer)["input_ids"][0]]
        assert parts.clean[row] == pytest.approx(float(expected), rel=1e-4)
    np.testing.assert_allclose(parts.table.values.sum(1) + parts.rest, parts.clean, rtol=1e-4)


def test_it_reads_where_the_metric_reads(model) -> None:
    at = ns.lens.direct(model, "w3 w4 w5", DIFF.at(1), "layers[:].attn")
    np.testing.assert_allclose(at.grid(), ns.lens.direct(model, "w3 w4", DIFF, "layers[:].attn").grid(), atol=1e-5)
    ns.lens.direct(model, "w3 w4 w5", DIFF, "layers[:].attn[-1]")
    with pytest.raises(BadArgument, match="no direct part"):
        ns.lens.direct(model, "w3 w4 w5", DIFF, "layers[:].attn[1]")


def test_a_file_keeps_the_rest(model, tmp_path) -> None:
    parts = ns.lens.direct(model, ["w3 w4 w5", "w6 w7"], DIFF)
    parts.to_file(tmp_path / "parts.safetensors")
    again = ns.SweepResult.from_file(tmp_path / "parts.safetensors")
    assert again == parts and np.array_equal(again.rest, parts.rest)
    swept = ns.ablate(model, "w3 w4 w5", "layers[0].attn", DIFF, progress=False)
    with pytest.raises(BadArgument, match="no parts of one sum"):
        _ = swept.rest


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "sites", "text"),
    [
        (ns.probability(7), "layers[:].attn", "no weighted sum|not a weighted sum"),
        (ns.logit_diff({7, 9}, 8), "layers[:].attn", "no weighted sum"),
        (ns.Metric.of(lambda logits: logits.max(-1).values), "layers[:].attn", "not a weighted sum"),
        (ns.kl_divergence(), "layers[:].attn", "one metric of one run"),
        (DIFF, "layers[1].output", "no part of that sum"),
        (DIFF, ["layers[0].attn", "layers[0].heads[1]"], "count twice"),
        (DIFF, "layers[0].heads[0].q", "adds nothing"),
    ],
)
def test_what_has_no_parts_is_refused(model, metric: Any, sites: Any, text: str) -> None:
    with pytest.raises(NnspliceError, match=text):
        ns.lens.direct(model, "w3 w4 w5", metric, sites)


class Bent(nn.Module):
    def forward(self, states: Tensor) -> Tensor:
        return states * 2 / (1 + states.abs())


def test_the_metric_to_write_for_several_wrong_tokens_is_the_difference_of_means(model) -> None:
    with pytest.raises(RefusedPlace) as refused:
        ns.lens.direct(model, IDS, ns.logit_diff(7, {8, 9}), progress=False)
    (line,) = [line for line in str(refused.value).splitlines() if line.startswith("  write: ")]
    source = line.removeprefix("  write: ").partition("   (")[0]
    parts = ns.lens.direct(model, IDS, eval(source), progress=False)
    with torch.no_grad():
        logits = unwrap(model)(IDS).logits[0, -1]
    expected = float(logits[7] - (logits[8] + logits[9]) / 2)
    assert parts.clean[0] == pytest.approx(expected, abs=1e-5)
    assert parts.table.values.sum() + parts.rest.sum() == pytest.approx(expected, abs=1e-5)
    with pytest.raises(RefusedPlace, match=r"logits\[:, \[answer, ...\]\]"):  # prompts with tokens of their own
        ns.lens.direct(model, IDS.repeat(2, 1), ns.logit_diff([7, 6], [{8, 9}, {3, 4}]), progress=False)


@pytest.mark.parametrize("norm", [nn.LayerNorm(7), nn.LayerNorm(8, bias=False), nn.RMSNorm(8)])
def test_a_norm_is_measured(norm: nn.Module) -> None:
    width = int(next(norm.parameters()).shape[0])
    norm = norm.double()
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.normal_()
    states, towards = torch.randn(3, width, dtype=torch.float64), torch.randn(3, width, dtype=torch.float64)
    with torch.no_grad():
        frozen = FrozenNorm.of(norm, "norm", states, norm(states))
        value = (frozen.pulled_back(towards) * states).sum(-1) + frozen.constant(towards)
        torch.testing.assert_close(value, (norm(states) * towards).sum(-1))
    assert frozen.centres == isinstance(norm, nn.LayerNorm) and float(frozen.rounding.abs().max()) < 1e-12


def test_what_is_no_norm_is_refused() -> None:
    states = torch.randn(3, 8, dtype=torch.float64)
    with pytest.raises(RefusedPlace, match="no norm"):
        FrozenNorm.of(Bent(), "bent", states, Bent()(states))


def test_a_stream_with_something_more_in_it_is_refused() -> None:
    """A hook adds to what leaves a layer, which no branch has added."""
    model = wrap("llama")
    root: Any = unwrap(model)

    def more(_: Any, __: Any, out: Any) -> Any:
        return (out[0] + 0.1, *out[1:]) if isinstance(out, tuple) else out + 0.1

    with hooks(root.model.layers[0].register_forward_hook(more)), pytest.raises(RefusedPlace):
        ns.lens.direct(model, IDS, DIFF)
