"""Transcoders: read at one place and written at another, against plain hooks; their files; what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import nnsplice as ns
from nnsplice.atlas import unwrap
from nnsplice.errors import BadArgument, FileError, RefusedPlace, ShapeError
from subspaces.test_packed_features import sae_of
from zoo import wrap

WIDTH, FEATURES = 16, 24
CLEAN, CORRUPTED = "w3 w4 w5 w6", "w3 w14 w5 w6"
METRIC = ns.logit_diff("w7", "w8")
AT = 'layers[1].mlp.output.sae["t"]'
#: What enters the MLP, before and behind its norm.
READS = ["layers[1].mid", "model.model.layers[1].mlp.input"]
reads_each = pytest.mark.parametrize("reads", READS)


def transcoder(*, skip: bool = False, kind: str = "standard", read: int = WIDTH) -> ns.SAE:
    draw = torch.Generator().manual_seed(5)
    shapes = {"W_enc": (read, FEATURES), "W_dec": (FEATURES, WIDTH), "b_enc": (FEATURES,), "b_dec": (WIDTH,)}
    shapes |= {"W_skip": (WIDTH, read)} if skip else {}
    tensors = {name: torch.randn(shape, generator=draw, dtype=torch.float64) for name, shape in shapes.items()}
    if kind == "jumprelu":
        tensors["threshold"] = torch.rand(FEATURES, generator=draw, dtype=torch.float64)
    return ns.SAE(kind, tensors, transcoder=True)


def _model(reads: str, sae: ns.SAE | None = None) -> Any:
    model = wrap("llama")
    model._module.double()
    assert ns.attach_sae(model, "layers[1].mlp.output", sae or transcoder(), "t", reads=reads) == AT
    return model


def _features(sae: ns.SAE, values: Tensor) -> Tensor:
    t = sae.tensors
    before = values @ t["W_enc"] + t["b_enc"]
    return before.relu() * (before > t.get("threshold", torch.zeros(1)))


def _run(model: Any, text: str, reads: str, change: Callable[[Tensor, Tensor], Tensor]) -> float:
    """The metric where what the MLP adds is changed, knowing what it was given, with torch's hooks alone."""
    root: Any = unwrap(model)
    layer, given = root.model.layers[1], []
    source = layer.post_attention_layernorm if reads.startswith("layers") else layer.mlp
    hooks = [
        source.register_forward_pre_hook(lambda _m, args: given.append(args[0].clone())),
        layer.mlp.register_forward_hook(lambda _m, _a, out: change(given[-1], out)),
    ]
    with torch.no_grad():
        logits = root(torch.tensor([[int(w[1:]) for w in text.split()]])).logits[0, -1]
    for hook in hooks:
        hook.remove()
    return float(logits[7] - logits[8])


def _given(model: Any, text: str, reads: str) -> Tensor:
    kept: list[Tensor] = []
    _run(model, text, reads, lambda given, out: kept.append(given) or out)
    return kept[0]


@reads_each
def test_features_are_read_where_the_transcoder_reads(reads: str) -> None:
    model, sae = _model(reads), transcoder()
    saved = ns.capture(model, CLEAN, [f"{AT}.features[:][:]", "layers[1].mlp.output[:]", "layers[1].neurons[3][-1]"])
    expected = _features(sae, _given(model, CLEAN, reads))
    assert int((expected > 0).sum()) > 20
    for number in range(FEATURES):
        for token in range(4):
            found = saved[f"{AT}.features[{number}][{token}]"]
            assert torch.allclose(found, expected[:, token, [number]], rtol=0, atol=1e-12)


@reads_each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_writing_what_is_there_keeps_every_bit(reads: str, dtype: torch.dtype) -> None:
    model = _model(reads)
    model._module.to(dtype)
    saved = ns.capture(model, CLEAN, f"{AT}.features[:][:]")
    with torch.no_grad():
        expected = unwrap(model)(torch.tensor([[3, 4, 5, 6]])).logits  # type: ignore[operator]
    assert torch.equal(ns.patched_logits(model, CLEAN, saved), expected)


@reads_each
@pytest.mark.parametrize("skip", [False, True])
def test_a_sweep_writes_what_a_feature_adds_to_the_mlp(reads: str, skip: bool) -> None:
    sae = transcoder(skip=skip, kind="jumprelu")
    model = _model(reads, sae)
    result = ns.sweep(
        model, CLEAN, CORRUPTED, [f"{AT}.features[0:9:2]", [f"{AT}.features[1,4,7][2]"]], METRIC, progress=False
    )
    assert result.run.executor == "reference" and "runs by itself" in result.run.note
    assert result.asked["saes"]["t"]["reads"] == ns.expand(model, reads)[0].place.__str__()
    clean, here = (_features(sae, _given(model, text, reads)) for text in (CLEAN, CORRUPTED))
    for cell, found in zip(result.table.cells, result.table.values[0], strict=True):
        numbers: Any = [1, 4, 7] if cell.set else [cell.feature]
        token: Any = 2 if cell.set else cell.position
        moved = ((clean - here)[0, token, numbers, None] * sae.tensors["W_dec"][numbers]).sum(0)

        def change(_given: Tensor, out: Tensor, token: Any = token, moved: Tensor = moved) -> Tensor:
            return torch.cat([out[:, :token], out[:, token : token + 1] + moved, out[:, token + 1 :]], 1)

        assert abs(found - _run(model, CORRUPTED, reads, change)) < 1e-12
    assert np.nanstd(result.table.values[0]) > 1e-6


@reads_each
def test_operations_on_the_running_value(reads: str) -> None:
    model, sae = _model(reads), transcoder()
    sites = [[f"{AT}.features[0:12][1]"], f"{AT}.features[5][2]"]
    found = ns.sweep(model, None, CORRUPTED, sites, METRIC, operation="zero", progress=False).table.values[0]

    def zeroed(numbers: list[int], token: int) -> Callable[[Tensor, Tensor], Tensor]:
        def change(given: Tensor, out: Tensor) -> Tensor:
            new = out.clone()
            new[:, token] -= _features(sae, given)[:, token, numbers] @ sae.tensors["W_dec"][numbers]
            return new

        return change

    expected = [
        _run(model, CORRUPTED, reads, zeroed([5], 2)),
        _run(model, CORRUPTED, reads, zeroed(list(range(12)), 1)),
    ]
    assert np.allclose(sorted(found), sorted(expected), rtol=0, atol=1e-12)
    with model.trace(CORRUPTED):
        for _, current, update in ns.updates(model, [f"{AT}.features[{n}][1]" for n in range(12)]):
            update(current * 0)
        logits = model.output.logits[0, -1].detach().save()
    assert abs(float(logits[7] - logits[8]) - expected[1]) < 1e-12


def test_a_transcoder_of_another_width() -> None:
    sae = transcoder(read=6)
    values = torch.randn(3, 6, dtype=torch.float64)
    assert torch.allclose(
        sae.decode(sae.encode(values)), _features(sae, values) @ sae.tensors["W_dec"] + sae.tensors["b_dec"]
    )
    skip = transcoder(skip=True, read=6)
    expected = (
        _features(skip, values) @ skip.tensors["W_dec"] + skip.tensors["b_dec"] + values @ skip.tensors["W_skip"].T
    )
    assert torch.allclose(skip.decode(skip.encode(values), values), expected)
    with pytest.raises(BadArgument, match="adds its inputs"):
        skip.decode(skip.encode(values))
    with pytest.raises(BadArgument, match="error takes both"):
        skip.error(values)
    with pytest.raises(ShapeError, match="transcoder reads a site 6 wide"):
        sae.encode(torch.randn(3, WIDTH))
    with pytest.raises(ShapeError, match="reads 6 numbers, and this site is 16"):
        _model(READS[0], sae)


# --- files ------------------------------------------------------------------------------------------------------------


def _folder(path: Path, sae: ns.SAE, architecture: str, **config: Any) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in sae.tensors.items()}, path / "sae_weights.safetensors")
    told = {"architecture": architecture, "d_in": sae.reads, "d_out": WIDTH, "apply_b_dec_to_input": False, **config}
    (path / "cfg.json").write_text(json.dumps(told))
    return path


@pytest.mark.parametrize(
    ("architecture", "options"),
    [("transcoder", {}), ("skip_transcoder", {"skip": True}), ("jumprelu_transcoder", {"kind": "jumprelu"}),
     ("jumprelu_skip_transcoder", {"kind": "jumprelu", "skip": True})],
)  # fmt: skip
def test_transcoders_of_saelens_are_read(architecture: str, options: dict[str, Any], tmp_path: Path) -> None:
    made = transcoder(read=6, **options)
    read = ns.load_sae(_folder(tmp_path, made, architecture))
    assert read.identity == made.identity and read.transcoder
    values = torch.randn(3, 6, dtype=torch.float64)
    assert torch.equal(read.encode(values), made.encode(values))


@pytest.mark.parametrize(
    ("architecture", "skip", "config", "text"),
    [("skip_transcoder", False, {}, "no W_skip"), ("transcoder", True, {}, "has W_skip"),
     ("transcoder", False, {"normalize_activations": "layer_norm"}, "scales its inputs"),
     ("transcoder", False, {"apply_b_dec_to_input": True}, "no bias"),
     ("cross_layer_transcoder", False, {}, "cross_layer_transcoder")],
)  # fmt: skip
def test_other_transcoders_are_refused_by_name(
    architecture: str, skip: bool, config: dict[str, Any], text: str, tmp_path: Path
) -> None:
    with pytest.raises(FileError, match=text):
        ns.load_sae(_folder(tmp_path, transcoder(skip=skip), architecture, **config))


# --- what is refused --------------------------------------------------------------------------------------------------


def test_attaching_says_what_is_missing() -> None:
    model = wrap("llama")
    with pytest.raises(BadArgument, match="reads another site than it is written to"):
        ns.attach_sae(model, "layers[1].mlp.output", transcoder(), "t")
    with pytest.raises(BadArgument, match="does not run before"):
        ns.attach_sae(model, "layers[1].mlp.output", transcoder(), "t", reads="layers[1].output")
    with pytest.raises(BadArgument, match="3 sites"):
        ns.attach_sae(model, "layers[1].mlp.output", transcoder(), "t", reads="layers[:].mid")
    with pytest.raises(BadArgument, match="reads the site that it is of"):
        ns.attach_sae(model, "layers[1].mlp.output", sae_of(), "t", reads="layers[1].mid")
    with pytest.raises(RefusedPlace, match="stands whole"):
        ns.attach_sae(model, "layers[1].mlp.output", transcoder(), "t", reads="layers[1].heads[0].q")
    with pytest.raises(BadArgument, match="cross-layer transcoder"):
        ns.attach_sae(model, "layers[1:].mlp.output", transcoder(), "t", reads="layers[1].mid")


def test_what_does_not_take_them_says_so() -> None:
    model = _model(READS[0])
    one = f"{AT}.features[3]"
    pair = (model, CLEAN, CORRUPTED)
    with pytest.raises(RefusedPlace, match="what a transcoder leaves out"):
        ns.capture(model, CLEAN, f"{AT}.error[-1]")
    with pytest.raises(BadArgument, match="derived from several values"):
        ns.sweep(*pair, f"{one}[1]", METRIC, executor="packed", progress=False)
    for method in ("atp", "atp*", "ig", "eap", "eap-ig", "relp", "ifr", "exact"):
        with pytest.raises(RefusedPlace, match="transcoder"):
            ns.attribute(*pair, one, METRIC, method=method, progress=False)
    with pytest.raises(RefusedPlace, match="derived"):
        ns.path_patch(*pair, one, "unembed", METRIC, progress=False)
    with pytest.raises(RefusedPlace, match="a transcoder reads what enters the MLP"):
        ns.Circuit.of(nodes=["embed", one], model=model).run(*pair, METRIC)
    vector = ns.SavedActivation.from_pairs((f"{one}[-1]", torch.ones(1, 1)))
    with pytest.raises(RefusedPlace, match="feature of a transcoder is derived"):
        ns.steering.steer(model, vector)
    with pytest.raises(ValueError, match="in one set"):
        ns.sweep(*pair, [[f"{one}[1]", "layers[1].mlp.output[1]"]], METRIC, progress=False)
