"""A small question of each kind that is run in units, for the tests."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

import nnsplice as ns
import sweep_functions

CLEAN = ["w3 w4 w5 w6", "w3 w4 w8", "w5 w9 w3 w7 w8", "w4 w4", "w6 w3"]
CORRUPTED = ["w3 w9 w5 w6", "w3 w9 w8", "w5 w4 w3 w7 w8", "w5 w4", "w7 w3"]
HEADS = "layers[:].heads[:]"
METRIC = ns.logit_diff("w7", "w8")
#: The answer differs from prompt to prompt, so a metric that lost its rows would give other numbers.
OWN = ns.logit_diff(["w7", "w9", "w6", "w12", "w5"], ["w8", "w3", "w4", "w11", "w9"])
NODES = ["embed", HEADS, "layers[:].mlp"]
LOAD, SOURCE = "sweep_functions:precise", "sweep_functions:precise_other"


def vector() -> Any:
    """A direction for two layers."""
    drawn = torch.Generator().manual_seed(0)
    pairs = [(f"layers[{n}].output[-1]", torch.randn(1, 16, dtype=torch.float64, generator=drawn)) for n in (0, 2)]
    return ns.steering.SteeringVector.of(ns.SavedActivation.from_pairs(*pairs))


def circuits(model: Any) -> list[ns.Circuit]:
    """Some of nodes, of edges, and of parts of a sender."""
    edges = [("layers[0].heads[1][-1]", "unembed"), ("embed", "layers[1].mlp"), ("layers[1].mlp", "unembed")]
    return [ns.Circuit.of(nodes=["embed", HEADS], model=model), ns.Circuit.of(edges=edges, model=model)]


def scores(model: Any) -> Any:
    """Scores of all edges."""
    return ns.attribute(model, CLEAN, CORRUPTED, NODES, METRIC, method="eap-ig", progress=False)


def asked(name: str, model: Any, other: Any) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """What asks, its arguments, and its options."""
    pair, steer = (model, CLEAN, CORRUPTED), (model, CLEAN, vector(), [-1.0, 0.0, 2.0])
    spans = {"s": [(1, 2), (1, 3), (0, 2), (0, 1), (1, 2)]}
    table: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {
        "steering": (ns.steering.sweep, (*steer, OWN), {"where": ns.steering.from_token(1)}),
        "steering, spans and an operator": (
            ns.steering.sweep, (*steer, ns.kl_divergence()),
            {"operator": sweep_functions.pushed, "where": ns.steering.span(spans["s"])},
        ),
        "steering, generated": (ns.steering.sweep, (*steer, sweep_functions.words), {"max_new_tokens": 3}),
        "path_patch": (ns.path_patch, (*pair, HEADS, ["layers[2].heads[:].q", "layers[2].mlp[-1]"], OWN), {}),
        "path_patch, tokens and metrics": (
            ns.path_patch, (*pair, "layers[:].heads[:][:]", "unembed", {"a": METRIC, "b": ns.rank("w7")}), {},
        ),
        "path_patch, subspace": (
            ns.path_patch, (*pair, "layers[:].mlp", "unembed", METRIC),
            {"subspace": ns.Subspace.of("layers[1].mlp.output", torch.eye(16, dtype=torch.float64)[:3])},
        ),
        "attribute": (ns.attribute, (*pair, NODES[1:], OWN), {}),
        "attribute, ig": (ns.attribute, (*pair, "layers[:].output", METRIC), {"method": "ig", "steps": 3}),
        "attribute, atp*": (ns.attribute, (*pair, HEADS, METRIC), {"method": "atp*"}),
        "attribute, eap-ig": (ns.attribute, (*pair, HEADS, METRIC), {"method": "eap-ig"}),
        "attribute, relp": (
            ns.attribute, (*pair, HEADS, METRIC), {"method": "relp", "receivers": ["layers[1:].mlp", "unembed"]},
        ),
        "attribute, ifr": (ns.attribute, (*pair, HEADS, METRIC), {"method": "ifr"}),
        "faithfulness": (ns.faithfulness, (model, circuits(model), CLEAN, CORRUPTED, OWN), {}),
        "faithfulness, mean": (
            ns.faithfulness, (model, circuits(model), CLEAN, None, {"a": METRIC, "b": ns.rank("w7")}),
            {"ablation": "mean", "reference": ["w3 w4 w5", "w9"]},
        ),
        "faithfulness, own mean": (ns.faithfulness, (*_curve(model), METRIC), {"ablation": "mean"}),
        "faithfulness, saved": (
            ns.faithfulness, (model, circuits(model), CLEAN, None, ns.kl_divergence()),
            {"ablation": ns.capture(model, "w3 w4", [f"{site}.output[0]" for site in NODES], progress=False)},
        ),
        "sweep_weights": (ns.sweep_weights, (model, other, CLEAN, ["layers[:].attn", HEADS], OWN), {}),
        "capture": (ns.capture, (model, CLEAN, ["layers[:].output[-1]", 'layers[1].heads[:].output["s"][0]']),
                    {"spans": spans}),
    }  # fmt: skip
    return table[name]


def _curve(model: Any) -> tuple[Any, ...]:
    return model, scores(model), CLEAN, CORRUPTED


NAMES = (
    "steering", "steering, spans and an operator", "steering, generated", "path_patch",
    "path_patch, subspace",
    "path_patch, tokens and metrics", "attribute", "attribute, ig", "attribute, atp*", "attribute, eap-ig",
    "attribute, relp", "attribute, ifr", "faithfulness", "faithfulness, mean", "faithfulness, own mean",
    "faithfulness, saved", "sweep_weights", "capture",
)  # fmt: skip


def numbers(result: Any) -> dict[str, np.ndarray]:
    """All numbers of a result."""
    if isinstance(result, ns.SavedActivation):
        return {key: tensor.numpy() for key, tensor in result.items()}
    if isinstance(result, ns.SweepResult):
        table = result.table
        found: Mapping[str, Any] = {name: getattr(table, name) for name in ("values", "clean", "corrupted", "edges")}
        return {name: array for name, array in found.items() if array is not None}
    names = (
        ("values", "kl", "baseline") if isinstance(result, ns.steering.SteeringSweep) else ("values", "full", "empty")
    )
    return {name: getattr(result, name) for name in names}


def told(result: Any) -> Any:
    """All that a result says beside its numbers, but for what the run cost."""
    if isinstance(result, ns.SavedActivation):
        return result.keys(), result.prompts, result.tokens, result.positions
    if isinstance(result, ns.SweepResult):
        table = result.table
        return (
            table.cells, table.tokens, result.asked, table.labels, table.receivers, table.metrics, result.method,
            table.done.tolist(), table.exists.tolist(), table.prompts.tolist(), table.run.executor,
            re.sub(r"\d+ (forward|backward) pass(es)?", "", table.run.note),
        )  # fmt: skip
    if isinstance(result, ns.steering.SteeringSweep):
        return (
            result.paths,
            result.layers,
            result.coefficients,
            result.prompts,
            result.metric,
            result.asked,
            result.texts,
        )
    return result.points, result.metric, result.metrics, result.run.note


def bits(result: Any) -> dict[str, bytes]:
    """The numbers, as bytes."""
    return {name: array.tobytes() for name, array in numbers(result).items()}
