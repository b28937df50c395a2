"""Circuits whose senders are some tokens of a site, or an expert: what plain hooks make of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import nnsplice as ns
from attribution.oracle import bare, hooked, ids, logit_diff
from circuits.oracle import by_hooks, recorded, writing
from circuits.test_running import drawn, graph_of, near
from zoo import double

CLEAN, CORRUPTED = "w3 w4 w5 w6 w8", "w3 w9 w5 w16 w7"
METRIC = ns.logit_diff("w7", "w8")
families = pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "gptj", "olmo2"])


# --- tokens -----------------------------------------------------------------------------------------------------------


@families
def test_nodes_at_some_tokens_are_written_over_at_the_others(family: str) -> None:
    model, module = double(family), bare(family)
    graph = graph_of(model)
    there = recorded(module, ids(CORRUPTED), graph)
    tokens = {"embed": [1, 2, 3, 4], "layers[0].heads[2]": [3], "layers[1].heads[1]": [1, 4], "layers[1].mlp": [4]}
    whole = {"layers[2].heads[0]", "layers[0].mlp", "layers[2].mlp"}

    def keep(name: str) -> Any:
        def change(tensor: Tensor) -> Tensor:
            tensor = tensor.clone()
            outside = [t for t in range(5) if t not in tokens.get(name, [])]
            part = graph.points[name].part(tensor)
            part[:, outside] = there[name][:, outside].reshape(part[:, outside].shape)
            return tensor

        return change

    hooks = [(graph.points[name], keep(name)) for name in graph.senders if name not in whole]
    with torch.no_grad(), hooked(module, hooks):
        expected = float(logit_diff(module, ids(CLEAN)))
    nodes = ["embed[1:]", "layers[0].heads[2][3]", "layers[1].heads[1].output[1]", "layers[1].heads[1][-1]",
             "layers[1].mlp.output[-1]", *whole]  # fmt: skip
    circuit = ns.Circuit.of(nodes=nodes, model=model)
    near(circuit.run(model, CLEAN, CORRUPTED, METRIC), expected, family)
    whole_nodes = ns.Circuit.of(nodes=[*tokens, *whole])
    assert abs(float(whole_nodes.run(model, CLEAN, CORRUPTED, METRIC)[0]) - expected) > 1e-4


@families
@pytest.mark.parametrize("ablation", ["patch", "zero"])
def test_edges_at_some_tokens_carry_what_hooks_write_there(family: str, ablation: str) -> None:
    model, module = double(family), bare(family)
    graph = graph_of(model)
    edges = sorted(drawn(graph, 0.6, seed=11))
    rng = np.random.default_rng(0)
    at = {edge: sorted(rng.choice(5, 2, replace=False).tolist()) for edge in edges if rng.random() < 0.4}
    ablated = recorded(module, ids(CORRUPTED), graph)
    if ablation == "zero":
        ablated = {name: torch.zeros_like(value) for name, value in ablated.items()}
    expected = by_hooks(module, graph, ids(CLEAN), ablated, set(edges), at)
    given = [(s if (s, r) not in at else f"{s}{at[s, r]}", r) for s, r in edges]
    circuit = ns.Circuit.of(edges=given, model=model)
    pair = (CLEAN, CORRUPTED if ablation == "patch" else None)
    near(circuit.run(model, *pair, METRIC, ablation=ablation), expected, family)  # type: ignore[arg-type]
    plain = ns.Circuit.of(edges=edges).run(model, *pair, METRIC, ablation=ablation)  # type: ignore[arg-type]
    assert abs(float(plain[0]) - expected) > 1e-4


def test_all_tokens_one_by_one_are_the_whole() -> None:
    model = double("llama")
    edges = sorted(drawn(graph_of(model), 0.5, seed=2))
    single = [(f"{s}[{token}]", r) for s, r in edges for token in range(5)]
    whole, apart = ns.Circuit.of(edges=edges), ns.Circuit.of(edges=single)
    near(apart.run(model, CLEAN, CORRUPTED, METRIC), whole.run(model, CLEAN, CORRUPTED, METRIC), "llama")
    both = ns.sweep_circuits(model, {"whole": whole, "apart": apart}, CLEAN, CORRUPTED, METRIC, progress=False)
    near(both.table.values[:, 0], both.table.values[:, 1], "llama")


def test_positions_are_each_prompts_own_and_circuits_run_together_as_alone() -> None:
    model = double("gpt2")
    clean, corrupted = [CLEAN, "w8 w4 w5", "w9 w4 w5 w6 w21"], [CORRUPTED, "w3 w4 w9", "w3 w4 w5 w6 w8"]
    circuits = [
        ns.Circuit.of(nodes=["embed", "layers[0].heads[1][-1]", "layers[1].mlp[0]"]),
        ns.Circuit.of(nodes=["embed[-1]", "layers[0].heads[1]", "layers[2].mlp[1:3]"]),
        ns.Circuit.of(edges=[("embed[-1]", "layers[1].mlp"), ("layers[1].mlp", "unembed"), ("embed", "unembed")]),
    ]
    swept = ns.sweep_circuits(model, circuits, clean, corrupted, METRIC, progress=False).table.values
    for number, circuit in enumerate(circuits):
        alone = [float(circuit.run(model, a, b, METRIC)[0]) for a, b in zip(clean, corrupted, strict=True)]
        np.testing.assert_allclose(swept[:, number], alone, rtol=0, atol=1e-10)
        few = circuit.run(model, clean, corrupted, METRIC, max_tokens=5)
        np.testing.assert_allclose(swept[:, number], few, rtol=0, atol=1e-10)


def test_scores_of_tokens_are_a_circuit_of_tokens(tmp_path: Path) -> None:
    model = double("gpt2")
    sites = ["layers[:].heads[:][:]", "layers[:].mlp[:]"]
    scores = ns.attribute(model, CLEAN, CORRUPTED, ["embed[:]", *sites], METRIC, method="eap", progress=False)
    circuit = ns.Circuit.top(scores, 40, model=model)
    assert len(circuit) == 40 and any(sender.position is not None for sender, _ in circuit.edges)
    grown = ns.Circuit.greedy(scores, 20, model=model)
    assert len(grown) == 20
    circuit.to_file(tmp_path / "circuit.json")
    assert ns.Circuit.from_file(tmp_path / "circuit.json") == circuit
    report = ns.faithfulness(model, scores, CLEAN, CORRUPTED, METRIC, shares=[0.1, 1.0], progress=False)
    np.testing.assert_allclose(report.f()[-1], 1.0, atol=1e-9)
    alone = circuit.run(model, CLEAN, CORRUPTED, METRIC)
    np.testing.assert_allclose(circuit.pruned().run(model, CLEAN, CORRUPTED, METRIC), alone, rtol=0, atol=1e-10)
    nodes = ns.sweep(model, CLEAN, CORRUPTED, sites, METRIC, progress=False)
    chosen = ns.Circuit.top(nodes, 6)
    assert str(chosen.nodes[0]) == "embed" and len(chosen) == 7
    assert len(circuit.plot().lines) == 40
    circuit.to_html(tmp_path / "circuit.html")
    assert "[4]" in (tmp_path / "circuit.html").read_text()


# --- experts ----------------------------------------------------------------------------------------------------------


def parts_of(experts: Any, args: tuple) -> list[Tensor]:
    """What each expert adds, `[token, width]`: written out."""
    states, chosen, weights = args
    found = []
    for number in range(experts.gate_up_proj.shape[0]):
        gate, up = (states @ experts.gate_up_proj[number].T).chunk(2, -1)
        made = (experts.act_fn(gate) * up) @ experts.down_proj[number].T
        found.append(made * (weights * (chosen == number)).sum(-1, keepdim=True))
    return found


def moe_run(module: Any, tokens: Tensor, write: dict[int, Any] | None = None) -> tuple[float, dict[int, Any]]:
    """The metric, and of each layer what its MLP adds and its experts' parts; `write` makes other of these."""
    seen: dict[int, Any] = {}
    hooks = []
    for n, layer in enumerate(module.model.layers):
        given: list[tuple] = []
        hooks.append(layer.mlp.experts.register_forward_pre_hook(lambda _m, args, g=given: g.append(args)))

        def added(mlp: Any, _args: Any, out: Tensor, n: int = n, g: list[tuple] = given) -> Any:
            parts = parts_of(mlp.experts, g[-1])
            whole = out[0] if isinstance(out, tuple) else out
            seen[n] = (whole.clone(), parts)
            if write is None or n not in write:
                return None
            new = write[n](whole, parts).reshape(whole.shape)
            return (new, *out[1:]) if isinstance(out, tuple) else new

        hooks.append(layer.mlp.register_forward_hook(added))
    with torch.no_grad():
        value = float(logit_diff(module, tokens))
    for hook in hooks:
        hook.remove()
    return value, seen


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("ablation", ["patch", "zero"])
def test_an_expert_is_its_own_part_of_what_its_mlp_adds(family: str, ablation: str) -> None:
    model, module = double(family), bare(family)
    graph = graph_of(model)
    _, there = moe_run(module, ids(CORRUPTED))
    names = [name for name in graph.senders if name not in ("layers[1].mlp", "layers[2].mlp", "layers[0].heads[1]")]
    base = recorded(module, ids(CORRUPTED), graph)
    inside = {1: [0, 2], 2: [1]}

    def mixture(n: int) -> Any:
        whole, parts = there[n]

        def change(own: Tensor, now: list[Tensor]) -> Tensor:
            zero = ablation == "zero"
            made = torch.zeros_like(own) if zero else whole.clone()
            for e in inside[n]:
                made = made + (now[e] - (0 if zero else parts[e])).reshape(own.shape)
            return made

        return change

    head = torch.zeros_like(base["layers[0].heads[1]"]) if ablation == "zero" else base["layers[0].heads[1]"]
    with hooked(module, writing(graph.points, {"layers[0].heads[1]": head})):
        expected, _ = moe_run(module, ids(CLEAN), {n: mixture(n) for n in inside})
    nodes = [*names, *(f"layers[{n}].experts[{e}]" for n, some in inside.items() for e in some)]
    circuit = ns.Circuit.of(nodes=nodes, model=model)
    assert "3 experts" in repr(circuit)
    pair = (CLEAN, CORRUPTED if ablation == "patch" else None)
    found = circuit.run(model, *pair, METRIC, ablation=ablation)  # type: ignore[arg-type]
    near(found, expected, family)
    without = ns.Circuit.of(nodes=names).run(model, *pair, METRIC, ablation=ablation)  # type: ignore[arg-type]
    assert abs(float(without[0]) - expected) > 1e-4


def test_all_experts_are_the_mlp_and_some_of_their_tokens_what_is_there() -> None:
    model = double("mixtral")
    edges = sorted(drawn(graph_of(model), 0.7, seed=5))
    into = [(s, r) for s, r in edges if s == "layers[0].mlp"]
    rest = [edge for edge in edges if edge not in into]
    experts = [(f"layers[0].experts[{e}]", r) for _, r in into for e in range(4)]
    whole = ns.Circuit.of(edges=edges).run(model, CLEAN, CORRUPTED, METRIC)
    assert len(into) > 3
    near(ns.Circuit.of(edges=[*rest, *experts]).run(model, CLEAN, CORRUPTED, METRIC), whole, "mixtral")
    at = [(f"layers[0].mlp[{token}]", r) for _, r in into for token in (1, 4)]
    apart = [(f"layers[0].experts[{e}][{token}]", r) for _, r in into for e in range(4) for token in (1, 4)]
    some, same = (ns.Circuit.of(edges=[*rest, *one]) for one in (at, apart))
    found = some.run(model, CLEAN, CORRUPTED, METRIC)
    near(same.run(model, CLEAN, CORRUPTED, METRIC), found, "mixtral")
    assert abs(found - whole).max() > 1e-4
    mean = [one.run(model, CLEAN, CORRUPTED, METRIC, ablation="mean") for one in (some, same)]
    near(mean[1], mean[0], "mixtral")


@pytest.mark.parametrize(
    ("nodes", "family", "options", "match"),
    [
        (["embed", "layers[0].experts[9]"], "mixtral", {}, "9"),
        (["embed", "layers[0].experts[1]"], "gpt2", {}, "expert"),
        (["embed", "layers[0].mlp[7]"], "gpt2", {}, "7"),
        (["embed", "layers[0].mlp[1]", "layers[0].experts[1]"], "mixtral", {}, "its part would count twice"),
        (["embed", "layers[0].heads[1][0]"], "gpt2", {"ablation": "optimal"}, "trains constants for whole ones"),
        (["embed", "layers[0].heads[1][0]", "layers[0].heads[9]"], "gpt2", {}, r"heads\[9\]"),
    ],
)
def test_parts_that_are_not_there_are_refused(nodes: Any, family: str, options: Any, match: str) -> None:
    with pytest.raises(ns.errors.NnspliceError, match=match):
        ns.Circuit.of(nodes=nodes).run(double(family), CLEAN, CORRUPTED, METRIC, **options)


def test_what_takes_whole_senders_refuses_parts() -> None:
    model = double("mixtral")
    circuit = ns.Circuit.of(edges=[("embed[-1]", "unembed"), ("layers[0].experts[0]", "unembed")], model=model)
    pair = CLEAN, CORRUPTED
    calls: list[tuple[Any, str]] = [
        (lambda: ns.acdc(model, *pair, METRIC, threshold=0.1, start=circuit), "whole senders"),
        (lambda: ns.minimality(model, circuit, *pair, METRIC), "taken out whole"),
        (lambda: ns.completeness(model, circuit, *pair, METRIC), "taken out whole"),
        (lambda: ns.optimal_ablation(model, circuit, CLEAN), "whole senders"),
        (lambda: circuit.to_json("x.json"), "no names for parts"),
        (lambda: ~circuit, "how many tokens"),
        (lambda: circuit & ns.Circuit.full(model), "the other a part of it"),
    ]
    saved = ns.capture(model, CORRUPTED, ["embed.output[:]", "layers[:].heads[:].output[:]", "layers[:].mlp.output[:]"])
    calls.append((lambda: circuit.run(model, CLEAN, None, METRIC, ablation=saved), "no value of single experts"))
    for call, match in calls:
        with pytest.raises(ns.errors.BadArgument, match=match):
            call()


def test_an_mlp_that_does_more_with_its_experts_has_no_parts_of_them() -> None:
    model = double("mixtral")
    hooks = [model._module.model.layers[1].mlp.register_forward_hook(lambda _m, _a, out: out * 1.5)]
    circuit = ns.Circuit.of(nodes=["embed", "layers[1].experts[0]"])
    with pytest.raises(ns.errors.RefusedPlace, match="something stands between the experts"):
        circuit.run(model, CLEAN, CORRUPTED, METRIC)
    hooks[0].remove()
    assert circuit.run(model, CLEAN, CORRUPTED, METRIC).shape == (1,)
