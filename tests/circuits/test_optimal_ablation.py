"""Trained constants: what is minimised is what runs measure, and where the optimum is known, it is found."""

from __future__ import annotations

import inspect
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import nnsplice as ns
from attribution.oracle import bare, ids
from attribution.test_nodes import linear
from circuits.test_running import drawn, graph_of
from nnsplice.circuits.training import TrainingOptions
from zoo import double, wrap

CLEAN = ["w3 w4 w5 w6 w8", "w3 w9 w5 w16 w7", "w21 w4 w22", "w11 w4 w5 w6 w8", "w3 w9 w12"]
METRIC = ns.logit_diff("w7", "w8")


def trained(model: Any, circuit: ns.Circuit, clean: Any = CLEAN, **options: Any) -> ns.OptimalAblation:
    return ns.optimal_ablation(model, circuit, clean, **{"progress": False, "steps": 30, **options})


def divergence(model: Any, circuit: ns.Circuit, rows: Any, ablation: Any, position: int = -1) -> float:
    """As a run of its own tells it, in which nothing is tied to anything."""
    clean = [CLEAN[row] for row in rows]
    run = circuit.run(model, clean, None, ns.kl_divergence().at(position), ablation=ablation)
    return float(run.mean())


def without(model: Any, *nodes: str) -> ns.Circuit:
    shape = ns.Circuit.full(model).shape
    assert shape is not None
    return ns.Circuit.of(nodes=[str(s) for s in shape.senders if str(s) not in nodes], model=model)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "olmo2", "gptj", "qwen3", "mixtral"])
@pytest.mark.parametrize("kind", ["edges", "nodes"])
def test_what_training_minimises_is_what_a_run_measures(family: str, kind: str) -> None:
    model = double(family)
    circuit = ns.Circuit.of(edges=drawn(graph_of(model), 0.5, seed=3))
    if kind == "nodes":
        circuit = without(model, "layers[0].heads[1]", "layers[1].mlp", "layers[2].heads[0]")
    constants = trained(model, circuit, steps=8)
    told = constants.training
    assert len(told.trained_on) == 4 and len(told.held_out) == 1
    allowed = 1e-6 if family not in ("gpt2", "gptj") else 1e-10
    near: dict[str, Any] = {"rtol": 0, "atol": allowed}
    assert told.held_out_divergence is not None
    np.testing.assert_allclose(divergence(model, circuit, told.trained_on, constants), told.divergence, **near)
    np.testing.assert_allclose(divergence(model, circuit, told.held_out, constants), told.held_out_divergence, **near)
    assert told.divergence < told.mean_divergence == told.history[0]


def test_it_begins_at_the_means_and_is_never_worse_on_what_it_is_trained_on() -> None:
    model = double("llama")
    circuit = ns.Circuit.of(edges=drawn(graph_of(model), 0.6, seed=1))
    for lr in (0.05, 50.0):  # the second jumps about
        told = trained(model, circuit, lr=lr, steps=5, reference=CLEAN[:3]).training
        clean = [CLEAN[row] for row in told.trained_on]
        means = circuit.run(model, clean, None, ns.kl_divergence(), ablation="mean", reference=CLEAN[:3])
        np.testing.assert_allclose(told.mean_divergence, means.mean(), rtol=0, atol=1e-7)
        assert told.divergence <= told.mean_divergence
        assert told.divergence == min([*told.history, told.divergence])


def full_logits(module: Any) -> Tensor:
    with torch.no_grad():
        return torch.stack([module(ids(text)).logits[0, -1] for text in CLEAN])


def test_without_anything_the_best_answer_is_found_that_a_constant_can_give() -> None:
    """Of a straight line without a circuit the answer is one vector of logits, W c + b: convex, so found by LBFGS."""
    model = linear()
    module = model._module
    logits = full_logits(module)
    with torch.no_grad():
        weight = module.lm_head.weight
    stream = torch.zeros(weight.shape[1], dtype=torch.float64, requires_grad=True)
    best = minimised(logits, lambda: (stream @ weight.T).expand_as(logits), [stream])
    told = trained(model, ns.Circuit.empty(model), held_out=0.0, steps=400).training
    assert told.held_out == () and told.mean_held_out is None
    np.testing.assert_allclose(told.divergence, best, rtol=0, atol=1e-4)
    assert told.mean_divergence > best + 1e-2


def test_without_one_mlp_the_best_constant_for_it_is_found() -> None:
    """The last MLP of a straight line adds to the logits alone: logits without it, and W c."""
    model = linear()
    module = model._module
    logits = full_logits(module)
    last = module.transformer.h[2].mlp
    added: list[Tensor] = []
    hook = last.register_forward_hook(lambda _m, _a, out: added.append(out[0, -1]))
    full_logits(module)
    hook.remove()
    with torch.no_grad():
        weight = module.lm_head.weight
        rest = logits - torch.stack(added) @ weight.T
    constant = torch.zeros(weight.shape[1], dtype=torch.float64, requires_grad=True)
    best = minimised(logits, lambda: rest + constant @ weight.T, [constant])
    constants = trained(model, without(model, "layers[2].mlp"), held_out=0.0, steps=150)
    assert constants.senders == ("layers[2].mlp",)
    np.testing.assert_allclose(constants.training.divergence, best, rtol=0, atol=1e-4)
    assert constants.training.mean_divergence > best + 1e-3


def minimised(full: Tensor, answer: Any, variables: list[Tensor]) -> float:
    p = full.softmax(-1)
    optimiser = torch.optim.LBFGS(variables, max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        return (p * (p.log() - answer().log_softmax(-1))).sum(-1).mean()

    def closure() -> Tensor:
        optimiser.zero_grad()
        value = loss()
        value.backward()
        return value

    optimiser.step(closure)
    return float(loss().detach())


def test_only_what_is_read_somewhere_is_trained() -> None:
    model = double("gpt2")
    constants = trained(model, without(model, "layers[1].heads[2]", "layers[2].mlp"), steps=4)
    assert constants.senders == ("layers[1].heads[2]", "layers[2].mlp")
    means = ns.capture(model, CLEAN[0], "layers[0].mlp.output[:]")  # for the width alone
    one = ns.Circuit.of(nodes=["embed"], model=model)
    others = trained(model, one, steps=4)
    assert len(others.senders) == 15 and constants.values.rows == 1
    start = trained(model, without(model, "layers[2].mlp"), steps=1, lr=1e-30)
    same = constants.values.get("layers[0].mlp") - start.values.get("layers[0].mlp")
    assert same.shape[-1] == means["layers[0].mlp.output[0]"].shape[-1] and float(same.abs().max()) == 0.0
    moved = constants.values.get("layers[1].heads[2]") - start.values.get("layers[1].heads[2]")
    assert float(moved.abs().max()) > 1e-4


def test_a_run_that_trains_is_the_run_with_what_is_trained_and_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = double("gpt2")
    circuit = ns.Circuit.of(edges=drawn(graph_of(model), 0.4, seed=9))
    # Both train as long where nobody says how long; here a few steps are enough.
    told = inspect.signature(ns.optimal_ablation).parameters
    assert {name: told[name].default for name in asdict(TrainingOptions())} == asdict(TrainingOptions())
    monkeypatch.setattr("nnsplice.circuits.measuring.TrainingOptions", lambda: TrainingOptions(steps=20))
    run = circuit.run(model, CLEAN, None, METRIC, ablation="optimal")
    constants = trained(model, circuit, steps=20)
    np.testing.assert_array_equal(circuit.run(model, CLEAN, None, METRIC, ablation=constants), run)
    constants.to_file(tmp_path / "constants.safetensors")
    read = ns.OptimalAblation.from_file(tmp_path / "constants.safetensors")
    np.testing.assert_array_equal(circuit.run(model, CLEAN, None, METRIC, ablation=read), run)
    assert read.training == constants.training and read.senders == constants.senders
    assert read.provenance == constants.provenance and read.provenance["circuit"] == circuit.digest
    assert "held out" in repr(read)
    assert abs(run - circuit.run(model, CLEAN, None, METRIC, ablation="mean")).max() > 1e-3


def test_the_prompts_held_out_are_drawn_with_the_seed() -> None:
    model = double("gpt2")
    circuit = without(model, "layers[1].mlp")
    one, same, other = (trained(model, circuit, steps=2, seed=seed, held_out=0.4) for seed in (0, 0, 1))
    assert one.training == same.training and one.training.held_out != other.training.held_out
    assert sorted((*one.training.trained_on, *one.training.held_out)) == list(range(5))


def test_another_position_and_batches_of_a_few_tokens() -> None:
    model = double("llama")
    circuit = ns.Circuit.of(edges=drawn(graph_of(model), 0.5, seed=2))
    whole = trained(model, circuit, steps=5, position=1)
    small = trained(model, circuit, steps=5, position=1, max_tokens=1)
    np.testing.assert_allclose(whole.training.history, small.training.history, rtol=0, atol=1e-9)
    rows = whole.training.trained_on
    np.testing.assert_allclose(divergence(model, circuit, rows, whole, 1), whole.training.divergence, rtol=0, atol=1e-6)


def test_results_say_how_each_circuits_constants_did(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nnsplice.circuits.measuring.TrainingOptions", lambda: TrainingOptions(steps=3))
    model = double("llama")
    circuits = {"a": without(model, "layers[1].mlp"), "b": ns.Circuit.of(nodes=["embed"], model=model)}
    swept = ns.sweep_circuits(model, circuits, CLEAN, None, METRIC, ablation="optimal", progress=False)
    assert "optimal ablation: divergence" in swept.run.note and "mean of 3 circuits" in swept.run.note
    alone = circuits["a"].run(model, CLEAN, None, METRIC, ablation="optimal")
    np.testing.assert_allclose(swept.table.values[:, 0], alone, rtol=0, atol=1e-12)
    with pytest.warns(UserWarning, match="say little"):
        report = ns.faithfulness(model, circuits["b"], CLEAN, None, METRIC, ablation="optimal", progress=False)
    np.testing.assert_allclose(report.values[:, 0], swept.table.values[:, 1], rtol=0, atol=1e-12)
    assert (
        "say little" in report.run.note
        and "on 1 held out" in report.run.note
        and "optimal" in str(swept.asked["ablation"])
    )


def test_no_gradient_is_left_on_the_model() -> None:
    model = double("gpt2")
    flags = [p.requires_grad for p in model._module.parameters()]
    trained(model, without(model, "layers[1].mlp"), steps=2)
    assert [p.requires_grad for p in model._module.parameters()] == flags
    assert all(p.grad is None for p in model._module.parameters())


def test_with_float32_and_half_precision_it_finds_less_but_finds() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = wrap("gpt2")
        model._module.to(dtype)
        told = trained(model, without(model, "layers[0].mlp"), steps=20).training
        assert told.divergence < told.mean_divergence


def test_mistakes_are_answered(tmp_path: Path) -> None:
    model, error = double("gpt2"), ns.errors.NnspliceError
    circuit = without(model, "layers[1].mlp")
    for given, match in (
        ({"steps": 0}, "steps=0"), ({"lr": 0.0}, "lr=0.0"), ({"held_out": 1.0}, "held_out=1.0"),
        ({"position": 7}, "7"),
    ):  # fmt: skip
        with pytest.raises(error, match=match):
            trained(model, circuit, **given)
    with pytest.raises(error, match="is no circuit"):
        trained(model, "layers[0].mlp")  # type: ignore[arg-type]
    with pytest.raises(error, match="multiplies what mlp adds"):
        trained(double("granite"), ns.Circuit.of(nodes=["embed"]))
    pair = CLEAN[0], CLEAN[1]
    with pytest.raises(error, match="would train constants for each"):
        ns.acdc(model, *pair, METRIC, threshold=0.1, ablation="optimal")
    with pytest.raises(error, match="would train constants for each"):
        ns.minimality(model, circuit, *pair, METRIC, ablation="optimal")
    constants = trained(model, circuit, steps=1)
    with pytest.raises(error, match="other weights"):
        circuit.on(linear()).run(linear(), CLEAN, None, METRIC, ablation=constants)
    ns.capture(model, "w3 w4", "layers[0].output[-1]").to_file(tmp_path / "other.safetensors")
    with pytest.raises(error, match="without a word about training"):
        ns.OptimalAblation.from_file(tmp_path / "other.safetensors")
    with pytest.raises(error, match=r"only ablation=\"mean\" and \"optimal\""):
        circuit.run(model, *pair, METRIC, ablation="zero", reference=CLEAN)


def test_the_bare_models_run_with_the_constants_written_over_a_node_is_the_run() -> None:
    model, module = double("gpt2"), bare("gpt2")
    constants = trained(model, without(model, "layers[1].mlp"), steps=5)
    value = constants.values.get("layers[1].mlp")[0, 0]
    module.transformer.h[1].mlp.register_forward_hook(lambda _m, _a, out: value.expand_as(out))
    logits = full_logits(module)
    found = without(model, "layers[1].mlp").run(model, CLEAN, None, METRIC, ablation=constants)
    np.testing.assert_allclose(found, (logits[:, 7] - logits[:, 8]).numpy(), rtol=0, atol=1e-10)
