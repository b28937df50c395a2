"""What a user's type checker sees. Nothing here runs: `pyright` reads it, and each line is an example or a refusal.

A comment that ignores an error is an error itself where there is none, so what should be refused stays refused.
"""

# pyright: reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

from pathlib import Path
from typing import assert_type

import numpy as np
import pandas as pd
import torch
import xarray as xr
from matplotlib.axes import Axes
from torch import Tensor, nn

import nnsplice as ns

PAIR = ("w3 w4 w5", "w3 w6 w5")
METRIC = ns.logit_diff("w7", "w8")


def a_capture(model: nn.Module) -> None:
    saved = ns.capture(model, "w3 w4", ["layers[:].output[-1]", ns.parse_path("layers[0].mlp.output[-1]")])
    assert_type(saved, ns.SavedActivation)
    assert_type(saved["layers[0].output[-1]"], Tensor)
    assert_type(saved.keys(), list[str])
    assert_type(saved - saved.mean() * 2.0, ns.SavedActivation)
    assert_type(saved | saved, ns.SavedActivation)
    assert_type(saved.slice[0:2], ns.SavedActivation)
    assert_type(saved.cosine(saved), dict[str, Tensor])
    assert_type(saved.stack("layer"), Tensor)
    assert_type(ns.SavedActivation.from_file(Path("a.safetensors")), ns.SavedActivation)
    assert_type(ns.SavedActivation.parse_path("l5h3"), ns.Path)
    assert_type(ns.patched_logits(model, [[3, 4], [5, 6]], saved), Tensor)
    saved * "2"  # pyright: ignore[reportOperatorIssue, reportUnusedExpression]
    assert_type(ns.save_activations(model, "layers[:].output[-1]"), ns.SavedActivation)
    for path, tensor, update in ns.updates(model, "layers[:].output[-1]"):
        assert_type(path, str)
        update(tensor * 0.5)


def what_prompts_may_be(model: nn.Module) -> None:
    place = "layers[0].output[-1]"
    ns.capture(model, ["w3 w4", "w5"], place, spans={"subject": ["w4", (0, 1)]})
    ns.capture(model, [3, 4], place)
    ns.capture(model, torch.tensor([[3, 4]]), place)
    ns.capture(model, {"input_ids": torch.tensor([[3, 4]])}, place)
    ns.capture(model, 3, place)  # pyright: ignore[reportArgumentType]
    ns.capture(model, "w3 w4", 3)  # pyright: ignore[reportArgumentType]


def a_sweep(model: nn.Module, tuned: nn.Module) -> None:
    plan = ns.plan_sweep(model, *PAIR, "layers[:].output[:]", METRIC, spans={"clean": {"subject": "w4"}})
    assert_type(plan, ns.Plan)
    assert_type(plan.shard(0, 2), ns.Plan)
    result = ns.run(plan, model)
    assert_type(result, ns.SweepResult)
    assert_type(result.grid(), xr.DataArray)
    assert_type(result.frame(), pd.DataFrame)
    assert_type(result.clean, np.ndarray)
    assert_type(ns.sweep(model, *PAIR, ns.parse_path("l1"), lambda logits: logits.max(-1).values), ns.SweepResult)
    assert_type(ns.ablate(model, "w3 w4", "layers[:].heads[:]", METRIC, operation=torch.neg), ns.SweepResult)
    assert_type(ns.causal_trace(model, "w3 w4", "w4"), ns.SweepResult)
    assert_type(ns.sweep_weights(model, tuned, "w3 w4", "layers[:].attn", METRIC), ns.SweepResult)
    ns.sweep(model, *PAIR, "layers[:]", "logit_diff")  # pyright: ignore[reportArgumentType]


def an_estimate(model: nn.Module) -> None:
    assert_type(ns.attribute(model, *PAIR, "layers[:].heads[:]", METRIC, verify=3), ns.SweepResult)
    assert_type(ns.path_patch(model, *PAIR, "layers[0].heads[:]", "unembed", METRIC), ns.SweepResult)


def steering(model: nn.Module, states: ns.SavedActivation) -> None:
    vector = ns.steering.fit(states.slice[0:2], states.slice[2:4])
    assert_type(vector, ns.steering.SteeringVector)
    assert_type(vector.at(1) * 2.0, ns.steering.SteeringVector)
    assert_type(vector.quality, dict[str, float])
    with ns.steering.steer(model, vector, [1.0, 2.0], where=ns.steering.from_token(-1)) as block:
        assert_type(block, ns.steering.Steering)
    assert_type(ns.steering.generate(model, "w3 w4", vector, 2.0, operator="clamp"), list[str])
    ns.steering.sweep(model, "w3", vector, [1.0], len, max_new_tokens=4)
    ns.steering.steer(model, vector, "2")  # pyright: ignore[reportArgumentType]


def weights(model: nn.Module, tuned: nn.Module, restrictions: list[str]) -> None:
    selection = ns.weights.select(model, "l5h3")
    assert_type(selection, ns.weights.Selection)
    assert_type(selection | ns.weights.select(model, restrictions), ns.weights.Selection)
    ns.weights.select(model, ["l5h3", ["l6 mlp"]])
    ns.weights.select(model, 5)  # pyright: ignore[reportArgumentType]
    masks = ns.weights.create_param_masks(model, restrictions)
    assert_type(masks, dict[str, Tensor | None])
    with ns.weights.swap(model, tuned, masks) as swapped:
        assert_type(swapped, nn.Module)
    with ns.weights.freeze_except(model, selection) as parameters:
        assert_type(parameters, list[nn.Parameter])
    assert_type(ns.weights.diff(model, tuned), pd.DataFrame)


def checkpoints(folder: Path) -> None:
    assert_type(ns.checkpoints.read(folder, "l5h3"), dict[str, Tensor])
    mapper = ns.checkpoints.Parallel([ns.checkpoints.Rename("a", "b"), ns.checkpoints.Cast("c", torch.float16)])
    assert_type(mapper.explain(folder), ns.checkpoints.Explanation)
    ns.checkpoints.Rename("a", 1)  # pyright: ignore[reportArgumentType]


def adapters(folder: Path, model: nn.Module) -> None:
    adapter = ns.adapters.ExpertAdapter.from_peft(folder, base=model)
    assert_type(adapter, ns.adapters.ExpertAdapter)
    assert_type(ns.adapters.profile(adapter).frame(), pd.DataFrame)


def figures(result: ns.SweepResult, vector: ns.steering.SteeringVector) -> None:
    assert_type(result.plot(), Axes)
    assert_type(vector.plot(ax=result.plot()), Axes)
