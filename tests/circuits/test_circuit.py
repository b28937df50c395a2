"""A circuit is a value: what it is made of, its algebra, its files, and the mistakes that it answers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import nnsplice as ns
from nnsplice.circuits.shape import LayerShape, Shape
from zoo import double, wrap

METRIC = ns.logit_diff("w7", "w8")
SITES = ["embed", "layers[:].heads[:]", "layers[:].mlp"]
PAIRS = ["w3 w4 w5", "w9 w4 w5"], ["w3 w4 w3", "w9 w4 w3"]
SHAPE = Shape((LayerShape(4, 2, parallel=False),) * 2)
EDGES = SHAPE.edges(SHAPE.exists)
some_edges = st.sets(st.sampled_from(EDGES)).map(lambda edges: ns.Circuit("edges", (), tuple(edges), shape=SHAPE))


@pytest.fixture(scope="module")
def model() -> Any:
    return double("llama")


@pytest.fixture(scope="module")
def scores(model: Any) -> ns.SweepResult:
    return ns.attribute(model, *PAIRS, SITES, METRIC, method="eap", progress=False)


# --- made of scores


@pytest.mark.parametrize("by", ["absolute", "signed"])
def test_the_top_edges_are_those_with_the_best_mean_scores(scores: ns.SweepResult, by: Any) -> None:
    frame: Any = scores.edges()
    order = frame["score"].abs() if by == "absolute" else frame["score"]
    best = frame.loc[order.sort_values(ascending=False).index[:9]]
    circuit = ns.Circuit.top(scores, 9, by)
    expected = {(s.removesuffix(".output"), r.removesuffix(".output")) for s, r in best[["sender", "receiver"]].values}
    assert {(str(s), str(r)) for s, r in circuit.edges} == expected
    found = {(str(s), str(r)): x for (s, r), x in zip(circuit.edges, circuit.scores or (), strict=True)}
    for sender, receiver, score in best[["sender", "receiver", "score"]].values:
        np.testing.assert_allclose(found[sender.removesuffix(".output"), receiver.removesuffix(".output")], score)


def test_greedy_takes_the_best_edge_into_what_is_there_already(model: Any, scores: ns.SweepResult) -> None:
    frame = scores.edges()
    sizes = {
        (s.removesuffix(".output"), r.removesuffix(".output")): abs(x)
        for s, r, x in frame[["sender", "receiver", "score"]].values
    }
    # The slow way: after every step, look through all edges.
    there, chosen = {"unembed"}, set[tuple[str, str]]()
    for _ in range(25):
        edge = max((e for e in sizes if e[1] in there and e not in chosen), key=lambda e: sizes[e])
        chosen.add(edge)
        sender = edge[0]
        if sender.endswith(".mlp"):
            there.add(sender)
        elif sender != "embed":
            layer, head = (int(part.split("]")[0]) for part in sender.split("[")[1:])
            there |= {f"{sender}.q", *(f"layers[{layer}].groups[{head // 2}].{part}" for part in "kv")}
    circuit = ns.Circuit.greedy(scores, 25)
    assert {(str(s), str(r)) for s, r in circuit.edges} == chosen
    assert circuit == ns.Circuit.greedy(scores, 25, model=model)
    assert any(ns.Circuit.greedy(scores, k) != ns.Circuit.top(scores, k) for k in range(2, 40))
    assert all(receiver in reads(circuit) for _, receiver in circuit.edges)


def reads(circuit: ns.Circuit) -> set[Any]:
    assert circuit.shape is not None
    found = {circuit.shape.receivers[-1]}
    for sender, _ in circuit.edges:
        found |= {circuit.shape.receivers[r] for r in circuit.shape.reads_of(circuit.shape.sender_number[sender])}
    return found


def test_a_share_of_the_edges_is_rounded_and_at_least_one(scores: ns.SweepResult) -> None:
    total = len(scores.edges())
    assert [len(ns.Circuit.select(scores, share)) for share in (0.0, 1e-6, 0.1, 1.0)] == [
        0,
        1,
        round(0.1 * total),
        total,
    ]


def test_the_graph_of_scores_is_that_of_the_model(model: Any, scores: ns.SweepResult) -> None:
    assert ns.Circuit.select(scores, 1.0) == ns.Circuit.full(model)
    assert ns.Circuit.top(scores, 3).shape == ns.Circuit.full(model).shape


def test_scores_say_which_model_and_method_they_are_of(model: Any, scores: ns.SweepResult) -> None:
    about = ns.Circuit.top(scores, 3).provenance
    assert (about["method"], about["k"], about["by"]) == ("eap", 3, "absolute")
    assert about["weights"] == ns.Circuit.full(model).provenance["weights"]


# --- algebra


@given(some_edges, some_edges, some_edges)
def test_the_algebra_is_that_of_sets(a: ns.Circuit, b: ns.Circuit, c: ns.Circuit) -> None:
    ours, theirs = set(a.edges), set(b.edges)
    assert set((a | b).edges) == ours | theirs
    assert set((a & b).edges) == ours & theirs
    assert set((a - b).edges) == ours - theirs
    assert set((~a).edges) == set(EDGES) - ours
    assert ~(a | b) == ~a & ~b and ~~a == a
    assert a & (b | c) == (a & b) | (a & c)
    assert hash(a | b) == hash(b | a) and (a | b) == (b | a)
    assert a.iou(b) == (len(ours & theirs) / len(ours | theirs) if ours | theirs else 1.0)
    assert all((edge in a) == (edge in ours) for edge in EDGES[::7])


@given(some_edges)
def test_what_is_pruned_lies_on_no_path(circuit: ns.Circuit) -> None:
    left = set(circuit.pruned().edges)
    # Walk every path: from unembed backwards, and from embed forwards.
    assert left <= set(circuit.edges)

    def readers(sender: Any) -> set[Any]:
        return {SHAPE.receivers[r] for r in SHAPE.reads_of(SHAPE.sender_number[sender])}

    def starts(sender: Any) -> bool:
        return str(sender) == "embed" or any(starts(s) for s, r in circuit.edges if r in readers(sender))

    def ends(sender: Any) -> bool:
        return any(
            s == sender and (str(r) == "unembed" or any(ends(x) for x in SHAPE.senders[1:] if r in readers(x)))
            for s, r in circuit.edges
        )

    def leads(receiver: Any) -> bool:
        return str(receiver) == "unembed" or any(ends(x) for x in SHAPE.senders[1:] if receiver in readers(x))

    assert left == {(s, r) for s, r in circuit.edges if starts(s) and leads(r)}
    assert circuit.pruned().pruned() == circuit.pruned()


def test_pruning_changes_nothing_of_a_patched_run(model: Any) -> None:
    rng = np.random.default_rng(0)
    full = ns.Circuit.full(model)
    for share in (0.1, 0.2):
        circuit = ns.Circuit.of(edges=[edge for edge in full.edges if rng.random() < share], model=model)
        assert 0 < len(circuit.pruned()) < len(circuit)
        a, b = (one.run(model, *PAIRS, METRIC) for one in (circuit, circuit.pruned()))
        np.testing.assert_allclose(a, b, atol=1e-10)


def test_one_place_has_one_spelling() -> None:
    a = ns.Circuit.of(edges=[("L0H1", "layers[1].mlp.output"), ("embed.output", "unembed.output")])
    b = ns.Circuit.of(edges=[("embed", "unembed"), ("layers[0].heads[1].output", "L1.mlp")] * 2)
    assert a == b and len(a) == 2
    assert ("L0H1", "layers[1].mlp") in a and "layers[0].heads[1]" in a and "layers[0].heads[2]" not in a


def test_members_stand_in_the_order_in_which_they_run() -> None:
    circuit = ns.Circuit.of(nodes=["layers[10].mlp", "layers[2].mlp", "layers[2].heads[11]", "L2H3", "embed"])
    assert list(map(str, circuit.nodes)) == [
        "embed", "layers[2].heads[3]", "layers[2].heads[11]", "layers[2].mlp", "layers[10].mlp",
    ]  # fmt: skip
    assert list(circuit.layers()) == [2, 10] and len(circuit.layers()[2]) == 3


def test_it_says_what_is_in_it(model: Any) -> None:
    full = ns.Circuit.full(model)
    assert repr(full) == f"Circuit of {len(full)} edges between embed, 12 heads, 3 MLPs"
    assert full.in_degree[full.edges[0][1]] >= 1 and sum(full.in_degree.values()) == len(full)
    assert repr(ns.Circuit.empty(model)) == "Circuit of 0 edges" and not ns.Circuit.empty(model)


def test_a_circuit_does_not_change() -> None:
    circuit = ns.Circuit.of(nodes=["embed"])
    with pytest.raises(AttributeError):
        circuit.nodes = ()  # type: ignore[misc]


# --- files


@given(some_edges, st.booleans())
def test_files_give_back_what_was_written(tmp_path_factory: Any, circuit: ns.Circuit, scored: bool) -> None:
    path = tmp_path_factory.mktemp("circuit") / "c.json"
    scores = tuple(np.random.default_rng(0).normal(size=len(circuit)).tolist()) if scored else None
    circuit = replace(circuit, scores=scores, provenance={"model": "none", "k": 3})
    circuit.to_file(path)
    back = ns.Circuit.from_file(path)
    assert (back, back.scores, back.shape, back.provenance) == (circuit, circuit.scores, SHAPE, circuit.provenance)


@given(some_edges)
def test_graphs_of_eap_ig_give_back_what_was_written(tmp_path_factory: Any, circuit: ns.Circuit) -> None:
    path = tmp_path_factory.mktemp("graph") / "g.json"
    circuit = replace(circuit, scores=tuple(float(n + 1) for n in range(len(circuit))))
    circuit.to_json(path)
    told = json.loads(path.read_text())
    assert told["cfg"]["n_layers"] == 2 and told["cfg"]["n_heads"] == 4 and told["cfg"]["parallel_attn_mlp"] is False
    # Of 2 layers of 4 heads, with keys and values for every head: into the first, the second, and the logits.
    assert len(told["edges"]) == (1 * 12 + 5) + (6 * 12 + 10) + 11
    names = {name for name, info in told["edges"].items() if info["in_graph"]}
    plain = {"embed": "input", "unembed": "logits"}
    for sender, receiver in circuit.edges:
        if str(receiver) in plain:
            start = plain.get(str(sender)) or _graph_name(str(sender))
            assert f"{start}->logits" in names
    from nnsplice.circuits import files

    shape, found, partial = files.from_graph(told, path, SHAPE)
    assert shape == SHAPE and partial == 0
    back = {(SHAPE.senders[s], SHAPE.receivers[r]): score for r, s, score in found}
    assert set(back) == set(circuit.edges)
    np.testing.assert_allclose([back[edge] for edge in circuit.edges], circuit.scores or ())


def _graph_name(sender: str) -> str:
    layer = sender.split("[")[1].split("]")[0]
    return f"m{layer}" if sender.endswith("mlp") else f"a{layer}.h{sender.split('[')[2][0]}"


def _graph(**edges: Any) -> dict[str, Any]:
    return {
        "cfg": {"n_layers": 3, "n_heads": 4, "parallel_attn_mlp": False, "d_model": 16},
        "nodes": {},
        "edges": {name: {"score": 0.5, "in_graph": there} for name, there in edges.items()},
    }


def test_a_graph_written_by_others_is_read(tmp_path: Path, model: Any) -> None:
    path = tmp_path / "graph.json"
    named = {"input->a0.h1<q>": True, "a0.h1->m0": True, "m0->a2.h3<k>": True, "m0->a2.h2<k>": True, "m2->logits": True,
             "input->m1": False}  # fmt: skip
    path.write_text(json.dumps(_graph(**named)))
    alone = ns.Circuit.from_json(path)
    assert [(str(s), str(r)) for s, r in alone.edges] == [
        ("embed", "layers[0].heads[1].q"), ("layers[0].heads[1]", "layers[0].mlp"),
        ("layers[0].mlp", "layers[2].groups[2].k"), ("layers[0].mlp", "layers[2].groups[3].k"),
        ("layers[2].mlp", "unembed"),
    ]  # fmt: skip
    grouped = ns.Circuit.from_json(path, model=model)  # two groups of two heads
    assert ("layers[0].mlp", "layers[2].groups[1].k") in grouped and len(grouped) == 4
    grouped.run(model, *PAIRS, METRIC)
    path.write_text(json.dumps(_graph(**{"m0->a2.h3<k>": True})))
    with pytest.warns(UserWarning, match="1 edges lead to the keys or values of some heads"):
        ns.Circuit.from_json(path, model=model)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("[1, 2", "damaged, or no JSON"),
        ("[]", "no circuit of nnsplice"),
        (json.dumps(_graph()), r"Circuit.from_json\(path\)"),
        ('{"format": "nnsplice circuit", "version": 2}', "version 2"),
        ('{"format": "nnsplice circuit", "version": 1, "kind": "heads"}', "no addresses"),
        ('{"format": "nnsplice circuit", "version": 1, "kind": "edges", "edges": [["embed"]]}', "no addresses"),
        (
            '{"format": "nnsplice circuit", "version": 1, "kind": "nodes", "nodes": ["embed"], "scores": []}',
            "one score",
        ),
        (
            '{"format": "nnsplice circuit", "version": 1, "kind": "nodes", "nodes": [], "shape": [[4, 3, 0]]}',
            "heads each",
        ),
        ('{"format": "nnsplice circuit", "version": 1, "kind": "nodes", "nodes": ["unembed"]}', "no sender"),
    ],
)
def test_files_that_are_none_are_told(tmp_path: Path, text: str, match: str) -> None:
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(ns.errors.NnspliceError, match=match):
        ns.Circuit.from_file(tmp_path / "c.json")


@pytest.mark.parametrize(
    ("told", "match"),
    [
        ({}, "no graph of EAP-IG"),
        ({**_graph(), "cfg": {"n_layers": 3}}, "how many layers and heads"),
        (_graph(**{"a0.h9->m0": True}), "has an edge 'a0.h9->m0'"),
        (_graph(**{"a0.h1<q>": True}), "has an edge"),
        (_graph(**{"m2->m1": True}), "against the order"),
    ],
)
def test_graphs_that_are_none_are_told(tmp_path: Path, told: Any, match: str) -> None:
    (tmp_path / "g.json").write_text(json.dumps(told))
    with pytest.raises(ns.errors.FileError, match=match):
        ns.Circuit.from_json(tmp_path / "g.json")


# --- mistakes


@pytest.mark.parametrize(
    ("edges", "match"),
    [
        ([("layers[2].mlp", "layers[1].mlp")], "runs after"),
        ([("layers[0].mlp", "layers[0].heads[1].q")], "runs after"),
        ([("layers[0].heads[1]", "layers[0].groups[1].k")], "runs after"),
        ([("unembed", "layers[0].mlp")], "no sender"),
        ([("embed", "embed")], "no receiver"),
        ([("embed", "layers[0].heads[1]")], "no receiver"),
        ([("embed", "layers[0].heads[1].k")], r"groups\[1\].k"),
        ([("embed", "layers[0].attn")], "no receiver"),
        ([("layers[:].mlp", "unembed")], "several sites"),
        ([("layers[-1].mlp", "unembed")], "depends on the model"),
        ([("embed", "layers[0].mlp[-1]")], "a receiver reads at all"),
        ([("model.transformer.h[0].mlp", "unembed")], "by their roles"),
        ([("embed",)], "no edge"),
        (["embed -> unembed"], "no edge"),
        ("embed", "no list of edges"),
    ],
)
def test_edges_that_no_model_has_are_told(edges: Any, match: str) -> None:
    with pytest.raises(ns.errors.NnspliceError, match=match):
        ns.Circuit.of(edges=edges)


@pytest.mark.parametrize(
    "edge", [("layers[7].mlp", "unembed"), ("embed", "layers[0].groups[2].k"), ("L0H4", "unembed")]
)
def test_places_that_this_model_has_not_are_told(model: Any, edge: tuple[str, str]) -> None:
    with pytest.raises(ns.errors.UnknownPath, match="this model has no"):
        ns.Circuit.of(edges=[edge], model=model)
    with pytest.raises(ns.errors.UnknownPath, match="this model has no"):
        ns.Circuit.of(edges=[edge]).run(model, *PAIRS, METRIC)


def test_in_a_parallel_block_no_head_sends_to_its_own_mlp() -> None:
    edge = ("layers[0].heads[1]", "layers[0].mlp")
    assert edge in ns.Circuit.of(edges=[edge])
    with pytest.raises(ns.errors.BadArgument, match="runs after"):
        ns.Circuit.of(edges=[edge], model=wrap("gptj"))


def test_a_circuit_of_another_model_is_told_and_can_be_taken_over(model: Any) -> None:
    other = double("llama", seed=1)
    circuit = ns.Circuit.full(other)
    with pytest.raises(ns.errors.KeyMismatch, match=r"circuit.on\(model\)"):
        circuit.run(model, *PAIRS, METRIC)
    with pytest.raises(ns.errors.KeyMismatch, match="other weights"):
        _ = circuit & ns.Circuit.full(model)
    taken = circuit.on(model)
    assert taken == ns.Circuit.full(model) and taken.provenance["taken over from"] == circuit.provenance
    taken.run(model, *PAIRS, METRIC)
    with pytest.raises(ns.errors.KeyMismatch, match="other heads or layers"):
        _ = circuit | ns.Circuit.full(wrap("gpt2"))


def test_nodes_without_embed_are_told_as_nothing_would_enter(model: Any) -> None:
    with pytest.raises(ns.errors.BadArgument, match="without embed"):
        ns.Circuit.of(nodes=["layers[0].mlp"]).run(model, *PAIRS, METRIC)


def test_mistakes_in_scores_are_told(model: Any, scores: ns.SweepResult) -> None:
    total = len(scores.edges())
    nodes = ns.ablate(model, PAIRS[0], SITES[1:], METRIC, progress=False)
    tokens = ns.sweep(model, *PAIRS, SITES[1:], METRIC, progress=False)
    some = ns.attribute(model, *PAIRS, SITES, METRIC, method="eap", receivers=["layers[2].mlp"], progress=False)
    attn = ns.attribute(model, *PAIRS, SITES, METRIC, method="eap", receivers=["layers[2].attn"], progress=False)
    assert scores.table.edges is not None
    edges = scores.table.edges.copy()
    edges[1, 0, 0] = np.nan
    broken = ns.SweepResult(replace(scores.table, edges=edges))
    none = ns.SweepResult(replace(scores.table, edges=np.full_like(edges, np.nan)))
    calls: list[tuple[Any, str]] = [
        (lambda: ns.Circuit.top(scores, total + 1), f"there are {total} scored edges"),
        (lambda: ns.Circuit.top(scores, 0.1), r"Circuit.select"),  # type: ignore[arg-type]
        (lambda: ns.Circuit.top(scores, -1), "from 0 to"),
        (lambda: ns.Circuit.top(scores, 3, "size"), "by='size'"),  # type: ignore[arg-type]
        (lambda: ns.Circuit.select(scores, 2), "0 to 1"),
        (lambda: ns.Circuit.greedy(nodes, 3), "eap-ig"),
        (lambda: ns.Circuit.greedy(some, 3), "model=model"),
        (lambda: ns.Circuit.top(attn, 3), "no receiver"),
        (lambda: ns.Circuit.top(tokens, len(tokens.cells) + 1), "scored nodes"),
        (lambda: ~ns.Circuit.of(nodes=["embed[0]"], model=model), "how many tokens"),
        (lambda: ns.Circuit.full(model) - ns.Circuit.of(edges=[("embed[0]", "unembed")]), "the other a part of it"),
        (lambda: ns.Circuit.top(broken, 3), "scores are NaN"),
        (lambda: ns.Circuit.top(none, 3), "every score is NaN"),
        (lambda: ns.Circuit.top(ns.Circuit.full(model), 3), "has no scores"),  # type: ignore[arg-type]
        (lambda: ns.Circuit.of(nodes=["embed"], edges=[]), "one of nodes= and edges="),
        (lambda: ns.Circuit.of(), "one of nodes= and edges="),
        (lambda: ns.Circuit.of(nodes=["embed"], scores=[1, 2]), "2 scores"),
        (lambda: ns.Circuit.of(nodes=["embed"], scores=[float("nan")]), "is NaN"),
        (lambda: ~ns.Circuit.of(nodes=["embed"]), r"circuit.on\(model\)"),
        (lambda: ns.Circuit.of(nodes=["embed"]).pruned(), "circuit of nodes"),
        (lambda: ns.Circuit.of(nodes=["embed"]) | ns.Circuit.full(model), "a circuit of nodes"),
        (lambda: ns.Circuit.full(model) | 3, "two circuits"),  # type: ignore[operator]
    ]
    for call, match in calls:
        with pytest.raises(ns.errors.NnspliceError, match=match):
            call()


def test_a_graph_of_networkx_has_its_nodes_and_edges() -> None:
    networkx = pytest.importorskip("networkx")
    circuit = ns.Circuit.of(
        edges=[("embed", "layers[0].heads[1].q"), ("embed", "layers[0].groups[0].k"), ("L0H1", "unembed")],
        scores=[1.0, 2.0, 3.0],
    )
    circuit = replace(circuit, shape=SHAPE)
    graph = circuit.to_networkx()
    assert set(graph) == {"embed", "layers[0].heads[1]", "layers[0].groups[0]", "unembed"}
    assert graph.edges["embed", "layers[0].heads[1]"] == {"into": "q", "score": 1.0}
    assert networkx.has_path(graph, "layers[0].groups[0]", "unembed")
