"""A module of the user's own is called with the arguments that its forward takes."""

from __future__ import annotations

from typing import Any

import nnsight
import pytest
import torch
from torch import Tensor, nn

import nnsplice as ns
import zoo
from nnsplice import engine
from nnsplice.errors import BadArgument
from nnsplice.models import peel

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
        inner: Any = peel(model).inner
        found = inner(IDS, output_hidden_states=True)
    assert torch.equal(saved["layers[1].output[-1]"], found.hidden_states[2][:, -1])
    assert torch.equal(ns.patched_logits(model, IDS, saved), found.logits)


def test_an_argument_that_is_needed_and_not_taken_is_named() -> None:
    taken = engine.taken_by(TokensOnly)
    inputs = {"input_ids": IDS, "attention_mask": torch.tensor([[0, 1, 1]])}
    with pytest.raises(BadArgument, match=r"forward takes no attention_mask.*\n  expected: .*input_ids"):
        engine.as_taken(taken, inputs)
    assert set(engine.as_taken(taken, inputs | {"attention_mask": torch.ones(1, 3)})) == {"input_ids"}
