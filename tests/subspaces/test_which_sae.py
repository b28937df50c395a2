"""What was made with one SAE is not taken for that of another with its name: plans, journals, circuits, captures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import nnsplice as ns
from nnsplice.errors import BadArgument, FileError, KeyMismatch, UnknownPath
from subspaces.test_packed_features import METRIC, sae_of
from zoo import wrap

PAIR = ["w3 w4 w5 w6", "w3 w9 w8"], ["w3 w14 w5 w6", "w3 w20 w8"]
PLACE = "layers[1].mlp.output"
AT = f'{PLACE}.sae["s"]'
OTHERS = ["embed", "layers[:].heads[:]", "layers[0].mlp", "layers[2].mlp"]


def _model(seed: int = 0, *, weights: float = 1.0) -> Any:
    model = wrap("llama")
    model._module.double()
    with torch.no_grad():
        for parameter in model._module.parameters():
            parameter.mul_(weights)
    ns.attach_sae(model, PLACE, sae_of(seed=seed), "s")
    return model


def _attach(model: Any, seed: int) -> None:
    ns.detach_sae(model, "s")
    ns.attach_sae(model, PLACE, sae_of(seed=seed), "s")


def _vector(number: int, value: float = 1.0) -> ns.SavedActivation:
    return ns.SavedActivation.from_pairs((f"{AT}.features[{number}][-1]", torch.tensor([[value]]).double()))


def _circuit(model: Any) -> ns.Circuit:
    return ns.Circuit.of(nodes=[*OTHERS, f"{AT}.features[3]", f"{AT}.features[5]"], model=model)


PLANS: dict[str, Callable[[Any], Any]] = {
    "attribute": lambda model: ns.plan(ns.attribute, model, *PAIR, f"{AT}.features[0:6]", METRIC),
    "path_patch": lambda model: ns.plan(ns.path_patch, model, *PAIR, f"{AT}.features[0:6]", "unembed", METRIC),
    "capture": lambda model: ns.plan(ns.capture, model, PAIR[0], f"{AT}.features[0:6][-1]"),
    "faithfulness": lambda model: ns.plan(ns.faithfulness, model, ns.Circuit.of(_circuit(model).nodes), *PAIR, METRIC),
    "steering": lambda model: ns.plan(ns.steering.sweep, model, PAIR[0], _vector(3), [1.0], METRIC),
    "sweep": lambda model: ns.plan_sweep(model, *PAIR, f"{AT}.features[0:6][-1]", METRIC),
}


@pytest.mark.filterwarnings("ignore:the model and the empty circuit")
@pytest.mark.parametrize("name", PLANS)
def test_a_plan_runs_with_its_own_sae_alone(name: str) -> None:
    model = _model()
    plan = PLANS[name](model)
    ns.run(plan, model, progress=False)
    _attach(model, 1)
    with pytest.raises(BadArgument, match="another SAE of this name, 's'"):
        ns.run(plan, model, progress=False)
    ns.detach_sae(model, "s")
    with pytest.raises(UnknownPath):
        ns.run(plan, model, progress=False)
    ns.attach_sae(model, PLACE, sae_of(), "s")
    ns.run(plan, model, progress=False)


def test_a_worker_with_another_sae_refuses_the_unit(tmp_path: Path) -> None:
    with pytest.raises(ns.errors.TeamError, match="another SAE of this name"):
        ns.run(
            ns.plan_sweep(_model(1), *PAIR, f"{AT}.features[0:6][-1]", METRIC), "sweep_functions:with_sae",
            on="local:1", out=tmp_path / "run", progress=False,
        )  # fmt: skip


def test_the_source_of_values_has_the_sae_of_the_plan() -> None:
    model, source = _model(), _model(weights=1.05)
    plan = ns.plan_sweep(model, PAIR[1], None, f"{AT}.features[0:6][-1]", METRIC, source=source)
    found = ns.run(plan, model, source=source, progress=False).table.values
    _attach(source, 1)
    with pytest.raises(BadArgument, match="another SAE of this name"):
        ns.run(plan, model, source=source, progress=False)
    _attach(source, 0)
    assert np.array_equal(ns.run(plan, model, source=source, progress=False).table.values, found, equal_nan=True)


def test_circuits_and_scores_are_of_the_sae_that_they_were_made_with(tmp_path: Path) -> None:
    model = _model()
    sites = [*OTHERS, f"{AT}.features[:]", f"{AT}.error"]
    scores = ns.attribute(model, *PAIR, sites, METRIC, method="eap", progress=False)
    made, top = _circuit(model), ns.Circuit.top(scores, 60, model=model)
    made.to_file(tmp_path / "circuit.json")
    each = [made, top, ns.Circuit.from_file(tmp_path / "circuit.json"), made | _circuit(model)]
    for circuit in each:
        circuit.run(model, *PAIR, METRIC)
    _attach(model, 1)
    for circuit in each:
        with pytest.raises(BadArgument, match="another SAE of this name"):
            circuit.run(model, *PAIR, METRIC)
    with pytest.raises(BadArgument, match="another SAE of this name"):
        ns.faithfulness(model, scores, *PAIR, METRIC, progress=False)
    with pytest.raises(KeyMismatch, match="an SAE 's'"):
        _ = made | _circuit(model)
    # Taken over on purpose; and without a feature the SAE is nothing to a circuit.
    assert made.on(model).run(model, *PAIR, METRIC).shape == (2,)
    rest = made - ns.Circuit.of(nodes=[f"{AT}.features[3]", f"{AT}.features[5]"])
    ns.detach_sae(model, "s")
    assert rest.run(model, *PAIR, METRIC).shape == (2,)


def test_captured_features_are_written_through_their_own_sae(tmp_path: Path) -> None:
    model = _model()
    sites = [f"{AT}.features[0:6][1]", "layers[0].output[1]"]
    saved = ns.capture(model, PAIR[0], sites)
    saved.to_file(tmp_path / "saved.safetensors")
    with model.trace(PAIR[0][:1]):
        traced = ns.save_activations(model, sites)
    read = ns.SavedActivation.from_file(tmp_path / "saved.safetensors")
    vector = ns.steering.SteeringVector.of(saved.subset(f"{AT}.features[3][1]").mean())
    _attach(model, 1)
    other = ns.capture(model, PAIR[0], sites)
    for one in (saved, read, saved.mean(), saved * 2.0, saved.slice[0:1], traced, saved - saved.mean()):
        with pytest.raises(BadArgument, match="another SAE of this name"):
            ns.patched_logits(model, PAIR[1][:1] if one.rows == 1 else PAIR[1], one)
    with pytest.raises(BadArgument, match="another SAE of this name"):
        ns.sweep(model, None, PAIR[1], sites[0], METRIC, operation="mean", reference=saved, progress=False)
    with pytest.raises(BadArgument, match="another SAE of this name"):
        ns.steering.steer(model, vector)
    with pytest.raises(BadArgument, match="another SAE of this name"), model.trace(PAIR[1]):
        saved.apply(model)
    with pytest.raises(KeyMismatch, match="two SAEs"):
        _ = saved - other
    ns.patched_logits(model, PAIR[1], saved.subset(sites[1]))
    ns.patched_logits(model, PAIR[1], other)


def test_a_folder_of_captures_goes_on_with_its_own_sae(tmp_path: Path) -> None:
    model = _model()
    texts = ["w3 w4", "w5 w6", "w7 w8", "w9 w10"]
    sites = f"{AT}.features[0:6][-1]"
    ns.capture_to(tmp_path / "held", model, texts[:2], sites, chunk=2, progress=False)
    (tmp_path / "held" / "index.json").unlink()
    _attach(model, 1)
    with pytest.raises(FileError, match="saes"):
        ns.capture_to(tmp_path / "held", model, texts, sites, chunk=2, progress=False)
    _attach(model, 0)
    held = ns.capture_to(tmp_path / "held", model, texts, sites, chunk=2, progress=False)
    expected = ns.capture(model, texts, sites)
    found = torch.cat(list(held.tokens(f"{AT}.features[3]", batch_size=4)))
    assert torch.equal(found, expected[f"{AT}.features[3][-1]"])


def test_a_journal_of_steering_is_of_one_feature_and_one_sae(tmp_path: Path) -> None:
    model = _model()

    def swept(number: int, journal: str | None = "one", **options: Any) -> np.ndarray:
        path = None if journal is None else tmp_path / f"{journal}.jsonl"
        return ns.steering.sweep(
            model, PAIR[0], _vector(number), [0.0, 4.0], METRIC, journal=path, progress=False, **options
        ).values

    first = swept(3)
    assert np.array_equal(swept(3), first)
    with pytest.raises(FileError, match="another sweep"):
        swept(7)
    assert not np.allclose(swept(7, None), first)
    with pytest.raises(FileError, match="another sweep"):
        swept(3, operator="clamp")
    _attach(model, 1)
    with pytest.raises(FileError, match="another sweep"):
        swept(3)
    _attach(model, 0)
    ns.sweep(model, *PAIR, f"{AT}.features[3][-1]", METRIC, progress=False)
    assert np.array_equal(swept(3), first)
    result = ns.steering.sweep(model, PAIR[0], _vector(3), [4.0], METRIC, progress=False)
    assert result.paths == (f"{AT}.features[3]",)


def test_an_sae_that_is_trained_on_is_another_one(tmp_path: Path) -> None:
    model = _model()
    tensors = {name: tensor.clone().requires_grad_() for name, tensor in sae_of().tensors.items()}
    ns.detach_sae(model, "s")
    ns.attach_sae(model, PLACE, ns.SAE("jumprelu", tensors, centred=True), "s")

    def swept(journal: Path | None = None) -> np.ndarray:
        sites = f"{AT}.features[0:6][-1]"
        return ns.sweep(model, *PAIR, sites, METRIC, journal=journal, progress=False).table.values

    first = swept(tmp_path / "journal.jsonl")
    with torch.no_grad():
        tensors["W_dec"].mul_(2.0)
    with pytest.raises(FileError, match="another sweep"):
        swept(tmp_path / "journal.jsonl")
    assert not np.array_equal(swept(), first)
