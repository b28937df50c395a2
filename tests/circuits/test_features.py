"""Circuits whose senders are features of an SAE of an MLP, and its error: what plain hooks make of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import nnsplice as ns
from circuits.test_running import near
from nnsplice.atlas import unwrap
from nnsplice.errors import BadArgument, RefusedPlace, UnknownPath
from subspaces.test_packed_features import FEATURES, METRIC, sae_of
from zoo import double

CLEAN, CORRUPTED = "w3 w4 w5 w6 w8", "w3 w9 w5 w16 w7"
AT = 'layers[0].mlp.output.sae["s"]'


def _ids(text: str) -> Tensor:
    return torch.tensor([[int(word[1:]) for word in text.split()]])


def _mlp(model: Any) -> Any:
    root: Any = unwrap(model)
    return root.transformer.h[0].mlp if hasattr(root, "transformer") else root.model.layers[0].mlp


def _run(model: Any, text: str, change: Any) -> float:
    handle = _mlp(model).register_forward_hook(lambda _m, _a, out: change(out))
    with torch.no_grad():
        logits = unwrap(model)(_ids(text)).logits[0, -1]  # type: ignore[operator]
    handle.remove()
    return float(logits[7] - logits[8])


def _added(model: Any, text: str) -> Tensor:
    kept: list[Tensor] = []
    _run(model, text, lambda out: kept.append(out.clone()) or out)
    return kept[0]


def _nodes(model: Any, *more: str) -> list[str]:
    return [str(node) for node in ns.Circuit.full(model).nodes if str(node) != "layers[0].mlp"] + list(more)


def _shares(sae: ns.SAE, value: Tensor, numbers: list[int]) -> Tensor:
    features = torch.zeros_like(sae.encode(value))
    features[..., numbers] = sae.encode(value)[..., numbers]
    return sae.decode(features) - sae.decode(torch.zeros_like(features))


@pytest.mark.parametrize("ablation", ["patch", "zero", "mean"])
@pytest.mark.parametrize(("family", "kind"), [("gpt2", "topk"), ("llama", "jumprelu"), ("gptj", "topk")])
def test_a_feature_is_its_share_of_what_the_mlp_adds(family: str, kind: str, ablation: str) -> None:
    model, sae = double(family), sae_of(kind)
    ns.attach_sae(model, "layers[0].mlp.output", sae, "s")
    own = _added(model, CLEAN)
    outside = {"patch": _added(model, CORRUPTED), "zero": torch.zeros_like(own)}.get(
        ablation, own.mean((0, 1), keepdim=True).expand_as(own)
    )
    pair = (CLEAN, CORRUPTED if ablation == "patch" else None)
    more: dict[str, Any] = {"reference": [CLEAN]} if ablation == "mean" else {}
    token = torch.tensor([1.0 if n in (1, 4) else 0.0 for n in range(5)])[None, :, None]
    cases = {
        (f"{AT}.features[3]", f"{AT}.features[8]"): _shares(sae, own, [3, 8]) - _shares(sae, outside, [3, 8]),
        (f"{AT}.error",): sae.error(own) - sae.error(outside),
        (f"{AT}.features[2][1]", f"{AT}.features[2][-1]", f"{AT}.error[1]"): (
            token * (_shares(sae, own, [2]) - _shares(sae, outside, [2]))
            + torch.tensor([0, 1.0, 0, 0, 0])[None, :, None] * (sae.error(own) - sae.error(outside))
        ),
    }
    whole = _run(model, CLEAN, lambda out: out)
    for nodes, share in cases.items():
        circuit = ns.Circuit.of(nodes=_nodes(model, *nodes), model=model)
        expected = _run(model, CLEAN, lambda _out, share=share: outside + share)
        near(circuit.run(model, *pair, METRIC, ablation=ablation, **more), expected, family)  # type: ignore[arg-type]
        assert abs(expected - whole) > 1e-6


def test_all_features_and_the_error_are_the_mlp() -> None:
    model = double("llama")
    ns.attach_sae(model, "layers[0].mlp.output", sae_of("topk"), "s")
    some = ["embed", "layers[1].heads[1]", "layers[1].mlp", "layers[2].heads[0]"]
    parts = [*(f"{AT}.features[{n}]" for n in range(FEATURES)), f"{AT}.error"]
    whole = ns.Circuit.of(nodes=[*some, "layers[0].mlp"], model=model)
    apart = ns.Circuit.of(nodes=[*some, *parts], model=model)
    both = ns.sweep_circuits(model, {"whole": whole, "apart": apart}, CLEAN, CORRUPTED, METRIC, progress=False)
    near(both.table.values[:, 0], both.table.values[:, 1], "llama")
    assert set(both.asked["saes"]) == {"s"}
    without = ns.Circuit.of(nodes=[*some, *parts[:-1]], model=model)
    off = float(without.run(model, CLEAN, CORRUPTED, METRIC)[0]) - float(both.table.values[0, 0])
    assert abs(off) > 1e-6
    assert "24 features, 1 error" in repr(apart)


def test_edges_carry_features_to_their_receivers_alone(tmp_path: Path) -> None:
    model, sae = double("llama"), sae_of("topk")
    ns.attach_sae(model, "layers[0].mlp.output", sae, "s")
    full = ns.Circuit.full(model)
    rest = [(str(s), str(r)) for s, r in full.edges if (str(s), str(r)) != ("layers[0].mlp", "unembed")]
    circuit = ns.Circuit.of(
        edges=[*rest, (f"{AT}.features[4]", "unembed"), (f"{AT}.features[9]", "unembed")], model=model
    )
    own, outside = _added(model, CLEAN), _added(model, CORRUPTED)
    root: Any = unwrap(model)
    ends: list[Tensor] = []
    handle = root.model.norm.register_forward_pre_hook(lambda _m, args: ends.append(args[0]))
    with torch.no_grad():
        root(_ids(CLEAN))
    handle.remove()
    share = _shares(sae, own, [4, 9]) - _shares(sae, outside, [4, 9])
    with torch.no_grad():
        logits = root.lm_head(root.model.norm(ends[0] - own + outside + share))[0, -1]
    near(circuit.run(model, CLEAN, CORRUPTED, METRIC), float(logits[7] - logits[8]), "llama")
    circuit.to_file(tmp_path / "circuit.json")
    read = ns.Circuit.from_file(tmp_path / "circuit.json")
    assert read == circuit
    assert ns.Circuit.of(edges=reversed([(str(s), str(r)) for s, r in circuit.edges]), model=model) == circuit
    circuit.to_html(tmp_path / "circuit.html")
    assert "features[4]" in (tmp_path / "circuit.html").read_text()
    assert len(circuit.plot().lines) == len(circuit)


def test_scores_of_features_are_a_circuit_of_features() -> None:
    model = double("llama")
    ns.attach_sae(model, "layers[0].mlp.output", sae_of("topk"), "s")
    sites = ["embed", "layers[:].heads[:]", "layers[1:].mlp", f"{AT}.features[:]", f"{AT}.error"]
    scores = ns.attribute(model, CLEAN, CORRUPTED, sites, METRIC, method="eap", progress=False)
    report = ns.faithfulness(model, scores, CLEAN, CORRUPTED, METRIC, shares=[0.1, 1.0], progress=False)
    np.testing.assert_allclose(report.f()[-1], 1.0, atol=1e-9)
    circuit = ns.Circuit.top(scores, 30, model=model)
    assert any(sender.sae is not None for sender, _ in circuit.edges)
    alone = circuit.run(model, CLEAN, CORRUPTED, METRIC)
    np.testing.assert_allclose(circuit.pruned().run(model, CLEAN, CORRUPTED, METRIC), alone, rtol=0, atol=1e-10)


def test_what_is_no_sender_is_refused_by_name() -> None:
    model = double("llama")
    for place in ("layers[0].output", "layers[0].attn.output"):
        at = ns.attach_sae(model, place, sae_of(), f"at {place}")
        with pytest.raises(BadArgument, match=r"SAE of layers\[i\]\.mlp\.output"):
            ns.Circuit.of(nodes=["embed", f"{at}.features[1]"], model=model)
    with pytest.raises(BadArgument, match="no receiver"):
        ns.Circuit.of(edges=[("embed", f"{AT}.features[1]")], model=model)
    ns.attach_sae(model, "layers[0].mlp.output", sae_of(norm="layer_norm"), "scaled")
    ns.attach_sae(model, "layers[0].mlp.output", sae_of(), "s")
    ns.attach_sae(model, "layers[0].mlp.output", sae_of(seed=1), "t")
    other = AT.replace('"s"', '"t"')

    def run(*nodes: str) -> Any:
        return ns.Circuit.of(nodes=_nodes(model, *nodes), model=model).run(model, CLEAN, CORRUPTED, METRIC)

    with pytest.raises(RefusedPlace, match="no sum of features"):
        run('layers[0].mlp.output.sae["scaled"].error')
    with pytest.raises(BadArgument, match="would count twice"):
        run(f"{AT}.features[1]", "layers[0].mlp[1]")
    with pytest.raises(BadArgument, match="would count twice"):
        run(f"{AT}.features[1]", f"{other}.features[1]")
    with pytest.raises(UnknownPath, match="no SAE 'gone'"):
        run('layers[0].mlp.output.sae["gone"].error')
    circuit = ns.Circuit.of(nodes=["embed", f"{AT}.features[1]"], model=model)
    with pytest.raises(BadArgument, match="is a part of a sender"):
        _ = ~circuit
