"""Scores of sites equal hand-written gradients, are exact on a straight line, and zero where nothing differs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import nnsplice as ns
from attribution.oracle import Point, bare, ends, ids, logit_diff, worth
from nnsplice.activations.access import site_of
from zoo import FAMILIES, MASKED, SEQ2SEQ, double, having, wrap

CLEAN, CORRUPTED = "w3 w4 w5 w6 w7", "w3 w9 w5 w16 w7"
METRIC = ns.logit_diff("w7", "w8")
SITES = (
    "embed.output", "layers[:].output", "layers[:].mid", "layers[:].attn.output", "layers[:].mlp.output",
    "layers[:].heads[:].output", "layers[:].heads[:].q", "layers[:].groups[:].k", "layers[:].groups[:].v",
    "layers[:].neurons[3,5].output",
)  # fmt: skip
DECODERS = [family for family in FAMILIES if family not in (*SEQ2SEQ, *MASKED)]


def attribute(model: Any, sites: Any, method: str = "atp", **options: Any) -> Any:
    """On the tests' pair."""
    return ns.attribute(model, CLEAN, CORRUPTED, sites, METRIC, method=method, progress=False, **options)


def scores(result: ns.SweepResult) -> np.ndarray:
    """What was added to the corrupted run's metric."""
    return (result.table.values - result.corrupted[:, None])[0]


def linear() -> Any:
    """A GPT-2 that is a straight line: norms and activations that do nothing, attention that looks everywhere alike."""
    model = double("gpt2")
    for block in model._module.transformer.h:
        block.ln_1, block.ln_2, block.mlp.act = nn.Identity(), nn.Identity(), nn.Identity()
        with torch.no_grad():
            block.attn.c_attn.weight[:, :32] = 0.0
            block.attn.c_attn.bias[:32] = 0.0
    model._module.transformer.ln_f = nn.Identity()
    return ns.load(model._module.eval(), tokenizer=model.tokenizer)


# --- against hand-written gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", DECODERS)
def test_atp_is_difference_times_gradient(family: str) -> None:
    model, module = double(family), bare(family)
    sites = having(model, SITES)
    assert len(sites) >= 6
    paths = [path for path in ns.expand(model, sites) if site_of(path).kind == "plain"]
    points = {path: Point(site_of(path).module, site_of(path).end, site_of(path).columns) for path in paths}
    if family == "falcon":  # it adds attention into the MLP's own output, which a hook then sees
        points = {path: point for path, point in points.items() if "mlp.output" not in str(path)}
    expected = worth(module, ids(CLEAN), ids(CORRUPTED), list(dict.fromkeys(points.values())))
    result = attribute(model, sites)
    found = dict(zip((cell.path for cell in result.cells), scores(result), strict=True))
    assert len(points) > 20
    for path, point in points.items():
        for token in range(5):
            assert abs(found[str(path.at(token))] - float(expected[point][token].detach())) < 1e-12, path
    assert max(map(abs, found.values())) > 1e-3


@pytest.mark.parametrize("family", ["gpt2", "llama", "mixtral", "t5", "bert", "bart"])
def test_a_small_step_towards_the_clean_value_moves_the_metric_as_far(family: str) -> None:
    """Finite differences, through sweeps with an operation that goes a little of the way."""
    model = double(family)
    prefix = "encoder." if family in SEQ2SEQ else ""
    sites = [f"{prefix}layers[1].output", f"{prefix}layers[1].mlp.output[1,3]"]
    result = attribute(model, sites)
    # Not smaller: Llama's norm computes in single precision, whatever the model's.
    step, places = 1e-2, [f"{prefix}layers[1].output[:]", f"{prefix}layers[1].mlp.output[1,3]"]
    way = ns.capture(model, CLEAN, places) - ns.capture(model, CORRUPTED, places)
    ahead, behind = (
        ns.sweep(
            model, None, CORRUPTED, sites, METRIC, operation="add", reference=way * factor, progress=False
        ).table.values[0]
        for factor in (step, -step)
    )
    slope = (ahead - behind) / (2 * step)
    assert np.abs(slope - scores(result)).max() < 1e-3 * np.abs(slope).max()
    assert np.abs(slope).max() > 1e-2


@pytest.mark.parametrize("family", ["gpt2", "opt", "gpt_neox", "qwen2", "t5"])
def test_ig_of_the_embeddings_adds_up_to_the_whole_difference(family: str) -> None:
    model = double(family)
    site = "encoder.embed" if family in SEQ2SEQ else "embed"
    errors = []
    for steps in (1, 8, 64):
        result = attribute(model, site, "ig", steps=steps)
        errors.append(abs(scores(result).sum() - result.total_effect[0]))
    kinks = {"opt": 0.05, "t5": 0.1}  # their activation has corners, which points on the way may miss
    assert errors[2] < kinks.get(family, 1e-3) * errors[0] and errors[2] < errors[1] < errors[0], errors


def test_ig_is_the_mean_gradient_at_gauss_and_legendres_points() -> None:
    model, module = double("llama"), bare("llama")
    clean, corrupted = (module.model.embed_tokens(ids(text)).detach() for text in (CLEAN, CORRUPTED))
    point = Point("model.layers.1.mlp")
    at, weights = np.polynomial.legendre.leggauss(3)
    expected = torch.zeros(5, dtype=torch.float64)
    for x, weight in zip(at, weights, strict=True):
        entering = corrupted + (clean - corrupted) * (x + 1) / 2
        more = [(Point("model.embed_tokens"), lambda out, e=entering: e)]
        # The oracle's values come from runs as they are, its gradient from the run with other embeddings.
        expected += worth(module, ids(CLEAN), ids(CORRUPTED), [point], more)[point].detach() * weight / 2
    result = attribute(model, "layers[1].mlp", "ig", steps=3)
    assert np.abs(scores(result) - expected.numpy()).max() < 1e-12


# --- exact cases ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "options"), [("atp", {}), ("ig", {"steps": 1})])
def test_on_a_straight_line_the_estimate_is_the_exact_effect(method: str, options: dict) -> None:
    model = linear()
    sites = ["embed", "layers[:].output", "layers[:].attn", "layers[:].mlp", "layers[:].heads[:]",
             "layers[:].groups[:].v", "layers[:].neurons[0,7]"]  # fmt: skip
    exact = ns.sweep(model, CLEAN, CORRUPTED, sites, METRIC, progress=False)
    result = attribute(model, sites, method, **options)
    assert [cell.path for cell in result.cells] == [cell.path for cell in exact.cells]
    assert np.abs(result.table.values - exact.table.values).max() < 1e-11
    assert np.abs(result.effect("layers[:].output") - exact.effect("layers[:].output")).max() < 1e-10
    assert np.ptp(exact.table.values) > 1e-2


SAME = "the corrupted prompts are the clean ones, so nothing can differ"


@pytest.mark.parametrize("method", ["atp", "atp*", "ig", "eap", "eap-ig"])
def test_identical_inputs_give_exactly_zero(method: str) -> None:
    sites = ["embed", "layers[:].heads[:]"] if "eap" in method else ["embed", "layers[:].heads[:].q", "layers[:].mlp"]
    for family in ("gpt2", "mixtral"):
        with pytest.warns(UserWarning, match=SAME):
            result: Any = ns.attribute(wrap(family), CLEAN, CLEAN, sites, METRIC, method=method, progress=False)
        assert (result.table.values == result.corrupted[:, None]).all()
        if "eap" in method:
            assert (result.edges()["score"] == 0.0).all() and len(result.edges()) > 50


@pytest.mark.parametrize(("family", "align"), [("gpt2", "position"), ("llama", "end"), ("bert", "position")])
def test_identical_inputs_are_known_zeros_in_sweeps_paths_and_estimates(family: str, align: str) -> None:
    model, sites = wrap(family), ["layers[:].heads[:]", "layers[:].output"]
    options: Any = {"align": align, "progress": False}
    paths = [lambda: ns.path_patch(model, CLEAN, CLEAN, sites, "unembed", METRIC, **options)]
    asked = [
        lambda: ns.sweep(model, CLEAN, CLEAN, sites, METRIC, **options),
        lambda: ns.attribute(model, CLEAN, CLEAN, sites, METRIC, **options),
        *(paths if family != "bert" else []),
    ]
    for ask in asked:
        with pytest.warns(UserWarning, match=SAME):
            result = ask()
        assert result.run.known == int(result.table.exists.sum())
        assert (result.table.values == result.corrupted[:, None])[result.table.exists].all()
    # One pair that is the same among others that differ is no mistake.
    clean, corrupted = [CLEAN, CLEAN], [CORRUPTED, CLEAN]
    result = ns.sweep(model, clean, corrupted, sites, METRIC, **options)
    assert (result.table.values[-1] == result.corrupted[-1])[result.table.exists[-1]].all()
    assert (result.table.values[0] != result.corrupted[0]).any()


@pytest.mark.parametrize("method", ["atp", "atp*", "ig", "eap", "eap-ig"])
def test_dropout_is_an_error(method: str) -> None:
    model = wrap("gpt2")
    model._module.train()
    with pytest.raises(ns.errors.BadArgument, match="train mode, so dropout"):
        attribute(model, "layers[:].heads[:]", method)


@pytest.mark.parametrize("method", ["atp", "atp*", "ig"])
def test_a_tied_embedding_changes_nothing(method: str) -> None:
    tied = double("gpt2")
    assert ns.Atlas.of(tied).tied
    untied = double("gpt2")
    module = untied._module
    module.lm_head.weight = nn.Parameter(module.transformer.wte.weight.detach().clone())
    untied = ns.load(module, tokenizer=tied.tokenizer)
    assert not ns.Atlas.of(untied).tied
    sites = ["embed", "layers[:].output", "layers[:].heads[:].q"]
    values = [attribute(model, sites, method).table.values for model in (tied, untied)]
    assert np.abs(values[0] - values[1]).max() < 1e-14


@pytest.mark.parametrize("method", ["atp", "atp*", "ig"])
def test_bfloat16_agrees_within_its_own_precision(method: str) -> None:
    model = wrap("llama")
    sites = ["layers[:].output", "layers[:].heads[:]", "layers[:].groups[:].k"]
    exact = scores(attribute(model, sites, method))
    model._module.bfloat16()
    rough = scores(attribute(model, sites, method))
    assert 0 < np.abs(rough - exact).max() < 0.05 * np.abs(exact).max()


def test_groups_of_grouped_queries_are_what_their_heads_read() -> None:
    """The value of a group is worth what the heads that read it lose: checked against a hook on the projection."""
    model, module = double("llama"), bare("llama")
    result = attribute(model, "layers[:].groups[:].v")
    assert result.grid().sizes["group"] == 2
    for layer in range(3):
        for group in range(2):
            point = Point(f"model.layers.{layer}.self_attn.v_proj", columns=(6 * group, 6 * group + 6))
            expected = worth(module, ids(CLEAN), ids(CORRUPTED), [point])[point].detach().numpy()
            found = result.grid().sel(prompt=0, layer=layer, group=group).values - result.corrupted[0]
            assert np.abs(found - expected).max() < 1e-12


# --- what it leaves behind, and what it takes -------------------------------------------------------------------------


def test_one_backward_and_two_forward_passes() -> None:
    result = attribute(double("gpt2"), list(SITES))
    assert result.run.executor == "atp" and result.run.forwards == 2
    assert "2 forward passes and 1 backward pass" in result.run.note
    assert "1 backward pass" in attribute(double("gpt2"), "layers[:].heads[:]", "eap").run.note
    assert "4 backward passes" in attribute(double("gpt2"), "layers[:].heads[:]", "atp*").run.note


@pytest.mark.parametrize("method", ["atp", "atp*", "ig", "eap", "eap-ig"])
def test_the_model_is_as_it_was(method: str) -> None:
    model = double("llama")
    for number, parameter in enumerate(model._module.parameters()):
        parameter.requires_grad_(number % 2 == 0)
    before = ends(model._module, ids(CORRUPTED))
    config = model._module.config._attn_implementation
    with torch.no_grad():
        result = attribute(model, ["embed", "layers[:].heads[:]"], method)
    assert [p.requires_grad for p in model._module.parameters()] == [
        n % 2 == 0 for n, _ in enumerate(model._module.parameters())
    ]
    assert all(parameter.grad is None for parameter in model._module.parameters())
    assert ends(model._module, ids(CORRUPTED)) == before and model._module.config._attn_implementation == config
    assert np.isfinite(result.table.values).all()


def test_the_flags_come_back_when_it_fails() -> None:
    model = double("llama")
    with pytest.raises(ns.errors.BadArgument, match="has no gradient"):
        ns.attribute(model, CLEAN, CORRUPTED, "layers[:].output", ns.rank("w7"), progress=False)
    assert all(parameter.requires_grad for parameter in model._module.parameters())


def test_prompts_of_several_lengths_and_small_batches_are_each_as_alone() -> None:
    model = double("llama")
    clean, corrupted = [CLEAN, "w13 w14 w15", "w23 w24 w25"], [CORRUPTED, "w13 w24 w15", "w23 w14 w25"]
    for method in ("atp", "atp*", "ig"):
        args = (clean, corrupted, ["layers[:].output", "layers[:].heads[:].q"], METRIC)
        together: Any = ns.attribute(model, *args, method=method, progress=False).frame()
        small: Any = ns.attribute(model, *args, method=method, max_tokens=3, progress=False).frame()
        assert np.abs(together["value"] - small["value"]).max() < 1e-12
        alone: Any = ns.attribute(model, clean[2], corrupted[2], *args[2:], method=method, progress=False).frame()
        here = together[together["prompt"] == 2].set_index("path")["value"]
        assert np.abs(here[alone["path"]].to_numpy() - alone["value"].to_numpy()).max() < 1e-12


def test_pairs_of_other_lengths_are_aligned_at_the_end_or_by_spans() -> None:
    model, module = double("llama"), bare("llama")
    clean, corrupted = "w3 w4 w5 w6 w7", "w9 w5 w6 w7"
    result = ns.attribute(model, clean, corrupted, "layers[1].output", METRIC, align="end", progress=False)
    there = ns.capture(model, clean, "layers[1].output[:]").get("layers[1].output")[0]
    live: list[torch.Tensor] = []
    hook = module.model.layers[1].register_forward_hook(lambda _m, _a, out: live.append(out))
    (gradient,) = torch.autograd.grad(logit_diff(module, ids(corrupted)), live)
    hook.remove()
    expected = ((there[1:] - live[0][0]) * gradient[0]).sum(-1).detach().numpy()
    assert np.abs(scores(result) - expected).max() < 1e-12
    spans = {"clean": {"s": "w4 w5"}, "corrupted": {"s": "w9 w5"}}
    spanned = ns.attribute(
        model, clean, corrupted, 'layers[1].output["s"][-1]', METRIC, align="end", spans=spans, progress=False
    )
    assert abs(scores(spanned)[0] - expected[1]) < 1e-12
    for method in ("ig", "atp*"):
        with pytest.raises(ns.errors.NnspliceError, match="prompts of one length"):
            ns.attribute(
                model, clean, corrupted, "layers[1].heads[0].q", METRIC, align="end", method=method, progress=False
            )


def test_a_metric_that_compares_and_reads_elsewhere() -> None:
    model = double("llama")
    sites, metric = "layers[:].output[0:4]", ns.kl_divergence(position=3)
    result = ns.attribute(model, CLEAN, CORRUPTED, sites, metric, progress=False)
    exact = ns.sweep(model, CLEAN, CORRUPTED, sites, metric, progress=False)
    assert result.clean == pytest.approx(exact.clean, abs=1e-14)
    assert result.corrupted == pytest.approx(exact.corrupted, abs=1e-12)
    assert np.corrcoef(result.table.values[0], exact.table.values[0])[0, 1] > 0.5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "atp-star"}, "there is no method"),
        ({"method": "atp", "steps": 3}, "takes no steps"),
        ({"method": "ig", "steps": 0}, "steps=0"),
        ({"method": "ig", "receivers": "unembed"}, "scores sites, so receivers"),
        ({"verify": -1}, "verify=-1"),
        ({"sites": "layers[1].heads[0].pattern[-1]"}, "derived from several values"),
        ({"method": "eap", "sites": "layers[1].heads[0].q"}, "adds nothing by itself"),
        ({"method": "eap", "sites": "layers[2].mlp", "receivers": "layers[1].mlp"}, "no edge between them"),
        ({"method": "eap", "receivers": []}, "no receivers"),
    ],
)
def test_mistakes_are_answered(options: dict, words: str) -> None:
    with pytest.raises(ns.errors.NnspliceError, match=words):
        attribute(double("gpt2"), **{"sites": "layers[:].mlp", **options})


@pytest.mark.parametrize("family", ["gpt_neo", "bloom", "falcon_mha"])
def test_attention_that_keeps_its_probabilities_to_itself_is_refused_for_queries_and_not_else(family: str) -> None:
    model = double(family)
    with pytest.raises(ns.errors.BadArgument, match="see the probabilities"):
        attribute(model, "layers[:].heads[:].q", "atp*")
    assert np.ptp(attribute(model, ["layers[:].mlp", "layers[:].heads[:]"], "atp*").table.values) > 1e-4


def test_pairs_by_role_have_the_gradients_of_their_own_tokens() -> None:
    """At the last layer's last token nothing but a norm follows, and the estimate of a small step is the sweep's."""
    clean, corrupted = "w3 w4 w5 w6 w7 w9 w10", "w13 w11 w14 w15 w16 w17 w6 w9 w20"
    spans = {"clean": {"subject": (1, 3)}, "corrupted": {"subject": (2, 6)}}
    options: Any = {"spans": spans, "align": "role", "progress": False}
    model, sites = double("gpt2"), ["final_norm.output[-1]", "layers[:].output[:]"]
    result = ns.attribute(model, clean, corrupted, sites, METRIC, **options)
    exact = ns.sweep(model, clean, corrupted, sites, METRIC, **options)
    assert (result.table.exists == exact.table.exists).all() and result.table.exists.sum() == 1 + 3 * 4
    norm = [cell.path for cell in result.cells].index("final_norm.output[-1]")
    assert abs(result.table.values[0, norm] - exact.table.values[0, norm]) < 1e-11
    assert abs(exact.table.values[0, norm] - exact.corrupted[0]) > 1e-2
    for method in ("ig", "atp*", "eap"):
        with pytest.raises(ns.errors.BadArgument, match="token by token"):
            ns.attribute(model, clean, corrupted, "layers[:].heads[:]", METRIC, method=method, **options)


@pytest.mark.parametrize(
    ("sites", "method", "told"),
    [
        ("layers[:].output[:]", "atp", True), ("layers[1].input[-1]", "atp", True), ("embed.output[:]", "atp", True),
        (["layers[:].heads[:]", "layers[0].mid"], "atp", True), ("layers[:].output[:]", "ig", False),
        ("layers[:].heads[:]", "atp", False), ("layers[:].mlp.output", "atp", False),
    ],
)  # fmt: skip
def test_a_rough_guess_says_so(sites: Any, method: str, told: bool) -> None:
    result = attribute(wrap("gpt2"), sites, method)
    assert ("rough guess for the residual stream" in result.run.note) == told
    assert ("rough guess" in repr(result)) == told


def test_a_span_of_several_tokens_is_worth_what_its_tokens_are_worth_together() -> None:
    """One gradient is linear in what changes, so a cell of two tokens is the sum of their cells."""
    model, pair = double("llama"), ("w3 w4 w5 w6", "w3 w9 w12 w6")
    site = "layers[1].mlp.output"
    both = ns.attribute(model, *pair, f'{site}["s"]', METRIC, progress=False, spans={"s": (1, 3)})
    each = ns.attribute(model, *pair, f"{site}[1:3]", METRIC, progress=False)
    assert both.table.values.shape == (1, 1) and each.table.values.shape == (1, 2)
    np.testing.assert_allclose(both.change().values.sum(), each.change().values.sum(), rtol=0, atol=1e-12)
    assert abs(each.change().values).min() > 1e-9
