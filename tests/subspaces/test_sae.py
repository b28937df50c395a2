"""SAEs as values: the arithmetic of each kind written out again, the two file formats, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import nnsplice as ns
from nnsplice.errors import BadArgument, BadType, FileError, ShapeError
from nnsplice.subspaces.sae_files import write_sae
from nnsplice.subspaces.train_toy_sae import explained, states

WIDTH, FEATURES = 6, 20


def tensors_of(kind: str, seed: int = 0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    made = {"W_dec": (FEATURES, WIDTH), "b_dec": (WIDTH,), "W_enc": (WIDTH, FEATURES)}
    made |= dict.fromkeys(("b_gate", "b_mag", "r_mag") if kind == "gated" else ("b_enc",), (FEATURES,))
    found = {name: torch.randn(shape, generator=draw) for name, shape in made.items()}
    if kind in ("jumprelu", "batchtopk"):
        found["threshold"] = torch.rand(FEATURES, generator=draw)
    return found


def sae_of(kind: str, **options: Any) -> ns.SAE:
    return ns.SAE(kind, tensors_of(kind), k=4 if kind == "topk" else None, **options)


def _by_hand(sae: ns.SAE, x: list[float]) -> tuple[list[float], list[float]]:
    """Features and reconstruction of one token, number by number."""
    t = {name: tensor.double().tolist() for name, tensor in sae.tensors.items()}
    mean, low, high = 0.0, 1.0, 1.0
    if sae.norm == "layer_norm":
        mean = sum(x) / WIDTH
        high = math.sqrt(sum((value - mean) ** 2 for value in x) / (WIDTH - 1))
        low = high + 1e-5
    elif sae.norm == "constant_norm_rescale":
        low = high = math.sqrt(sum(value**2 for value in x)) / math.sqrt(WIDTH)
    inputs = [(value - mean) / low - (b if sae.centred else 0) for value, b in zip(x, t["b_dec"], strict=True)]
    along = [sum(inputs[i] * t["W_enc"][i][f] for i in range(WIDTH)) for f in range(FEATURES)]
    sizes = [math.sqrt(sum(value**2 for value in row)) for row in t["W_dec"]]
    if sae.kind == "gated":
        features = [
            max(along[f] * math.exp(t["r_mag"][f]) + t["b_mag"][f], 0.0) if along[f] + t["b_gate"][f] > 0 else 0.0
            for f in range(FEATURES)
        ]
    else:
        before = [along[f] + t["b_enc"][f] for f in range(FEATURES)]
        if sae.by_decoder_norm:
            before = [value * size for value, size in zip(before, sizes, strict=True)]
        if sae.kind == "topk":
            least = sorted(before)[-4]
            features = [max(value, 0.0) if value >= least else 0.0 for value in before]
        elif sae.kind == "standard":
            features = [max(value, 0.0) for value in before]
        else:
            features = [max(v, 0.0) if v > limit else 0.0 for v, limit in zip(before, t["threshold"], strict=True)]
    counted = [f / (size if sae.by_decoder_norm else 1) for f, size in zip(features, sizes, strict=True)]
    out = [sum(counted[f] * t["W_dec"][f][i] for f in range(FEATURES)) + t["b_dec"][i] for i in range(WIDTH)]
    return features, [value * high + mean for value in out]


@pytest.mark.parametrize("norm", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize(
    ("kind", "by_norm"),
    [("standard", False), ("topk", False), ("topk", True), ("batchtopk", True), ("jumprelu", False), ("gated", False)],
)
def test_every_kind_against_arithmetic_by_hand(kind: str, by_norm: bool, centred: bool, norm: str) -> None:
    sae = sae_of(kind, centred=centred, norm=norm, by_decoder_norm=by_norm)
    values = 3 * torch.randn(2, 5, WIDTH, dtype=torch.float64)
    features = sae.encode(values)
    out = sae.decode(features, values)
    for row in range(2):
        for token in range(5):
            expected, made = _by_hand(sae, values[row, token].tolist())
            assert np.allclose(features[row, token].tolist(), expected, rtol=1e-9, atol=1e-9)
            assert np.allclose(out[row, token].tolist(), made, rtol=1e-9, atol=1e-9)
    assert 0 < int((features > 0).sum()) < features.numel()
    assert torch.allclose(sae.error(values) + out, values, atol=1e-12)
    moved = features + torch.randn_like(features)
    difference = sae.decode(moved, values) - out
    assert torch.allclose(sae.added(moved - features, values), difference, atol=1e-9)
    assert torch.equal(sae.added(features - features, values), torch.zeros_like(values))


@pytest.mark.parametrize("kind", ["topk", "batchtopk"])
def test_a_feature_without_a_direction_adds_nothing(kind: str) -> None:
    tensors = tensors_of(kind)
    tensors["W_dec"][7] = 0
    sae = ns.SAE(kind, tensors, k=4 if kind == "topk" else None, by_decoder_norm=True)
    values = 3 * torch.randn(5, WIDTH, dtype=torch.float64)
    kept = [n for n in range(FEATURES) if n != 7]
    features = sae.encode(values)
    directions = sae.tensors["W_dec"][kept].double()
    expected = features[:, kept] @ (directions / directions.norm(dim=1, keepdim=True)) + sae.tensors["b_dec"].double()
    torch.testing.assert_close(sae.decode(features), expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(sae.added(torch.ones(5, 1), None, [7]), torch.zeros(5, WIDTH))


def test_the_toy_model_has_one() -> None:
    sae = ns.load_sae(ns.models.embedded("toy") / "sae")
    assert (sae.kind, sae.features, sae.width, sae.k) == ("topk", 256, 64, 8)
    assert explained(sae, states()[:2000]) > 0.95
    size = sum(file.stat().st_size for file in (ns.models.embedded("toy") / "sae").iterdir())
    assert size < 300_000


@pytest.mark.parametrize("kind", ["standard", "topk", "batchtopk", "jumprelu", "gated"])
def test_folders_of_saelens(kind: str, tmp_path: Path) -> None:
    sae = sae_of(
        kind, centred=True, norm="layer_norm", about={"model_name": "toy", "hook_name": "blocks.1.hook_mlp_out"}
    )
    write_sae(sae, tmp_path)
    read = ns.load_sae(tmp_path)
    assert read.identity == sae.identity
    assert read.about["hook_name"] == "blocks.1.hook_mlp_out"
    assert ns.load_sae(tmp_path / "cfg.json").identity == sae.identity


def test_params_of_gemma_scope(tmp_path: Path) -> None:
    tensors = tensors_of("jumprelu")
    arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in tensors.items()}
    np.savez(tmp_path / "params.npz", **arrays)
    sae = ns.load_sae(tmp_path)
    assert ns.load_sae(tmp_path / "params.npz").identity == sae.identity
    values = torch.randn(7, WIDTH)
    before = values @ tensors["W_enc"] + tensors["b_enc"]
    assert torch.equal(sae.encode(values), before.relu() * (before > tensors["threshold"]))
    np.savez(tmp_path / "more.npz", **arrays, skip=np.zeros(3))
    with pytest.raises(FileError, match=r"holds .*skip"):
        ns.load_sae(tmp_path / "more.npz")


def _folder(tmp_path: Path, kind: str = "standard", **config: Any) -> Path:
    save_file(tensors_of(kind), tmp_path / "sae_weights.safetensors")
    told = {"architecture": kind, "apply_b_dec_to_input": False, **config}
    (tmp_path / "cfg.json").write_text(json.dumps(told))
    return tmp_path


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"architecture": "matching_pursuit"}, "matching_pursuit"),
        ({"architecture": "skip_transcoder"}, "skip_transcoder"),
        ({"normalize_activations": "batch"}, "batch"),
        ({"normalize_activations": "expected_average_only_in"}, "scaling_factor"),
        ({"activation_fn": "tanh-relu"}, "tanh-relu"),
        ({"reshape_activations": "other"}, "reshape_activations"),
        ({"finetuning_scaling_factor": True}, "finetuning_scaling_factor"),
        ({"architecture": "topk", "k": 0}, "k=0"),
        ({"architecture": "gated"}, "without b_gate"),
        ({"architecture": "batchtopk"}, "depend on the batch"),
    ],
)
def test_what_is_not_known_is_refused_by_its_name(config: dict[str, Any], text: str, tmp_path: Path) -> None:
    with pytest.raises(FileError, match=text):
        ns.load_sae(_folder(tmp_path, **config))


def test_older_configs_name_topk_as_an_activation_function(tmp_path: Path) -> None:
    folder = _folder(tmp_path, activation_fn_str="topk", activation_fn_kwargs={"k": 3})
    sae = ns.load_sae(folder)
    assert (sae.kind, sae.k) == ("topk", 3)
    assert int((sae.encode(10 * torch.randn(1, WIDTH)) > 0).sum()) <= 3


def test_a_factor_of_the_inputs(tmp_path: Path) -> None:
    folder = _folder(tmp_path, normalize_activations="expected_average_only_in")
    scaled, plain = ns.load_sae(folder, scaling_factor=2.0), sae_of("standard")
    values = torch.randn(3, WIDTH)
    assert torch.allclose(scaled.encode(values), plain.encode(2 * values), atol=1e-6)
    assert torch.allclose(2 * scaled.decode(scaled.encode(values)), plain.decode(plain.encode(2 * values)), atol=1e-5)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize(
    ("kind", "by_norm"),
    [("standard", False), ("topk", False), ("topk", True), ("batchtopk", False), ("batchtopk", True),
     ("jumprelu", False), ("gated", False)],
)  # fmt: skip
def test_a_factor_of_every_kind_against_scaled_inputs(kind: str, by_norm: bool, centred: bool, tmp_path: Path) -> None:
    write_sae(sae_of(kind, centred=centred, by_decoder_norm=by_norm), tmp_path)
    plain = ns.load_sae(tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps({**config, "normalize_activations": "expected_average_only_in"}))
    scaled = ns.load_sae(tmp_path, scaling_factor=0.25)
    values = 8 * torch.randn(50, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = plain.encode(values / 4)
    found = scaled.encode(values)
    assert torch.allclose(scaled.decode(found), plain.decode(expected) * 4, atol=1e-5)
    assert torch.allclose(found, expected * (4 if by_norm else 1), atol=1e-5)
    assert 0 < int((found > 0).sum()) < found.numel()


@pytest.mark.parametrize(
    ("factor", "error", "text"),
    [(0, BadArgument, "scaling_factor=0"), (-2.0, BadArgument, "above 0"), (math.nan, BadArgument, "nan"),
     (math.inf, BadArgument, "inf"), ("2", BadType, "no number"), (True, BadType, "no number"),
     (torch.ones(3), BadType, "no number")],
)  # fmt: skip
def test_factors_that_are_none(factor: Any, error: type[Exception], text: str, tmp_path: Path) -> None:
    folder = _folder(tmp_path, normalize_activations="expected_average_only_in")
    with pytest.raises(error, match=text):
        ns.load_sae(folder, scaling_factor=factor)


def test_a_factor_where_none_is_used(tmp_path: Path) -> None:
    for norm in ("none", "layer_norm", "constant_norm_rescale"):
        with pytest.raises(BadArgument, match=r"scaling_factor=2.0 would change"):
            ns.load_sae(_folder(tmp_path, normalize_activations=norm), scaling_factor=2.0)
    arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in tensors_of("jumprelu").items()}
    np.savez(tmp_path / "params.npz", **arrays)
    with pytest.raises(BadArgument, match="would change"):
        ns.load_sae(tmp_path / "params.npz", scaling_factor=2.0)
    with pytest.raises(FileError, match=r"does not say what that is(.|\n)*scaling_factor=\.\.\."):
        ns.load_sae(_folder(tmp_path, normalize_activations="expected_average_only_in"))


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    np.savez(tmp_path / "params.npz", W_enc=np.array([Evil()], dtype=object))
    with pytest.raises(FileError, match="objects"):
        ns.load_sae(tmp_path / "params.npz")
    folder = _folder(tmp_path)
    torch.save({"W_enc": Evil()}, folder / "sae_weights.safetensors")
    with pytest.raises(FileError, match="pickle"):
        ns.load_sae(folder)
    assert not (tmp_path / "ran").exists()


def test_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="no SAE at"):
        ns.load_sae(tmp_path)
    (tmp_path / "params.npz").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(FileError, match="damaged"):
        ns.load_sae(tmp_path)
    folder = _folder(tmp_path)
    raw = (folder / "sae_weights.safetensors").read_bytes()
    (folder / "sae_weights.safetensors").write_bytes(raw[:-8])
    with pytest.raises(FileError, match="damaged"):
        ns.load_sae(folder)
    broken = {**tensors_of("standard"), "b_enc": torch.full((FEATURES,), math.nan)}
    save_file(broken, folder / "sae_weights.safetensors")
    with pytest.raises(FileError, match="b_enc holds NaN"):
        ns.load_sae(folder)
    save_file({**broken, "b_enc": torch.zeros(3)}, folder / "sae_weights.safetensors")
    with pytest.raises(FileError, match=r"b_enc of shape \[3\]"):
        ns.load_sae(folder)


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ({"apply_b_dec_to_input": "false"}, r"apply_b_dec_to_input is 'false'[\s\S]*true or false"),
        ({"rescale_acts_by_decoder_norm": 1}, "rescale_acts_by_decoder_norm is 1"),
        ({"k": True}, r"k is True[\s\S]*a whole number"),
        ({"k": None, "activation_fn_kwargs": {"k": True}}, "topk SAE with k=True"),
        ({"k": None, "activation_fn_kwargs": [4]}, r"activation_fn_kwargs is \[4\]"),
        ({"architecture": ["topk"]}, r"architecture is \['topk'\]"),
    ],
)
def test_settings_of_another_type_are_refused(setting: dict[str, Any], text: str, tmp_path: Path) -> None:
    folder = _folder(tmp_path, "topk", k=4)
    config = json.loads((folder / "cfg.json").read_text())
    changed = {name: value for name, value in {**config, **setting}.items() if value is not None}
    (folder / "cfg.json").write_text(json.dumps(changed))
    with pytest.raises(FileError, match=text):
        ns.load_sae(folder)


@pytest.mark.parametrize("kind", [torch.int32, torch.complex64])
def test_weights_that_are_no_floating_point_numbers_are_refused(kind: torch.dtype) -> None:
    with pytest.raises(BadArgument, match=str(kind)):
        ns.SAE("standard", {**tensors_of("standard"), "b_dec": torch.ones(WIDTH).to(kind)})


def test_a_factor_of_an_sae_of_half_precision_is_not_rounded(tmp_path: Path) -> None:
    folder = _folder(tmp_path, "standard", normalize_activations="expected_average_only_in")
    half = {name: tensor.bfloat16() for name, tensor in tensors_of("standard").items()}
    save_file(half, folder / "sae_weights.safetensors")
    sae = ns.load_sae(folder, scaling_factor=0.37)
    plain = ns.SAE("standard", {name: tensor.double() for name, tensor in half.items()}, centred=sae.centred)
    values = torch.randn(5, WIDTH, dtype=torch.float64)
    expected = plain.decode(plain.encode(values * 0.37)) / 0.37
    torch.testing.assert_close(sae.decode(sae.encode(values)), expected, rtol=1e-5, atol=1e-5)


def test_features_as_a_subspace() -> None:
    sae = sae_of("standard")
    subspace = sae.subspace("layers[1].output", [3, 5])
    directions = sae.tensors["W_dec"][[3, 5]].double()
    assert torch.allclose(directions @ subspace.basis @ subspace.basis.T, directions, atol=1e-9)
    assert subspace.about["features"] == [3, 5]
    with pytest.raises(BadArgument, match="no feature 20"):
        sae.subspace("layers[1].output", [20])


def test_values_that_do_not_fit() -> None:
    with pytest.raises(ShapeError, match="5 wide"):
        sae_of("standard").encode(torch.randn(2, 5))
    scaled = sae_of("standard", norm="layer_norm")
    with pytest.raises(BadArgument, match="scales its inputs"):
        scaled.decode(torch.zeros(1, FEATURES))
