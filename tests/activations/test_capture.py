"""What `capture` runs: no more than is needed, on prompts in every form, on plain modules; and what it keeps."""

from __future__ import annotations

import gc
from typing import Any

import nnsight
import pytest
import torch
from torch import nn

import nnsplice as ns
from families.build import build
from nnsplice.errors import NeedsProbe, NeverFired, ShapeError
from zoo import wrap

PROMPT = "w3 w4 w5 w6"


@pytest.fixture(scope="module")
def gpt2():
    return wrap("gpt2")


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.steps = nn.ModuleList([nn.Linear(6, 6) for _ in range(3)])
        self.never = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for step in reversed(self.steps):
            x = x + step(x).relu()
        return x


def test_a_plain_module_is_addressed_by_its_attributes_in_the_order_it_runs() -> None:
    torch.manual_seed(0)
    model = nnsight.NNsight(Plain())
    plain: Any = model._module
    x = torch.randn(2, 5, 6)
    with pytest.raises(NeedsProbe, match="probe="):
        ns.expand(model, "model.steps[:].output[0]")
    saved = ns.capture(model, x, ["model.steps[:].output[-1]", "model.first.output[1]"])
    assert saved.keys() == ["model.first.output[1]"] + [f"model.steps[{i}].output[-1]" for i in (2, 1, 0)]
    assert torch.equal(saved["model.first.output[1]"], plain.first(x)[:, 1].detach())
    with torch.no_grad(), model.trace(x):
        (saved * 0).apply(model)
        out = model.output.save()
    with torch.no_grad():
        first = plain.first(x)
        first[:, 1] = 0
        expected = first.clone()
        for step in reversed(plain.steps):
            add = step(expected)
            add[:, -1] = 0
            expected = expected + add.relu()
    assert torch.allclose(out, expected, atol=1e-6)
    with pytest.raises(NeverFired, match=r"model\.never is never called"):
        ns.capture(model, x, "model.never.output[0]")


def test_a_value_without_tokens_is_refused_with_its_shape() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Identity()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x.mean(1))

    model = nnsight.NNsight(Pooled())
    with pytest.raises(ShapeError, match=r"\[2, 6\] is not \[prompt, token, width\]"):
        ns.capture(model, torch.randn(2, 5, 6), "model.inner.output[0]")


def test_the_forward_stops_after_the_last_place_that_is_needed(gpt2) -> None:
    ran: list[int] = []
    hooks = [
        block.register_forward_hook(lambda *_, n=n: ran.append(n)) for n, block in enumerate(gpt2._module.transformer.h)
    ]
    try:
        ns.capture(gpt2, PROMPT, "layers[1].output[-1]")  # the order is known by now, from other tests or from this
        ran.clear()
        ns.capture(gpt2, PROMPT, "layers[1].attn.output[-1]")
    finally:
        for hook in hooks:
            hook.remove()
    assert ran == [0]


def test_a_bar_is_shown_over_prompts(gpt2, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nnsplice.progress.DELAY", 0)
    ns.capture(gpt2, [PROMPT] * 4, "layers[0].output[-1]", batch_size=2, progress=False)
    assert capsys.readouterr().err == ""
    ns.capture(gpt2, [PROMPT] * 4, "layers[0].output[-1]", batch_size=2)
    assert "4/4" in capsys.readouterr().err  # prompts, of both batches


def test_token_ids_in_every_form_are_the_same_prompts(gpt2) -> None:
    text = ns.capture(gpt2, ["w3 w4 w5", "w6 w7 w8"], "layers[1].output[:]")
    ids = [[3, 4, 5], [6, 7, 8]]
    padded = {
        "input_ids": torch.tensor([[0, 3, 4, 5], [0, 6, 7, 8]]),
        "attention_mask": torch.tensor([[0, 1, 1, 1]] * 2),
    }
    for prompts in (ids, torch.tensor(ids), {"input_ids": torch.tensor(ids)}, padded):
        assert ns.capture(gpt2, prompts, "layers[1].output[:]").allclose(text, atol=1e-6)
    assert ns.capture(gpt2, [3, 4, 5], "layers[1].output[:]").allclose(text.slice[0], atol=1e-6)
    assert ns.capture(gpt2, torch.tensor([3, 4, 5]), "layers[1].output[:]").allclose(text.slice[0], atol=1e-6)


def test_memory_kept_by_a_capture_is_its_own_bytes(gpt2) -> None:
    saved = ns.capture(gpt2, [PROMPT] * 8, ["layers[:].output[1]", "layers[:].heads[:].output[-1]"])
    kept = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for _, t in saved.items()}.values())
    assert kept == sum(t.numel() * t.element_size() for _, t in saved.items())


def test_repeated_traces_keep_nothing_alive(gpt2) -> None:
    def tensors() -> int:
        gc.collect()
        return sum(type(thing) in (torch.Tensor, nn.Parameter) for thing in gc.get_objects())

    def once() -> None:
        with torch.no_grad(), gpt2.trace(PROMPT):
            saved = ns.save_activations(gpt2, "layers[0:2].output[-1]")
            saved.subset("layers[1].output[-1]").add_to(gpt2)

    once()
    before = tensors()
    for _ in range(20):
        once()
    assert tensors() <= before + 2


def test_prompts_of_one_token_run_together_as_each_by_itself_where_the_model_keeps_a_state() -> None:
    model = ns.load(build("rwkv"), tokenizer=False)
    path, prompts = "layers[1].output[0]", [[3], [4], [5]]
    together = ns.capture(model, prompts, path).get(path)
    each = torch.cat([ns.capture(model, prompt, path).get(path) for prompt in prompts])
    torch.testing.assert_close(together, each, atol=1e-12, rtol=0)
    assert (each[1:] - each[:1]).abs().max() > 1e-3
