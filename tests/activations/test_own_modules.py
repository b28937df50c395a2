"""A module of the user's own is called with the arguments that its forward takes."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import nnsight
import pytest
import torch
from torch import Tensor, nn

import nnsplice as ns
import zoo
from nnsplice import engine
from nnsplice.errors import BadArgument, NeedsProbe
from nnsplice.models import unwrap

IDS = torch.tensor([[3, 9, 4]])


class _Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = zoo.build("llama")
        self.config = self.inner.config


class TokensOnly(_Own):
    def forward(self, input_ids: Tensor) -> Any:
        return self.inner(input_ids)


class OtherName(_Own):
    def forward(self, tokens: Tensor) -> Any:
        return self.inner(tokens)


class Anything(_Own):
    def forward(self, **kwargs: Any) -> Any:
        assert set(kwargs) >= {"input_ids"}
        return self.inner(**kwargs)


@pytest.mark.parametrize("kind", [TokensOnly, OtherName, Anything])
def test_it_is_given_what_it_takes(kind: type[_Own]) -> None:
    model = nnsight.NNsight(kind())
    saved = ns.capture(model, IDS, "layers[1].output[-1]")
    with torch.no_grad():
        inner: Any = unwrap(model).inner
        found = inner(IDS, output_hidden_states=True)
    assert torch.equal(saved["layers[1].output[-1]"], found.hidden_states[2][:, -1])
    assert torch.equal(ns.patched_logits(model, IDS, saved), found.logits)


def test_an_argument_that_is_needed_and_not_taken_is_named() -> None:
    taken = engine.signature_of(TokensOnly)
    inputs = {"input_ids": IDS, "attention_mask": torch.tensor([[0, 1, 1]])}
    with pytest.raises(BadArgument, match=r"forward takes no attention_mask.*\n  expected: .*input_ids"):
        engine.fitted_inputs(taken, inputs)
    assert set(engine.fitted_inputs(taken, inputs | {"attention_mask": torch.ones(1, 3)})) == {"input_ids"}


# --- modules without a config, of which nothing is known but their forward -------------------------------------------


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x).tanh()


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.blocks, self.head = (
            nn.Embedding(20, 8), nn.ModuleList(Block() for _ in range(3)), nn.Linear(8, 20),
        )  # fmt: skip

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor, scale: Tensor, shift: Any = None) -> Tensor:
        return self.b(self.a(x) * scale) + (0 if shift is None else shift)


@pytest.mark.parametrize("wrap", [ns.load, nnsight.NNsight])
@pytest.mark.parametrize("ids", [IDS, IDS.tolist(), {"input_ids": IDS, "attention_mask": torch.ones(1, 3)}])
def test_prompts_of_token_ids_are_the_probe_themselves(wrap: Any, ids: Any) -> None:
    own = Stack().eval()
    model = wrap(own)
    saved = ns.capture(model, ids, "model.blocks[:].output[:]")
    x = own.embed(IDS)
    for n, block in enumerate(own.blocks):
        x = block(x)
        assert torch.equal(torch.stack([saved[f"model.blocks[{n}].output[{t}]"] for t in range(3)], 1), x)
    assert torch.equal(ns.patched_logits(model, ids, saved), own.head(x))
    assert [str(path) for path in ns.expand(model, "model.blocks[-1].output")] == ["model.blocks[2].output"]


def test_a_sweep_is_what_hooks_give() -> None:
    own = Stack().eval().double()
    result = ns.sweep(
        ns.load(own), [[3, 9, 4]], [[3, 8, 4]], "model.blocks[:].output[:]", ns.logit_diff(5, 6).at(1), progress=False
    )
    kept: list[Tensor] = []
    handle = own.blocks[0].register_forward_hook(lambda _, __, out: kept.append(out))  # pyright: ignore[reportArgumentType]
    own(IDS)
    handle.remove()
    handle = own.blocks[0].register_forward_hook(
        lambda _, __, out: torch.cat([out[:, :1], kept[0][:, 1:2], out[:, 2:]], 1)
    )
    logits = own(torch.tensor([[3, 8, 4]])).detach()[0, 1]
    handle.remove()
    assert float(result.grid().sel(prompt=0, layer=0, position=1)) == pytest.approx(float(logits[5] - logits[6]))


def test_inputs_by_name_with_a_row_each_or_for_all() -> None:
    own = Scaled()
    model, x, scale = ns.load(own), torch.randn(3, 5, 4), torch.randn(3, 1, 1)
    saved = ns.capture(model, {"x": x, "scale": scale}, ["model.a.output[-1]", "model.b.input[-1]"], batch_size=2)
    assert torch.equal(saved["model.a.output[-1]"], own.a(x)[:, -1])
    torch.testing.assert_close(saved["model.b.input[-1]"], (own.a(x) * scale)[:, -1])
    one = ns.capture(model, {"x": x, "scale": torch.tensor(2.0), "shift": 1.0}, "model.b.input[0]")
    torch.testing.assert_close(one["model.b.input[0]"], (own.a(x) * 2)[:, 0])


def test_values_without_tokens_are_one_token_each() -> None:
    own: Any = nn.Sequential(OrderedDict(first=nn.Linear(4, 6), second=nn.Linear(6, 3)))
    x = torch.randn(7, 4)
    saved = ns.capture(ns.load(own), x, "model.first.output[-1]")
    assert saved.rows == 7 and torch.equal(saved["model.first.output[-1]"], own.first(x))
    with pytest.raises(IndexError, match="position"):
        ns.capture(ns.load(own), x, "model.first.output[1]")


@pytest.mark.parametrize(
    ("inputs", "kind", "message"),
    [
        ({"x": torch.ones(2, 3, 4), "scal": 1.0}, BadArgument, "takes no scal"),
        ({"x": torch.ones(2, 3, 4)}, BadArgument, "needs scale"),
        ({"x": 1.0, "scale": 2.0}, BadArgument, "no row"),
        (torch.ones(2, 3, 4), NeedsProbe, "first of these prompts failed"),
    ],
)
def test_inputs_that_a_forward_does_not_take_are_named(inputs: Any, kind: type[Exception], message: str) -> None:
    model = ns.load(Scaled())
    with pytest.raises(kind, match=message):
        ns.capture(model, inputs, "model.a.output[-1]")
    # A mistake is not remembered as the way to call it.
    assert ns.capture(model, {"x": torch.ones(1, 2, 4), "scale": torch.ones(1, 1, 1)}, "model.a.output[-1]").rows == 1
