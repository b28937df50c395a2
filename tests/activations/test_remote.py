"""Remote runs: what crosses the wire runs in a fresh process that has no nnsplice, and gives the local numbers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from nnsight.schema.request import RequestModel
from nnsight.tracing.util import push

import nnsplice as ns
from nnsplice.errors import RefusedPlace
from zoo import wrap

SERVER = Path(__file__).with_name("remote_server.py")
PROMPTS = ["w3 w4 w5", "w6 w7 w8 w9", "w10 w11 w12"]


class Process:
    """nnsight's remote service, as a process on this machine."""

    def __init__(self, family: str, folder: Path) -> None:
        self.family, self.folder = family, folder
        self.sizes: list[int] = []

    def __call__(self, tracer) -> None:
        blob = RequestModel.serialize(tracer)
        self.sizes.append(len(blob))
        request, result = self.folder / "request", self.folder / "result"
        request.write_bytes(blob)
        done = subprocess.run(
            [sys.executable, "-P", str(SERVER), self.family, str(request), str(result)],
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(done.stderr)
        values = torch.load(result, weights_only=True)
        from nnsight.tracing.tracer import save

        push(tracer.info.frame, {name: save(value) for name, value in values.items()})


@pytest.fixture
def remote(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    family = getattr(request, "param", "llama")
    model = wrap(family)
    service = Process(family, tmp_path)
    monkeypatch.setattr(type(model), "_remote_backend", lambda *_: service)
    return model, service


@pytest.mark.parametrize("remote", ["opt", "t5"], indirect=True)
def test_a_remote_capture_equals_a_local_one(remote) -> None:
    model, _ = remote
    paths = ["layers[1].output[-1]", "layers[2].heads[1].output[0]", "layers[0].mlp.output[-1]", "layers[1].mid[0,-1]"]
    paths = paths[: 3 if is_t5(model) else 4]
    there = ns.capture(model, PROMPTS[::2], paths, remote=True)
    assert there.allclose(ns.capture(model, PROMPTS[::2], paths), atol=1e-5)


def is_t5(model) -> bool:
    """Its layers have a second attention between the two, so `mid` is not one site."""
    return model._module.config.model_type == "t5"


def test_a_remote_capture_of_ragged_prompts_equals_a_local_one_and_ships_no_model(remote) -> None:
    model, service = remote
    paths = [
        "layers[1].output[-1]",
        "layers[2].heads[1].output[0]",
        "layers[0].mlp.output[-1]",
        "layers[1].input[0,-1]",
    ]
    there = ns.capture(model, PROMPTS, paths, remote=True)
    assert there.keys() == ns.capture(model, PROMPTS, paths).keys()
    assert there.allclose(ns.capture(model, PROMPTS, paths), atol=1e-5)
    assert there.prompts == tuple(PROMPTS)
    assert len(service.sizes) == len({len(prompt.split()) for prompt in PROMPTS})
    assert max(service.sizes) < 40_000  # code and numbers, no model


@pytest.mark.parametrize("add", [False, True])
def test_remote_patched_logits_equal_local_ones(remote, add: bool) -> None:
    model, _ = remote
    saved = ns.capture(model, "w9 w8 w7", ["layers[1].output[-1]", "layers[2].heads[1].output[0]"])
    prompts = PROMPTS if add else PROMPTS[0]
    there = ns.patched_logits(model, prompts, saved, add=add, remote=True)
    here = ns.patched_logits(model, prompts, saved, add=add)
    assert torch.allclose(there, here, atol=1e-5, equal_nan=True)


def test_what_is_derived_is_refused_and_not_written_into_the_value_around_it() -> None:
    model = wrap("gpt2", attn_implementation="eager")
    drawn = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (16, 24), "W_dec": (24, 16), "b_enc": (24,), "b_dec": (16,)}
    sae = ns.SAE("standard", {name: torch.randn(shape, generator=drawn) for name, shape in shapes.items()})
    at = ns.attach_sae(model, "layers[1].output", sae, "s")
    sites = [f"{at}.features[0:3][1]", f"{at}.error[1]", "layers[1].heads[1].pattern[1]"]
    for site in sites:
        saved = ns.capture(model, "w9 w8 w7 w6", site)
        with pytest.raises(RefusedPlace, match="derived from several values"):
            ns.patched_logits(model, "w3 w4 w5 w6", saved, remote="local")
        with pytest.raises(RefusedPlace, match="derived from several values"):
            ns.capture(model, "w9 w8 w7 w6", site, remote="local")


@pytest.mark.parametrize("site", ["layers[1].output[1]", "layers[1].heads[1].output[1]"])
def test_a_capture_of_another_width_is_not_spread_over_the_site(site: str) -> None:
    model = wrap("gpt2")
    saved = ns.SavedActivation.from_pairs((site, torch.ones(1, 1)))
    with pytest.raises(Exception, match="the capture is 1 wide, the site"):
        ns.patched_logits(model, "w3 w4 w5", saved, remote="local")


def test_spans_are_resolved_before_they_cross_the_wire(remote) -> None:
    model, _ = remote
    spans = {"subject": ["w4 w5", "w11"]}
    path = 'layers[1].output["subject"][-1]'
    there = ns.capture(model, PROMPTS[::2], path, spans=spans, remote=True)
    assert there.allclose(ns.capture(model, PROMPTS[::2], path, spans=spans), atol=1e-5)


def test_calls_inside_a_users_own_remote_trace_name_the_two_that_work() -> None:
    model = wrap("llama")
    saved = ns.capture(model, "w3 w4", "layers[0].output[-1]")
    save_activations = ns.save_activations
    with pytest.raises(Exception, match=r"does not run inside a remote trace[\s\S]*ns\.capture.*remote=True"):
        with model.trace("w3 w4", remote="local"):
            ns.save_activations(model, "layers[0].output[-1]")
    with pytest.raises(Exception, match=r"does not run inside a remote trace[\s\S]*ns\.patched_logits"):
        with model.trace("w3 w4", remote="local"):
            saved.apply(model)
    with pytest.raises(Exception, match="does not run inside a remote trace"):
        with model.trace("w3 w4", remote="local"):
            save_activations(model, "layers[0].output[-1]")


def test_derived_places_are_refused_remotely(remote) -> None:
    model, _ = remote
    with pytest.raises(RefusedPlace, match="derived from several values"):
        ns.capture(model, "w3 w4", "layers[0].heads[0].pattern[-1]", remote=True)
    mid = ns.capture(model, "w3 w4", "layers[0].mid[-1]")
    with pytest.raises(RefusedPlace, match=r"stream[\s\S]*layers\[0\]\.mid"):
        ns.patched_logits(model, "w3 w4", mid, remote=True)


def test_nnsights_own_dry_run_of_the_remote_path_agrees() -> None:
    model = wrap("gpt2")
    there = ns.capture(model, PROMPTS, "layers[:].output[-1]", remote="local")
    assert there.allclose(ns.capture(model, PROMPTS, "layers[:].output[-1]"), atol=1e-5)
