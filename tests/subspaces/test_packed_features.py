"""Features and errors in packed rows: against runs of their own, and against torch's hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import nnsplice as ns
from nnsplice.activations.features import AT_ONCE
from nnsplice.atlas import unwrap
from nnsplice.errors import BadArgument, UnknownPath
from zoo import double

WIDTH, FEATURES = 16, 24
TEXTS = ["w3 w4 w5 w6", "w7 w8 w9 w10 w11"]
OTHERS = ["w3 w14 w5 w6", "w17 w8 w9 w10 w11"]
METRIC = ns.logit_diff("w7", "w8")
PLACES = ("layers[0].mlp.output", "layers[1].output", "layers[2].attn.output", "layers[2].input", "layers[2].output")


def sae_of(kind: str = "jumprelu", norm: str = "none", seed: int = 0) -> ns.SAE:
    draw = torch.Generator().manual_seed(seed)
    shapes = {"W_enc": (WIDTH, FEATURES), "W_dec": (FEATURES, WIDTH), "b_enc": (FEATURES,), "b_dec": (WIDTH,)}
    tensors = {name: torch.randn(shape, generator=draw, dtype=torch.float64) for name, shape in shapes.items()}
    tensors["threshold"] = 0.1 * torch.rand(FEATURES, generator=draw, dtype=torch.float64)
    by_norm = kind == "topk" and norm == "none"
    return ns.SAE(kind, tensors, k=5 if kind == "topk" else None, norm=norm, centred=True, by_decoder_norm=by_norm)


def _swept(model: Any, sites: Any, executor: str, operation: Any = "patch", **more: Any) -> np.ndarray:
    clean = TEXTS if operation == "patch" else None
    result = ns.sweep(
        model, clean, OTHERS, sites, METRIC, operation=operation, executor=executor, progress=False, **more
    )
    assert result.run.executor == executor
    return result.table.values


def _half(values: Tensor) -> Tensor:
    return values / 2 + 1


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("family", "kind", "norm"),
    [("gpt2", "jumprelu", "none"), ("llama", "topk", "none"), ("llama", "jumprelu", "layer_norm"),
     ("gptj", "topk", "constant_norm_rescale"), ("gpt_neo", "jumprelu", "none")],
)  # fmt: skip
def test_packed_rows_are_runs_of_their_own(family: str, kind: str, norm: str, place: str) -> None:
    model = double(family)
    at = ns.attach_sae(model, place, sae_of(kind, norm), "s")
    sites = [f"{at}.features[2::9]", f"{at}.error"]
    found = _swept(model, sites, "packed")
    assert np.nanmax(np.abs(found - _swept(model, sites, "reference"))) < 1e-12
    assert np.nanstd(found[0]) > 1e-9


@pytest.mark.parametrize("operation", ["patch", "zero", "noise", _half])
@pytest.mark.parametrize("kind", ["jumprelu", "topk"])
def test_sets_of_parts_at_one_token(operation: Any, kind: str) -> None:
    model = double("llama")
    at = ns.attach_sae(model, "layers[1].output", sae_of(kind), "s")
    other = ns.attach_sae(model, "layers[1].output", sae_of(kind, seed=1), "t")
    sites = [
        [f"{at}.features[0:12][1]", f"{at}.error[1]"],
        [f"{at}.features[:][2]", f"{at}.features[3][1]", "layers[0].output[1]", "layers[2].heads[1].output[3]"],
        [f"{at}.features[2,5,8][1]", f"{other}.features[0:4][1]"],
        [f"{at}.features[::5]"],
    ]
    found = _swept(model, sites, "packed", operation)
    assert np.nanmax(np.abs(found - _swept(model, sites, "reference", operation))) < 1e-12


@pytest.mark.parametrize("operation", ["mean", "resample", "add"])
def test_values_of_a_reference(operation: str) -> None:
    model = double("gpt2")
    at = ns.attach_sae(model, "layers[1].output", sae_of(), "s")
    sites = [f"{at}.features[2::9][1]", f"{at}.error[1]"]
    reference = ns.capture(model, ["w20 w21 w22", "w23 w24 w25", "w26 w27 w28"], sites)
    found = _swept(model, sites, "packed", operation, reference=reference)
    assert np.nanmax(np.abs(found - _swept(model, sites, "reference", operation, reference=reference))) < 1e-12


def _by_hooks(model: Any, text: str, change: Callable[[Tensor], Tensor]) -> float:
    """The metric of a run whose stream behind layer 1 is changed, with torch's hooks alone."""
    root: Any = unwrap(model)
    handle = root.model.layers[1].register_forward_hook(lambda _m, _a, out: change(out))
    with torch.no_grad():
        logits = root(torch.tensor([[int(word[1:]) for word in text.split()]])).logits[0, -1]
    handle.remove()
    return float(logits[7] - logits[8])


def test_packed_cells_are_what_hooks_give() -> None:
    model, sae = double("llama"), sae_of("topk")
    at = ns.attach_sae(model, "layers[1].output", sae, "s")
    kept: list[Tensor] = []
    for text in (TEXTS[0], OTHERS[0]):
        _by_hooks(model, text, lambda h: kept.append(h) or h)
    clean, here = kept
    result = ns.sweep(
        model, TEXTS[0], OTHERS[0], [f"{at}.features[:]", f"{at}.error"], METRIC, executor="packed", progress=False
    )
    features = result.grid('layers[:].output.sae["s"].features[:]').values[0, 0]
    errors = result.grid('layers[:].output.sae["s"].error').values[0, 0]
    moved = sae.encode(clean) - sae.encode(here)
    apart = sae.error(clean) - sae.error(here)

    def at_token(token: int, step: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda h: torch.cat([h[:, :token], h[:, token : token + 1] + step, h[:, token + 1 :]], 1)

    for token in range(4):
        for number in range(0, FEATURES, 3):
            step = moved[:, token : token + 1, [number]] * sae._directions(here, [number])[0]
            assert abs(features[number, token] - _by_hooks(model, OTHERS[0], at_token(token, step))) < 1e-12
        expected = _by_hooks(model, OTHERS[0], at_token(token, apart[:, token : token + 1]))
        assert abs(errors[token] - expected) < 1e-12
    assert features.std() > 1e-6


def test_the_same_value_keeps_every_bit() -> None:
    model = double("llama")
    at = ns.attach_sae(model, "layers[1].output", sae_of("topk"), "s")
    parts = [f"{at}.features[:][1]", f"{at}.error[1]"]
    found = _swept(model, [*parts, parts], "packed", lambda values: values)
    unchanged = _swept(model, ["layers[1].output[1]"], "packed", lambda values: values)
    assert np.array_equal(found, np.broadcast_to(unchanged, found.shape))
    saved = ns.capture(model, OTHERS[0], f"{at}.features[:][1]")
    dead = np.array([float(saved[f"{at}.features[{number}][1]"]) == 0 for number in range(FEATURES)])
    zeroed = _swept(model, [f"{at}.features[:][1]"], "packed", "zero")
    assert 0 < dead.sum() < FEATURES
    assert np.array_equal((zeroed == unchanged)[0], dead)


def test_rows_that_are_the_same_are_encoded_once_and_many_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = double("gpt2")
    at = ns.attach_sae(model, "layers[1].output", sae_of(), "s")
    sites = [f"{at}.features[:]"]
    expected = _swept(model, sites, "packed")
    encoded: list[int] = []
    encode = ns.SAE.encode
    monkeypatch.setattr(
        ns.SAE, "encode", lambda sae, values: encoded.append(values[..., 0].numel()) or encode(sae, values)
    )
    monkeypatch.setattr("nnsplice.activations.features.AT_ONCE", 2 * FEATURES)
    assert AT_ONCE > 2 * FEATURES
    assert np.nanmax(np.abs(_swept(model, sites, "packed") - expected)) < 1e-12
    assert max(encoded[-3:]) <= 2


def test_updates_of_parts_at_one_token_add_up() -> None:
    model, sae = double("llama"), sae_of("topk")
    at = ns.attach_sae(model, "layers[1].output", sae, "s")
    with model.trace(OTHERS[0]):
        for _, current, update in ns.updates(model, [f"{at}.features[{n}][1]" for n in range(12)] + [f"{at}.error[1]"]):
            update(current * 0)
        logits = model.output.logits.detach().save()

    def change(h: Tensor) -> Tensor:
        features = sae.encode(h[:, 1:2])
        features[..., 12:] = 0
        return torch.cat([h[:, :1], h[:, 1:2] - sae.added(features, None) - sae.error(h[:, 1:2]), h[:, 2:]], 1)

    assert abs(float(logits[0, -1, 7] - logits[0, -1, 8]) - _by_hooks(model, OTHERS[0], change)) < 1e-12


def test_whole_batches_have_no_features() -> None:
    model = double("gpt2")
    at = ns.attach_sae(model, "layers[1].output", sae_of(), "s")
    with pytest.raises(BadArgument, match='"packed", "reference" or "auto"'):
        _swept(model, f"{at}.features[0][1]", "batched")


def test_values_of_another_model_are_read_by_the_same_sae() -> None:
    model, other = double("llama"), double("llama")
    with torch.no_grad():
        for number, parameter in enumerate(other._module.parameters()):
            draw = torch.Generator().manual_seed(number)
            parameter += 0.01 * torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
    at = ns.attach_sae(model, "layers[1].output", sae_of(), "s")
    sites = [f"{at}.features[2::9][1]", f"{at}.error[1]"]
    with pytest.raises(UnknownPath, match="no SAE 's'"):
        ns.sweep(model, OTHERS[0], None, sites, METRIC, source=other, progress=False)
    ns.attach_sae(other, "layers[1].output", sae_of(seed=1), "s")
    with pytest.raises(BadArgument, match="another SAE 's'"):
        ns.sweep(model, OTHERS[0], None, sites, METRIC, source=other, progress=False)
    ns.detach_sae(other, "s")
    ns.attach_sae(other, "layers[1].output", sae_of(), "s")
    packed, reference = (
        ns.sweep(model, OTHERS[0], None, sites, METRIC, source=other, executor=name, progress=False).table.values
        for name in ("packed", "reference")
    )
    assert np.abs(packed - reference).max() < 1e-12


def test_a_plan_runs_with_the_sae_that_it_was_made_with() -> None:
    model = double("llama")
    at = ns.attach_sae(model, "layers[1].output", sae_of(), "s")
    plan = ns.plan_sweep(model, TEXTS, OTHERS, f"{at}.features[2][1]", METRIC)
    found = ns.run(plan, model, progress=False).table.values
    ns.detach_sae(model, "s")
    with pytest.raises(UnknownPath, match="none of this name"):
        ns.run(plan, model, progress=False)
    ns.attach_sae(model, "layers[1].output", sae_of(seed=1), "s")
    with pytest.raises(BadArgument, match="another SAE of this name"):
        ns.run(plan, model, progress=False)
    ns.detach_sae(model, "s")
    ns.attach_sae(model, "layers[1].output", sae_of(), "s")
    assert np.array_equal(ns.run(plan, model, progress=False).table.values, found, equal_nan=True)
