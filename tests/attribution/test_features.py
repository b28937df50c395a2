"""Features and errors of an SAE in every method of `attribute`, and in path patching: against autograd and hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import nnsplice as ns
from nnsplice.atlas import unwrap
from subspaces.test_packed_features import FEATURES, METRIC, sae_of
from zoo import double

CLEAN, CORRUPTED = "w3 w4 w5 w6", "w3 w14 w5 w6"
TOKENS = 4


def _ids(text: str) -> Tensor:
    return torch.tensor([[int(word[1:]) for word in text.split()]])


def _run(
    model: Any,
    change: Callable[[Tensor], Tensor],
    *,
    layer: int = 1,
    embeds: Tensor | None = None,
    text: str = CORRUPTED,
) -> Tensor:
    """The metric of a run whose stream behind a layer is changed, in the graph, with torch's hooks alone."""
    root: Any = unwrap(model)
    handle = root.model.layers[layer].register_forward_hook(lambda _m, _a, out: change(out))
    given = {"inputs_embeds": root.model.embed_tokens(_ids(text))} if embeds is None else {"inputs_embeds": embeds}
    logits = root(**given).logits[0, -1]
    handle.remove()
    return logits[7] - logits[8]


def _stream(model: Any, text: str) -> Tensor:
    kept: list[Tensor] = []
    with torch.no_grad():
        _run(model, lambda h: kept.append(h.clone()) or h, text=text)
    return kept[0]


def _found(model: Any, at: str, method: str, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """`[feature, token]` and `[token]`: the estimated changes of the metric."""
    sites = [f"{at}.features[:]", f"{at}.error"]
    result = ns.attribute(model, CLEAN, CORRUPTED, sites, METRIC, method=method, progress=False, **options)
    effects = result.table.values[0] - result.table.corrupted[0]
    rows = {cell.path: effect for cell, effect in zip(result.table.cells, effects, strict=True)}
    features = [[rows.get(f"{at}.features[{n}][{t}]", np.nan) for t in range(TOKENS)] for n in range(FEATURES)]
    return np.array(features), np.array([rows[f"{at}.error[{t}]"] for t in range(TOKENS)])


def _steps(sae: ns.SAE, clean: Tensor, here: Tensor) -> tuple[Tensor, Tensor]:
    """What patching a feature or the error adds to the stream: `[token, feature, width]`, `[token, width]`."""
    moved = (sae.encode(clean) - sae.encode(here))[0]
    pushes = torch.stack([sae.decode(torch.eye(FEATURES).double(), h.expand(FEATURES, -1)) for h in here[0]])
    none = torch.stack([sae.decode(torch.zeros(1, FEATURES).double(), h[None]) for h in here[0]])
    return moved[..., None] * (pushes - none), (sae.error(clean) - sae.error(here))[0]


NORMED = [("jumprelu", "none"), ("topk", "none"), ("jumprelu", "layer_norm"), ("topk", "constant_norm_rescale")]


@pytest.mark.parametrize(("kind", "norm"), NORMED)
@pytest.mark.parametrize("method", ["atp", "ig", "eap", "eap-ig"])
def test_scores_are_steps_along_autograds_gradients(method: str, kind: str, norm: str) -> None:
    """By a feature itself, at each point: an SAE that scales its inputs gives it the scale of the value there."""
    model, sae = double("llama"), sae_of(kind, norm)
    at = ns.attach_sae(model, "layers[1].output", sae, "s")
    clean, here = _stream(model, CLEAN), _stream(model, CORRUPTED)
    root: Any = unwrap(model)
    embed = root.model.embed_tokens
    a, b = (embed(_ids(text)).detach() for text in (CORRUPTED, CLEAN))
    stepwise = method in ("ig", "eap-ig")
    places, weights = np.polynomial.legendre.leggauss(4) if stepwise else (np.array([-1.0]), np.array([2.0]))
    by_value, by_feature = torch.zeros_like(here), torch.zeros(1, TOKENS, FEATURES, dtype=torch.float64)
    for point, weight in zip((places + 1) / 2, weights / 2, strict=True):
        push = torch.zeros_like(here, requires_grad=True)
        features = torch.zeros_like(by_feature, requires_grad=True)

        def change(h: Tensor, push: Tensor = push, features: Tensor = features) -> Tensor:
            own = h.detach()
            on = sae.encode(own)
            return own + push + sae.decode(on + features, own) - sae.decode(on, own)

        value = _run(model, change, embeds=a + (b - a) * point)
        found = torch.autograd.grad(value, [push, features])
        by_value, by_feature = by_value + found[0] * float(weight), by_feature + found[1] * float(weight)
    moved, of_error = (sae.encode(clean) - sae.encode(here))[0], (sae.error(clean) - sae.error(here))[0]
    expected = (moved * by_feature[0]).T.numpy()
    expected_errors = (of_error * by_value[0]).sum(-1).numpy()
    assert np.abs(expected).max() > 1e-5
    options: dict[str, Any] = {"steps": 4} if stepwise else {}
    if method in ("atp", "ig"):
        scores, errors = _found(model, at, method, **options)
        measured = ~np.isnan(scores)
        assert np.allclose(scores[measured], expected[measured], rtol=0, atol=1e-9)
        assert np.allclose(errors, expected_errors, rtol=0, atol=1e-9)
        return
    # Every way from there to the logits: what all receivers read is what leaves the site.
    sites = [f"{at}.features[:]", f"{at}.error"]
    result = ns.attribute(
        model, CLEAN, CORRUPTED, sites, METRIC, method=method, receivers=["layers[2].input"], progress=False, **options
    )
    scores = dict(zip((cell.feature for cell in result.table.cells), result.table.edges[0, :, 0], strict=True))  # type: ignore[index]
    for number in range(FEATURES):
        assert abs(scores[number] - expected[number].sum()) < 1e-9
    assert abs(scores[None] - expected_errors.sum()) < 1e-9


@pytest.mark.parametrize("place", ["layers[1].output", "layers[1].mlp.output", "layers[0].attn.output"])
@pytest.mark.parametrize("method", ["atp", "ig", "eap", "eap-ig", "relp"])
def test_parts_add_up_to_their_place(method: str, place: str) -> None:
    model = double("llama")
    at = ns.attach_sae(model, place, sae_of("topk"), "s")
    together = method not in ("atp", "ig")
    sites = [f"{at}.features[:]", f"{at}.error", place]
    result = ns.attribute(model, CLEAN, CORRUPTED, sites, METRIC, method=method, progress=False)
    scores = result.table.values[0] - result.table.corrupted[0]
    whole = dict.fromkeys([""] if together else map(str, range(TOKENS)), 0.0)
    parts = dict(whole)
    for cell, score in zip(result.table.cells, scores, strict=True):
        key = "" if together else str(cell.position)
        (parts if ".sae" in cell.path else whole)[key] += score
    for key, value in whole.items():
        assert abs(parts[key] - value) < 1e-9
    assert max(map(abs, whole.values())) > 1e-6
    if together:
        edges: Any = result.table.edges
        of_parts, of_whole = (
            sum(np.nan_to_num(edges[0, n]) for n, cell in enumerate(result.table.cells)
                if (".sae" in cell.path) == is_part) for is_part in (True, False)
        )  # fmt: skip
        assert np.allclose(of_parts, of_whole, rtol=0, atol=1e-9)


def test_grad_drop_is_the_mean_size_over_layers_that_stand_still() -> None:
    model, sae = double("llama"), sae_of()
    at = ns.attach_sae(model, "layers[1].output", sae, "s")
    clean, here = _stream(model, CLEAN), _stream(model, CORRUPTED)
    of_features, of_error = _steps(sae, clean, here)
    root: Any = unwrap(model)
    scores = []
    for still in (None, 0, 1, 2):
        hooks = []
        if still is not None:
            for branch in (root.model.layers[still].self_attn, root.model.layers[still].mlp):
                hooks.append(branch.register_forward_hook(
                    lambda _m, _a, out: (out[0].detach(), *out[1:]) if isinstance(out, tuple) else out.detach()
                ))  # fmt: skip
        push = torch.zeros_like(here, requires_grad=True)
        (gradient,) = torch.autograd.grad(_run(model, lambda h, push=push: h.detach() + push), push)
        for hook in hooks:
            hook.remove()
        scores.append(((of_features @ gradient[0, :, :, None])[..., 0].T, (of_error * gradient[0]).sum(-1)))
    found, errors = _found(model, at, "atp*")
    asked = ~np.isnan(found)
    for mine, plain, dropped in ((found, scores[0][0], [s[0] for s in scores[1:]]),
                                 (errors, scores[0][1], [s[1] for s in scores[1:]])):  # fmt: skip
        expected = (torch.stack(dropped).abs().mean(0) * torch.where(plain < 0, -1.0, 1.0)).detach().numpy()
        where = asked if mine is found else np.ones(TOKENS, bool)
        assert np.allclose(mine[where], expected[where], rtol=0, atol=1e-9)


@pytest.mark.parametrize("place", ["layers[1].output", "layers[0].mlp.output"])
def test_exact_edges_are_what_one_receiver_makes_of_a_part(place: str) -> None:
    model, sae = double("llama"), sae_of("topk")
    at = ns.attach_sae(model, place, sae, "s")
    root: Any = unwrap(model)
    home = root.model.layers[1] if place == "layers[1].output" else root.model.layers[0].mlp
    last, kept = root.model.layers[2], {}

    def run(text: str) -> dict[str, Tensor]:
        seen: dict[str, Tensor] = {}
        hooks = [
            home.register_forward_hook(lambda _m, _a, out: seen.__setitem__("place", out)),
            last.post_attention_layernorm.register_forward_pre_hook(lambda _m, args: seen.__setitem__("mid", args[0])),
            last.register_forward_hook(lambda _m, _a, out: seen.__setitem__("end", out)),
        ]
        with torch.no_grad():
            root(_ids(text))
        for hook in hooks:
            hook.remove()
        return seen

    clean, here = run(CLEAN), run(CORRUPTED)
    of_features, of_error = _steps(sae, clean["place"], here["place"])
    sites = [f"{at}.features[1::5][-1]", f"{at}.error[-1]"]
    result = ns.attribute(
        model, CLEAN, CORRUPTED, sites, METRIC, method="exact", receivers=["layers[2].mlp", "unembed"], progress=False
    )

    def metric(end: Tensor) -> float:
        logits = root.lm_head(root.model.norm(end))
        return float(logits[7] - logits[8])

    def mlp(mid: Tensor) -> Tensor:
        return last.mlp(last.post_attention_layernorm(mid))

    edges: Any = result.table.edges
    with torch.no_grad():
        for number, cell in enumerate(result.table.cells):
            step = of_error[-1] if cell.feature is None else of_features[-1, cell.feature]
            mid, end = here["mid"][0, -1], here["end"][0, -1]
            expected = [metric(end - mlp(mid) + mlp(mid + step)) - metric(end), metric(end + step) - metric(end)]
            found = edges[0, number]
            assert np.allclose(np.nan_to_num(found), expected, rtol=0, atol=1e-9)
            kept[cell.path] = max(map(abs, expected))
    assert max(kept.values()) > 1e-5


def test_an_error_is_patched_in_a_subspace_alone() -> None:
    model, sae = double("llama"), sae_of("topk")
    at = ns.attach_sae(model, "layers[1].output", sae, "s")
    subspace = ns.Subspace.of(
        "layers[1].output", torch.randn(3, 16, generator=torch.Generator().manual_seed(1)).double()
    )
    clean, here = _stream(model, CLEAN), _stream(model, CORRUPTED)
    root: Any = unwrap(model)
    ends: list[Tensor] = []
    hook = root.model.layers[2].register_forward_hook(lambda _m, _a, out: ends.append(out))
    _stream(model, CORRUPTED)
    hook.remove()
    step = (sae.error(clean) - sae.error(here))[0, -1] @ subspace.basis @ subspace.basis.T
    with torch.no_grad():
        logits = root.lm_head(root.model.norm(ends[0][0, -1] + step))
    found = ns.path_patch(
        model, CLEAN, CORRUPTED, f"{at}.error[-1]", "unembed", METRIC, subspace=subspace, progress=False
    )
    assert found.run.executor == "packed paths"
    assert abs(float(found.table.values[0, 0]) - float(logits[7] - logits[8])) < 1e-12
