"""Fitted lenses: Jacobians beside autograd's own, training beside a planted map, and files that say whose they are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import nnsplice as ns
from families.subject import Subject, after, first_tensor, hooks
from nnsplice.atlas import unwrap
from nnsplice.errors import BadArgument, FileError, NnspliceError
from nnsplice.lens import FittedLens
from zoo import wrap

PROMPTS = [torch.tensor([5, 9, 6]).tolist(), torch.tensor([4, 11, 7, 8, 10]).tolist()]


def jacobian_of(root: Any, blocks: list[Any], layer: int, ids: list[int]) -> Tensor:
    """The mean over pairs of a token and a later one of autograd's derivative: sum and number of pairs."""
    kept: list[Tensor] = []

    def run(states: Tensor) -> Tensor:
        left: list[Tensor] = []
        keep = blocks[-1].register_forward_hook(lambda _m, _a, out: left.append(first_tensor(out)))
        with hooks(after(blocks[layer], lambda _: states), keep):
            root(torch.tensor([ids]))
        return left[0][0]

    with (
        torch.no_grad(),
        hooks(blocks[layer].register_forward_hook(lambda _m, _a, out: kept.append(first_tensor(out).clone()))),
    ):
        root(torch.tensor([ids]))
    made: Any = torch.autograd.functional.jacobian(run, kept[0])
    whole: Tensor = made[:, :, 0]  # [later, width, token, width]
    total = torch.zeros(whole.shape[1], whole.shape[3], dtype=whole.dtype)
    for token in range(len(ids)):
        for later in range(token, len(ids)):
            total += whole[later, :, token]
    return total


# The norms of the last two compute in float32, whatever they are given.
@pytest.mark.parametrize(("family", "atol"), [("gpt2", 1e-12), ("llama", 1e-6), ("gemma2", 1e-6)])
@pytest.mark.parametrize("chunk", [5, 64])
def test_jacobians_are_autograds(family: str, atol: float, chunk: int) -> None:
    subject = Subject(family)
    lens = ns.lens.fit(subject.model, PROMPTS, kind="jacobian", chunk=chunk, progress=False)
    blocks = [subject.bare.get_submodule(block.module) for block in subject.blocks]
    pairs = sum(len(ids) * (len(ids) + 1) // 2 for ids in PROMPTS)
    for layer in range(len(blocks) - 1):
        expected = sum(jacobian_of(subject.bare, blocks, layer, ids) for ids in PROMPTS) / pairs
        assert isinstance(expected, Tensor)
        torch.testing.assert_close(lens.matrices[layer], expected, rtol=1e-8, atol=atol)
    # Of the last layer's states by themselves, a token's own alone is not nothing.
    own = sum(map(len, PROMPTS)) / pairs
    torch.testing.assert_close(lens.matrices[-1], torch.eye(lens.matrices.shape[-1], dtype=torch.float64) * own)


def planted(model: Any) -> tuple[Tensor, Tensor, Any]:
    """A model whose last layer is an affine map of what it is given."""
    root: Any = unwrap(model)
    last: Any = root.get_submodule("model.layers")
    width = root.config.hidden_size
    generator = torch.Generator().manual_seed(0)
    matrix = torch.eye(width, dtype=torch.float64)
    matrix += 0.3 * torch.randn(width, width, generator=generator, dtype=torch.float64)
    bias = torch.randn(width, generator=generator, dtype=torch.float64)
    given: list[Tensor] = []
    keep = last[-1].register_forward_pre_hook(lambda _m, args: given.append(args[0]))
    return matrix, bias, (keep, after(last[-1], lambda _: given[-1] @ matrix.T + bias))


def test_a_linear_layer_is_its_jacobian() -> None:
    model = wrap("llama").to(torch.float64)
    matrix, _, made = planted(model)
    with hooks(*made):
        lens = ns.lens.fit(model, PROMPTS, kind="jacobian", progress=False)
        own = sum(map(len, PROMPTS)) / lens.about["pairs"]
        torch.testing.assert_close(lens.matrices[-2], matrix * own)


def texts(number: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(4, 60, (number, 8), generator=generator).tolist()


def test_training_finds_a_planted_map() -> None:
    model = wrap("llama").to(torch.float64)
    _, _, made = planted(model)
    with hooks(*made):
        last = len(ns.Atlas.of(model).tower().blocks) - 1
        lens = ns.lens.fit(model, texts(60), layers=[last - 1, last], steps=800, rate=2e-2, progress=False)
    found, plain = (lens.held_out()[name].to_numpy(float) for name in ("kl", "logit_lens"))
    assert found[0] < 0.02 * plain[0]
    assert plain[1] < 1e-12 and found[1] < 1e-6


def test_a_tuned_lens_is_nearer_than_the_logit_lens() -> None:
    model = ns.load("toy")
    prompts = ns.models.toy_prompts()
    given = [fact.clean for fact in prompts.facts][:40]
    lens = ns.lens.fit(model, given, steps=150, rate=3e-3, progress=False)
    found, plain = (lens.held_out()[name].to_numpy(float) for name in ("kl", "logit_lens"))
    assert (found[:-1] < plain[:-1]).all()
    again = ns.lens.fit(model, given, steps=150, rate=3e-3, progress=False)
    assert again.digest == lens.digest
    read, plain = (ns.lens.logit(model, given[0], lens=one) for one in (lens, None))
    assert not np.allclose(read.grid().values[:, 0], plain.grid().values[:, 0])
    assert read.results.asked["operation"] == "tuned lens" and read.results.asked["lens"] == lens.identity


def test_a_map_is_what_is_read(model) -> None:
    """Half of every state: what plain torch makes of it."""
    about = {"weights": ns.lens.fit(model, ["w3 w4"], kind="jacobian", progress=False).about["weights"]}
    half = FittedLens("tuned", (1,), torch.eye(16)[None] / 2, torch.zeros(1, 16), about)
    read = ns.lens.logit(model, "w3 w4 w5", "layers[1].output", answers="w7", lens=half)
    saved = ns.capture(model, "w3 w4 w5", "layers[1].output[:]")["layers[1].output[:]"]
    root: Any = unwrap(model)
    with torch.no_grad():
        expected = root.lm_head(root.transformer.ln_f(saved / 2)).softmax(-1)
    answer = model.tokenizer("w7")["input_ids"][0]
    np.testing.assert_allclose(read.grid().values[0, 0], expected.reshape(3, -1)[:, answer], rtol=1e-4)


def test_a_file_is_the_lens(model, tmp_path) -> None:
    lens = ns.lens.fit(model, ["w3 w4 w5", "w6 w7"], kind="jacobian", progress=False)
    path = tmp_path / "lens.safetensors"
    lens.to_file(path)
    again = FittedLens.from_file(path)
    assert again.digest == lens.digest and again.layers == lens.layers and dict(again.about) == dict(lens.about)
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 1
    path.write_bytes(raw)
    with pytest.raises(FileError, match="damaged"):
        FittedLens.from_file(path)
    ns.capture(model, "w3", "embed[-1]").to_file(path)
    with pytest.raises(FileError, match="no fitted lens"):
        FittedLens.from_file(path)


def test_another_model_and_other_places_are_refused(model) -> None:
    lens = ns.lens.fit(model, ["w3 w4 w5"], kind="jacobian", layers=[1], progress=False)
    with pytest.raises(BadArgument, match="other weights"):
        ns.lens.logit(wrap("llama"), "w3 w4 w5", "layers[1].output", lens=lens)
    for place in ("layers[0].output", "layers[1].input", "embed.output"):
        with pytest.raises(BadArgument, match="not fitted at this site"):
            ns.lens.logit(model, "w3 w4 w5", place, lens=lens)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"kind": "best"}, "kind="),
        ({"held_out": 0.01}, "held_out"),
        ({"steps": 0}, "steps=0"),
        ({"layers": [7]}, "numbers from 0 to 2"),
    ],
)
def test_what_cannot_be_fitted_is_told(model, options: dict[str, Any], text: str) -> None:
    with pytest.raises(NnspliceError, match=text):
        ns.lens.fit(model, ["w3 w4 w5", "w6 w7"], progress=False, **options)


def test_nothing_is_left_on_the_model(model) -> None:
    root = unwrap(model)
    before = [p.requires_grad for p in root.parameters()]
    for kind in ("tuned", "jacobian"):
        ns.lens.fit(model, ["w3 w4 w5", "w6 w7"], kind=kind, held_out=0.5, steps=3, progress=False)
    assert [p.requires_grad for p in root.parameters()] == before
    assert all(p.grad is None for p in root.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in root.modules())
