"""A circuit's run is what hooks, and sums written out by hand, make of it: on every family, in float64."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

import nnsplice as ns
from attribution.oracle import bare, ids
from circuits.oracle import ByHand, Graph, by_hooks, nodes_by_hooks, recorded
from nnsplice.circuits.wiring import wiring_of
from zoo import FAMILIES, MASKED, SEQ2SEQ, double, wrap

CLEAN, CORRUPTED = "w3 w4 w5 w6 w8", "w3 w9 w5 w16 w7"
METRIC = ns.logit_diff("w7", "w8")
#: All decoders of the zoo that have attention in every layer, and layers of their own.
DECODERS = [*(f for f in FAMILIES if f not in (*SEQ2SEQ, *MASKED)), "granite", "gpt_oss", "mpt", "cohere"]
families = pytest.mark.parametrize("family", DECODERS)


def near(found: Any, expected: Any, family: str = "gpt2") -> None:
    """Equal to 1e-10; where the family's norms round to float32, whatever its dtype, to 1e-7."""
    rounds = any("RMSNorm" in type(module).__name__ for module in bare(family).modules())
    np.testing.assert_allclose(found, expected, rtol=0.0, atol=1e-7 if rounds else 1e-10)


def graph_of(model: Any) -> Graph:
    shape = wiring_of(model).shape
    one = shape.layers[0]
    return Graph(model, len(shape.layers), one.heads, one.groups, one.parallel)


def drawn(graph: Graph, share: float, seed: int) -> set[tuple[str, str]]:
    rng = np.random.default_rng(seed)
    return {edge for edge in graph.edges() if rng.random() < share}


def value(module: Any, text: str) -> float:
    from attribution.oracle import ends

    return ends(module, ids(text))


@families
def test_all_edges_are_the_clean_run_and_none_the_corrupted_one(family: str) -> None:
    model, module = double(family), bare(family)
    full, empty = ns.Circuit.full(model), ns.Circuit.empty(model)
    near(full.run(model, CLEAN, CORRUPTED, METRIC), value(module, CLEAN), family)
    near(empty.run(model, CLEAN, CORRUPTED, METRIC), value(module, CORRUPTED), family)
    assert abs(value(module, CLEAN) - value(module, CORRUPTED)) > 1e-3  # or both would say nothing


@families
def test_the_graph_has_the_edges_that_the_order_of_execution_allows(family: str) -> None:
    model = double(family)
    graph = graph_of(model)
    assert {(str(s), str(r)) for s, r in ns.Circuit.full(model).edges} == set(graph.edges())


@families
@pytest.mark.parametrize("share", [0.3, 0.8])
def test_a_circuit_of_edges_is_what_hooks_make_of_it(family: str, share: float) -> None:
    model, module = double(family), bare(family)
    graph = graph_of(model)
    ablated = recorded(module, ids(CORRUPTED), graph)
    edges = drawn(graph, share, seed=len(family))
    expected = by_hooks(module, graph, ids(CLEAN), ablated, edges)
    found = ns.Circuit.of(edges=edges).run(model, CLEAN, CORRUPTED, METRIC)
    near(found, expected, family)
    assert abs(expected - value(module, CORRUPTED)) > 1e-6


@families
def test_with_zeros_a_circuit_of_edges_is_what_hooks_make_of_it(family: str) -> None:
    model, module = double(family), bare(family)
    graph = graph_of(model)
    ablated = {name: torch.zeros_like(tensor) for name, tensor in recorded(module, ids(CLEAN), graph).items()}
    edges = drawn(graph, 0.5, seed=7)
    expected = by_hooks(module, graph, ids(CLEAN), ablated, edges)
    found = ns.Circuit.of(edges=edges).run(model, CLEAN, None, METRIC, ablation="zero")
    near(found, expected, family)


@families
def test_without_one_edge_it_is_that_path_patched_from_the_other_side(family: str) -> None:
    model = double(family)
    full = ns.Circuit.full(model)
    some = [full.edges[n] for n in np.random.default_rng(3).choice(len(full), 6, replace=False)]
    for sender, receiver in some:
        patched = ns.path_patch(model, CORRUPTED, CLEAN, *_addresses(sender, receiver), METRIC, progress=False)
        without = full - ns.Circuit.of(edges=[(sender, receiver)])
        found = without.run(model, CLEAN, CORRUPTED, METRIC)
        near(found, patched.table.values[:, 0], family)


def _addresses(sender: Any, receiver: Any) -> tuple[str, Any]:
    return str(sender), str(receiver)


@families
def test_a_circuit_of_nodes_is_hooks_that_write_all_others(family: str) -> None:
    model, module = double(family), bare(family)
    graph = graph_of(model)
    ablated = recorded(module, ids(CORRUPTED), graph)
    rng = np.random.default_rng(5)
    nodes = {"embed", *(name for name in graph.senders if rng.random() < 0.6)}
    expected = nodes_by_hooks(module, graph, ids(CLEAN), ablated, nodes)
    found = ns.Circuit.of(nodes=nodes).run(model, CLEAN, CORRUPTED, METRIC)
    near(found, expected, family)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_circuit_is_the_sum_written_out_by_hand(family: str, share: float) -> None:
    model, module = double(family), bare(family)
    graph = graph_of(model)
    ablated = recorded(module, ids(CORRUPTED), graph)
    hand = ByHand(family, module)
    for seed in range(3):
        edges = drawn(graph, share, seed)
        found = ns.Circuit.of(edges=edges).run(model, CLEAN, CORRUPTED, METRIC)
        near(found, hand.run(ids(CLEAN), ablated, edges), family)
    np.testing.assert_allclose(
        hand.run(ids(CLEAN), ablated, set(graph.edges())), value(module, CLEAN), rtol=0, atol=1e-10
    )
    near(hand.run(ids(CLEAN), ablated, set()), value(module, CORRUPTED), family)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_a_mean_is_that_of_each_prompts_tokens_and_then_of_prompts(family: str) -> None:
    model, module = double(family), bare(family)
    graph = graph_of(model)
    reference = ["w3 w9 w5", "w12 w13 w14 w15 w16"]
    runs = [recorded(module, ids(text), graph) for text in reference]
    mean = {name: (runs[0][name].mean(1) + runs[1][name].mean(1)) / 2 for name in graph.senders}
    ablated = {name: one[:, None].expand(1, 5, -1) for name, one in mean.items()}
    edges = drawn(graph, 0.6, seed=1)
    circuit = ns.Circuit.of(edges=edges)
    expected = by_hooks(module, graph, ids(CLEAN), ablated, edges)
    for given, corrupted in ((reference, None), (None, reference)):
        found = circuit.run(model, CLEAN, corrupted, METRIC, ablation="mean", reference=given)
        near(found, expected, family)


def test_values_of_ones_own_are_taken_as_they_are() -> None:
    model, module = double("llama"), bare("llama")
    graph = graph_of(model)
    edges = drawn(graph, 0.6, seed=2)
    sites = ["embed.output[:]", "layers[:].heads[:].output[:]", "layers[:].mlp.output[:]"]
    saved = ns.capture(model, CORRUPTED, sites)
    circuit = ns.Circuit.of(edges=edges)
    as_patch = circuit.run(model, CLEAN, CORRUPTED, METRIC)
    near(circuit.run(model, CLEAN, None, METRIC, ablation=saved), as_patch)
    at_every_token = {
        name: t.mean(1, keepdim=True).expand_as(t) for name, t in recorded(module, ids(CORRUPTED), graph).items()
    }
    expected = by_hooks(module, graph, ids(CLEAN), at_every_token, edges)
    found = circuit.run(model, CLEAN, None, METRIC, ablation=saved.mean("position"))
    near(found, expected)
    assert abs(float(as_patch[0]) - expected) > 1e-4


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "gptj"])
def test_neither_the_order_of_prompts_nor_how_many_run_at_once_changes_anything(family: str) -> None:
    model = double(family)
    clean = [CLEAN, "w8 w4 w5", "w9 w4 w5 w6 w61", "w30 w31 w32"]
    corrupted = [CORRUPTED, "w3 w4 w9", "w3 w4 w5 w6 w8", "w30 w33 w32"]
    circuit = ns.Circuit.of(edges=drawn(graph_of(model), 0.5, seed=4))
    found = circuit.run(model, clean, corrupted, METRIC)
    alone = np.concatenate([circuit.run(model, a, b, METRIC) for a, b in zip(clean, corrupted, strict=True)])
    near(found, alone, family)
    turned = circuit.run(model, clean[::-1], corrupted[::-1], METRIC, max_tokens=5)
    near(turned[::-1], found, family)


def test_nothing_is_left_on_the_model() -> None:
    model = double("llama")
    module = model._module
    before = {name: dict(one.__dict__) for name, one in module.named_modules()}
    circuit = ns.Circuit.of(edges=drawn(graph_of(model), 0.5, seed=4))
    first = circuit.run(model, CLEAN, CORRUPTED, METRIC)
    with pytest.raises(RuntimeError, match="of my own"):
        circuit.run(model, CLEAN, CORRUPTED, ns.Metric.of(_raises))
    for name, one in module.named_modules():
        assert before[name].keys() == one.__dict__.keys(), name
        assert before[name].get("forward") is one.__dict__.get("forward"), name
        assert not one._forward_hooks and not one._forward_pre_hooks, name
    assert (circuit.run(model, CLEAN, CORRUPTED, METRIC) == first).all()


def _raises(logits: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("of my own")


def test_a_metric_that_compares_is_given_the_clean_runs_logits() -> None:
    model, module = double("gpt2"), bare("gpt2")
    with torch.no_grad():
        a, b = (module(ids(text)).logits[0, -1].log_softmax(-1) for text in (CLEAN, CORRUPTED))
    found = ns.Circuit.empty(model).run(model, CLEAN, CORRUPTED, ns.kl_divergence())
    np.testing.assert_allclose(found, float((a.exp() * (a - b)).sum()), rtol=0, atol=1e-10)
    near(ns.Circuit.full(model).run(model, CLEAN, CORRUPTED, ns.kl_divergence()), 0.0)


def test_a_metric_may_be_read_elsewhere_than_at_the_end() -> None:
    model, module = double("llama"), bare("llama")
    with torch.no_grad():
        logits = module(ids(CORRUPTED)).logits[0, 2]
    found = ns.Circuit.empty(model).run(model, CLEAN, CORRUPTED, METRIC.at(2))
    near(found, float(logits[7] - logits[8]))


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "gptj"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_in_a_smaller_dtype_it_is_the_same_but_for_rounding(family: str, dtype: torch.dtype) -> None:
    exact, small = double(family), wrap(family)
    small._module.to(dtype)
    circuit = ns.Circuit.of(edges=drawn(graph_of(exact), 0.5, seed=4))
    found, expected = (circuit.run(model, CLEAN, CORRUPTED, METRIC) for model in (small, exact))
    allowed = {torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float16: 0.02}[dtype]
    assert abs(found - expected).max() < allowed


def test_hooks_of_the_users_take_part() -> None:
    model, module = double("llama"), bare("llama")
    graph = graph_of(model)
    edges = drawn(graph, 0.7, seed=6)
    plain = ns.Circuit.of(edges=edges).run(model, CLEAN, CORRUPTED, METRIC)
    for one in (model._module, module):
        one.model.layers[1].self_attn.q_proj.register_forward_hook(lambda _m, _a, out: out * 1.5)
        one.model.layers[2].mlp.register_forward_hook(lambda _m, _a, out: out * 0.5)
    ablated = recorded(module, ids(CORRUPTED), graph)
    found = ns.Circuit.of(edges=edges).run(model, CLEAN, CORRUPTED, METRIC)
    near(found, by_hooks(module, graph, ids(CLEAN), ablated, edges), "llama")
    assert abs(found - plain).max() > 1e-3


@pytest.mark.parametrize("row", [0, -1])
def test_a_hook_of_the_users_that_tells_rows_apart_changes_every_circuit_as_it_does_one_alone(row: int) -> None:
    model, module = double("llama"), bare("llama")
    graph = graph_of(model)
    circuits = [drawn(graph, share, seed=number) for number, share in enumerate((0.4, 0.6, 0.8))]

    def steered(_m: Any, _a: Any, out: torch.Tensor) -> torch.Tensor:
        out = out.clone()
        out[row] += torch.linspace(-2, 3, out.shape[-1])
        return out

    for one in (model._module, module):
        one.model.layers[1].mlp.register_forward_hook(steered)
    clean, corrupted = [CLEAN, "w10 w4 w15 w6 w8"], [CORRUPTED, "w13 w9 w5 w16 w8"]
    expected = [
        [by_hooks(module, graph, ids(a), recorded(module, ids(b), graph), edges) for edges in circuits]
        for a, b in zip(clean, corrupted, strict=True)
    ]
    made = [ns.Circuit.of(edges=edges) for edges in circuits]
    near(ns.sweep_circuits(model, made, clean, corrupted, METRIC, progress=False).table.values, expected, "llama")


def test_a_hook_whose_variables_change_between_calls_is_looked_at_anew() -> None:
    model, share = double("llama"), [0.0]
    projection = model._module.model.layers[1].self_attn.o_proj
    projection.register_forward_hook(lambda _m, _a, out: out + share[0] * out.mean(1, keepdim=True))
    circuit = ns.Circuit.of(edges=drawn(graph_of(model), 0.7, seed=6))
    circuit.run(model, CLEAN, CORRUPTED, METRIC)
    share[0] = 0.5  # no head's output goes through the projection's weights alone any more
    with pytest.raises(ns.errors.RefusedPlace, match="a circuit of all edges gives other logits"):
        circuit.run(model, CLEAN, CORRUPTED, METRIC)


def test_an_adapter_takes_part() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj", "v_proj", "o_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    adapted = peft.get_peft_model(bare("llama"), config).double().eval()
    tokenizer = wrap("llama").tokenizer
    model = ns.load(adapted, tokenizer=tokenizer)
    edges = drawn(graph_of(double("llama")), 0.6, seed=8)
    found = ns.Circuit.of(edges=edges).run(model, CLEAN, CORRUPTED, METRIC)
    merged = ns.load(copy.deepcopy(adapted).merge_and_unload().eval(), tokenizer=tokenizer)
    near(found, ns.Circuit.of(edges=edges).run(merged, CLEAN, CORRUPTED, METRIC), "llama")
    assert abs(found - ns.Circuit.of(edges=edges).run(double("llama"), CLEAN, CORRUPTED, METRIC)).max() > 1e-3


class Leaking(torch.nn.Module):
    """An MLP that reads the layer's input too, past the stream that it is given."""

    def __init__(self, inner: torch.nn.Module, block: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.entered: list[torch.Tensor] = []
        block.register_forward_pre_hook(
            lambda _m, args, kwargs: self.entered.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.inner(states) + 0.1 * self.entered[-1]


def test_a_layer_that_reads_the_stream_past_its_edges_is_refused() -> None:
    model = double("gpt2")
    block = model._module.transformer.h[1]
    block.mlp = Leaking(block.mlp, block)
    with pytest.raises(ns.errors.NnspliceError):
        ns.Circuit.of(edges=[("embed", "unembed")]).run(model, CLEAN, CORRUPTED, METRIC)


@pytest.mark.parametrize("family", ["t5", "bert", "albert", "lfm2"])
def test_models_that_have_no_such_graph_are_refused_by_name(family: str) -> None:
    with pytest.raises(ns.errors.RefusedPlace):
        ns.Circuit.of(edges=[("embed", "unembed")]).run(wrap(family), CLEAN, CORRUPTED, METRIC)
