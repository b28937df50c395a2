"""Features of an attached SAE as sites: captures, writes, sweeps, gradients and steering against plain hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import nnsplice as ns
from nnsplice.atlas import unwrap
from nnsplice.errors import BadArgument, BadType, PathError, RefusedPlace, ShapeError, UnknownPath
from zoo import wrap

WIDTH, FEATURES, LAYER = 16, 24, 1
TEXTS = ["w3 w4 w5 w6", "w7 w8 w9 w10"]
OTHERS = ["w3 w14 w5 w6", "w17 w8 w9 w10"]
AT = 'layers[1].output.sae["s"]'
METRIC = ns.logit_diff("w7", "w8")


def _sae(norm: str = "none", kind: str = "jumprelu") -> ns.SAE:
    draw = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (WIDTH, FEATURES), "W_dec": (FEATURES, WIDTH), "b_enc": (FEATURES,), "b_dec": (WIDTH,)}
    tensors = {name: torch.randn(shape, generator=draw, dtype=torch.float64) for name, shape in shapes.items()}
    tensors["threshold"] = 0.1 * torch.rand(FEATURES, generator=draw, dtype=torch.float64)
    return ns.SAE(kind, tensors, k=5 if kind == "topk" else None, norm=norm, centred=True)


@pytest.fixture(params=["gpt2", "llama"])
def model(request: pytest.FixtureRequest) -> Iterator[Any]:
    made = wrap(request.param)
    made._module.double()
    ns.attach_sae(made, "layers[1].output", _sae(), "s")
    yield made
    ns.detach_sae(made, "s")


def _ids(texts: list[str]) -> Tensor:
    return torch.tensor([[int(word[1:]) for word in text.split()] for text in texts])


def _block(model: Any) -> Any:
    root: Any = unwrap(model)
    return root.transformer.h[LAYER] if hasattr(root, "transformer") else root.model.layers[LAYER]


def _hooked(model: Any, texts: list[str], change: Callable[[Tensor], Tensor], *, graph: bool = False) -> Tensor:
    """The logits of a run whose stream behind the layer is changed, with torch's hooks alone."""
    root: Any = unwrap(model)

    def hook(_module: Any, _args: Any, out: Any) -> Any:
        new = change(out[0] if isinstance(out, tuple) else out)
        return (new, *out[1:]) if isinstance(out, tuple) else new

    handle = _block(model).register_forward_hook(hook)
    with torch.set_grad_enabled(graph):
        logits = root(_ids(texts)).logits
    handle.remove()
    return logits


def _stream(model: Any, texts: list[str]) -> Tensor:
    kept: list[Tensor] = []

    def keep(value: Tensor) -> Tensor:
        kept.append(value.clone())
        return value

    _hooked(model, texts, keep)
    return kept[0]


# --- addresses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        'layers[1].output.sae["s"].features[7]',
        'layers[1].output.sae["s"].features[7][-1]',
        'layers[1].mlp.output.sae["a b"].features[0:3][2]',
        'layers[1].attn.output.sae["s"].features[1,5]["subject"]',
        'layers[1].output.sae["s"].error[-1]',
        'encoder.layers[1].input.sae["s"].error',
    ],
)
def test_addresses_print_back(text: str) -> None:
    path = ns.parse_path(text)
    assert str(path) == text
    assert ns.parse_path(str(path)) == path
    assert path != ns.parse_path(text.replace("sae[", "sae[", 1).replace('"s"', '"t"').replace('"a b"', '"b"'))


@pytest.mark.parametrize(
    "text",
    ['layers[1].output.sae["s"]', 'layers[1].output.sae["s"].features', "layers[1].output.sae[s].error",
     'layers[1].sae["s"].error', 'layers[1].output.sae["s"].feature[3]'],
)  # fmt: skip
def test_addresses_that_mean_nothing(text: str) -> None:
    with pytest.raises(PathError):
        ns.parse_path(text)


def test_places_are_expanded_and_told_apart(model: Any) -> None:
    found = ns.expand(model, [f"{AT}.features[-2:][0]", f"{AT}.error[0]", "layers[1].output[0]"])
    assert {str(path) for path in found} == {
        f"{AT}.features[22][0]", f"{AT}.features[23][0]", f"{AT}.error[0]", "layers[1].output[0]"
    }  # fmt: skip
    assert len(set(found)) == 4
    with pytest.raises(IndexError, match="this SAE has 24"):
        ns.expand(model, f"{AT}.features[24]")
    with pytest.raises(UnknownPath, match="no SAE 't' is attached"):
        ns.expand(model, 'layers[1].output.sae["t"].error')
    with pytest.raises(UnknownPath, match=r"attached to layers\[0\]"):
        ns.expand(model, 'layers[0].output.sae["s"].error')
    with pytest.raises(PathError, match="no parameters"):
        ns.weights.select(model, f"{AT}.features[3]")


# --- reading and writing ----------------------------------------------------------------------------------------------


def test_features_and_error_are_those_of_the_value(model: Any) -> None:
    saved = ns.capture(model, TEXTS, [f"{AT}.features[:][-1]", f"{AT}.error[1]", "layers[1].output[:]"])
    stream, sae = _stream(model, TEXTS), _sae()
    features = sae.encode(stream)
    assert int((features > 0).sum()) > 20
    for number in range(FEATURES):
        assert torch.allclose(saved[f"{AT}.features[{number}][-1]"], features[:, -1, [number]], atol=1e-12)
    assert torch.allclose(saved[f"{AT}.error[1]"], sae.error(stream)[:, 1], atol=1e-12)
    assert saved["layers[1].output[0]"].shape == (2, WIDTH)


@pytest.mark.parametrize("norm", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_writing_what_is_there_keeps_every_bit(norm: str, dtype: torch.dtype) -> None:
    model = wrap("llama")
    model._module.to(dtype)
    ns.attach_sae(model, "layers[1].output", _sae(norm), "n")
    paths = ['layers[1].output.sae["n"].features[:][:]', 'layers[1].output.sae["n"].error[:]']
    with torch.no_grad():
        expected = unwrap(model)(_ids(TEXTS)).logits  # type: ignore[operator]
    for path in paths:
        saved = ns.capture(model, TEXTS, path)
        found = ns.patched_logits(model, TEXTS, saved)
        assert torch.equal(found, expected.to(found.dtype))


def test_a_written_feature_changes_what_it_adds_and_the_error_stays(model: Any) -> None:
    sae, stream = _sae(), _stream(model, TEXTS)
    saved = ns.SavedActivation.from_pairs(
        (f"{AT}.features[3][1]", torch.tensor([[5.0], [7.0]])), (f"{AT}.features[8][1]", torch.tensor([[1.0], [0.0]]))
    )
    new = sae.encode(stream)
    new[:, 1, 3], new[:, 1, 8] = torch.tensor([5.0, 7.0]).double(), torch.tensor([1.0, 0.0]).double()
    expected = _hooked(model, TEXTS, lambda h: h + sae.decode(new, h) - sae.decode(sae.encode(h), h))
    assert torch.allclose(ns.patched_logits(model, TEXTS, saved), expected, atol=1e-10)
    added = ns.patched_logits(model, TEXTS, saved, add=True)
    step = torch.zeros_like(new)
    step[:, 1, 3], step[:, 1, 8] = torch.tensor([5.0, 7.0]).double(), torch.tensor([1.0, 0.0]).double()
    assert torch.allclose(added, _hooked(model, TEXTS, lambda h: h + step @ sae.tensors["W_dec"]), atol=1e-10)


def test_a_written_error_keeps_the_features(model: Any) -> None:
    sae, other = _sae(), _stream(model, OTHERS)
    saved = ns.capture(model, OTHERS, f"{AT}.error[:]")
    expected = _hooked(model, TEXTS, lambda h: sae.decode(sae.encode(h)) + sae.error(other))
    assert torch.allclose(ns.patched_logits(model, TEXTS, saved), expected, atol=1e-10)


def test_features_are_updated_on_the_way(model: Any) -> None:
    sae = _sae()
    with model.trace(TEXTS):
        for _, current, update in ns.updates(model, [f"{AT}.features[3][1]", "layers[2].output[0]"]):
            update(current * 2 + 1)
        saved = ns.save_activations(model, "layers[2].output[0]")

    def change(h: Tensor) -> Tensor:
        feature = sae.encode(h)[:, 1, 3]
        new = h.clone()
        new[:, 1] += (feature + 1)[:, None] * sae.tensors["W_dec"][3]
        return new

    root: Any = unwrap(model)
    kept: list[Tensor] = []
    blocks = root.transformer.h if hasattr(root, "transformer") else root.model.layers
    hook = blocks[2].register_forward_hook(lambda _m, _a, out: kept.append(out[0] if isinstance(out, tuple) else out))
    _hooked(model, TEXTS, change)
    hook.remove()
    assert torch.allclose(saved["layers[2].output[0]"], kept[0][:, 0] * 2 + 1, atol=1e-10)


# --- questions --------------------------------------------------------------------------------------------------------


def test_a_sweep_patches_each_feature_by_itself(model: Any) -> None:
    result = ns.sweep(model, TEXTS, OTHERS, [f"{AT}.features[0:6][1]", f"{AT}.error[1]"], METRIC, progress=False)
    assert result.run.executor == "packed"
    sae, clean, here = _sae(), _stream(model, TEXTS), _stream(model, OTHERS)
    grid = result.grid('layers[:].output.sae["s"].features[:]')
    assert dict(grid.sizes) == {"prompt": 2, "layer": 1, "feature": 6, "position": 1}
    moved = sae.encode(clean) - sae.encode(here)
    for number in range(6):

        def change(h: Tensor, number: int = number) -> Tensor:
            new = h.clone()
            new[:, 1] += moved[:, 1, [number]] * sae.tensors["W_dec"][number]
            return new

        logits = _hooked(model, OTHERS, change)[:, -1]
        found = grid.sel(feature=number).values[:, 0, 0]
        assert np.allclose(found, (logits[:, 7] - logits[:, 8]).numpy(), atol=1e-10)
    assert result.frame()["feature"].dropna().tolist().count(3) == 2
    assert float(np.nanstd(grid.values[0])) > 1e-6


def test_all_parts_together_are_the_whole_place(model: Any) -> None:
    parts = [f"{AT}.features[:][1]", f"{AT}.error[1]"]
    result = ns.sweep(model, TEXTS, OTHERS, [parts], METRIC, progress=False)
    whole = ns.sweep(model, TEXTS, OTHERS, "layers[1].output[1]", METRIC, progress=False)
    assert np.allclose(result.table.values, whole.table.values, atol=1e-9)


def test_which_sae_it_was_is_part_of_what_was_asked(model: Any) -> None:
    one = ns.sweep(model, TEXTS, OTHERS, f"{AT}.features[0:8][1]", METRIC, progress=False)
    ns.detach_sae(model, "s")
    ns.attach_sae(model, "layers[1].output", _sae("layer_norm"), "s")
    other = ns.sweep(model, TEXTS, OTHERS, f"{AT}.features[0:8][1]", METRIC, progress=False)
    assert one.asked["saes"] != other.asked["saes"]
    assert not np.allclose(one.table.values, other.table.values)


@pytest.mark.parametrize("norm", ["none", "layer_norm"])
def test_gradients_of_features_are_those_of_autograd(model: Any, norm: str) -> None:
    sae = _sae(norm)
    ns.attach_sae(model, "layers[1].output", sae, "g")
    at = 'layers[1].output.sae["g"]'
    sites = [f"{at}.features[:][1]", f"{at}.error[1]"]
    found = ns.attribute(model, TEXTS, OTHERS, sites, METRIC, method="atp", progress=False)
    clean, here = _stream(model, TEXTS), _stream(model, OTHERS)
    steps = torch.zeros(2, FEATURES, dtype=torch.float64, requires_grad=True)
    error = torch.zeros(2, WIDTH, dtype=torch.float64, requires_grad=True)

    def change(h: Tensor) -> Tensor:
        features = sae.encode(here)
        pad = torch.zeros_like(features)
        pad[:, 1] = 1
        moved = sae.decode(features + pad * steps[:, None], here) - sae.decode(features, here)
        new = h.detach() + moved
        return torch.cat([new[:, :1], new[:, 1:2] + error[:, None], new[:, 2:]], 1)

    logits = _hooked(model, OTHERS, change, graph=True)[:, -1]
    gradients = torch.autograd.grad((logits[:, 7] - logits[:, 8]).sum(), [steps, error])
    moved = (sae.encode(clean) - sae.encode(here))[:, 1]
    apart = (sae.error(clean) - sae.error(here))[:, 1]
    base = (logits[:, 7] - logits[:, 8]).detach()
    features = found.grid('layers[:].output.sae["g"].features[:]').values[:, 0, :, 0]
    assert np.allclose(features - base.numpy()[:, None], (gradients[0] * moved).numpy(), atol=1e-9)
    errors = found.grid('layers[:].output.sae["g"].error').values.reshape(2)
    assert np.allclose(errors - base.numpy(), (gradients[1] * apart).sum(-1).numpy(), atol=1e-9)
    assert np.abs(features - base.numpy()[:, None]).max() > 1e-6


@pytest.mark.parametrize("operator", ["add", "clamp"])
def test_steering_of_a_feature(model: Any, operator: str) -> None:
    sae = _sae()
    vector = ns.SavedActivation.from_pairs((f"{AT}.features[3][-1]", torch.tensor([[1.0]], dtype=torch.float64)))
    with ns.steering.steer(model, vector, 4.0, operator=operator):
        found = unwrap(model)(_ids(TEXTS)).logits  # type: ignore[operator]

    def change(h: Tensor) -> Tensor:
        feature = sae.encode(h)[..., 3:4]
        new = feature + 4 if operator == "add" else torch.full_like(feature, 4.0)
        return h + (new - feature) * sae.tensors["W_dec"][3]

    assert torch.allclose(found.detach(), _hooked(model, TEXTS, change), atol=1e-10)


def test_a_topk_sae_of_a_branch() -> None:
    model = wrap("llama")
    model._module.double()
    sae = _sae(kind="topk")
    address = ns.attach_sae(model, "layers[0].mlp.output", sae, "of the MLP")
    assert address == 'layers[0].mlp.output.sae["of the MLP"]'
    saved = ns.capture(model, TEXTS, [f"{address}.features[:][:]", "layers[0].mlp.output[:]"])
    features = torch.cat([saved[f"{address}.features[{n}][2]"] for n in range(FEATURES)], dim=1)
    assert torch.allclose(features, sae.encode(saved["layers[0].mlp.output[2]"]), atol=1e-12)
    assert int((features > 0).sum(1).max()) <= 5


# --- what is refused --------------------------------------------------------------------------------------------------


def test_what_cannot_be_attached(model: Any) -> None:
    with pytest.raises(BadArgument, match="attached already"):
        ns.attach_sae(model, "layers[0].output", _sae(), "s")
    with pytest.raises(ShapeError, match="16 wide"):
        ns.attach_sae(wrap("gpt2", n_embd=32), "layers[0].output", _sae(), "s")
    with pytest.raises(RefusedPlace, match="stands whole"):
        ns.attach_sae(model, "layers[0].heads[1].output", _sae(), "t")
    with pytest.raises(BadArgument, match="3 sites"):
        ns.attach_sae(model, "layers[:].output", _sae(), "t")
    with pytest.raises(BadType, match="no SAE"):
        ns.attach_sae(model, "layers[0].output", torch.eye(16), "t")  # type: ignore[arg-type]
    with pytest.raises(UnknownPath, match="no SAE 't'"):
        ns.detach_sae(model, "t")


def test_what_has_no_features_is_told(model: Any) -> None:
    with pytest.raises(BadArgument, match="several values"):
        ns.sweep(model, TEXTS, OTHERS, f"{AT}.features[0][1]", METRIC, executor="batched", progress=False)
    with pytest.raises(RefusedPlace, match="derived"):
        ns.path_patch(model, TEXTS, OTHERS, "embed", f"{AT}.features[0]", METRIC, progress=False)
    with pytest.raises(RefusedPlace, match="derived"):
        ns.path_patch(model, TEXTS, OTHERS, f"{AT}.features[0]", f"{AT}.features[0]", METRIC, progress=False)
    with pytest.raises(RefusedPlace, match="ifr shares a stream among"):
        ns.attribute(model, TEXTS, OTHERS, f"{AT}.features[0]", METRIC, method="ifr", progress=False)
    with pytest.raises(BadArgument, match="no sender of a circuit"):
        ns.Circuit.of(edges=[(f"{AT}.features[0]", "layers[2].mlp.input")], model=model)
    error = ns.SavedActivation.from_pairs((f"{AT}.error[-1]", torch.ones(1, 16)))
    with pytest.raises(RefusedPlace, match="error is derived"):
        ns.steering.steer(model, error)
