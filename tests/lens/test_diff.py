"""What differs between two models on unrelated text: a planted bias is found again."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import nnsplice as ns
from nnsplice.atlas import unwrap
from nnsplice.errors import NnspliceError
from zoo import tokenizer, wrap

TEXTS = ["w3 w4 w5 w6", "w9 w8 w7", "w5 w3 w4 w9"]


def planted(token: int) -> tuple[Any, Any, torch.Tensor]:
    """A model, and one whose second MLP always adds a direction that says one token."""
    base = wrap("gpt2").to(torch.float64)
    root: Any = copy.deepcopy(unwrap(base))
    direction = 3 * root.lm_head.weight[token].detach().clone()
    with torch.no_grad():
        root.transformer.h[1].mlp.c_proj.bias.add_(direction)
    return base, ns.load(root, tokenizer=tokenizer()), direction


def test_a_vector_is_of_one_place_and_of_some_tokens() -> None:
    base, tuned, _ = planted(20)
    read = ns.diff_lens(base, tuned, TEXTS, "layers[:].output", first=2, k=2)
    with pytest.raises(ns.errors.BadArgument, match="names 3 sites"):
        read.vector("layers[:].output")
    with pytest.raises(ns.errors.BadArgument, match="first=0"):
        ns.diff_lens(base, tuned, TEXTS, first=0)


def test_a_planted_direction_is_the_difference_and_says_its_token() -> None:
    base, tuned, direction = planted(20)
    read = ns.diff_lens(base, tuned, TEXTS, "layers[:].output", first=3, k=4)
    for number in range(3):
        torch.testing.assert_close(read.differences.get(f"layers[1].output[{number}]").reshape(-1), direction)
        assert float(read.differences.get(f"layers[0].output[{number}]").abs().max()) < 1e-12
    tokens = read.tokens()
    root: Any = unwrap(tuned)
    with torch.no_grad():
        expected = root.lm_head(root.transformer.ln_f(direction)).softmax(-1).topk(4)
    mine = tokens[(tokens["layer"] == 1) & (tokens["position"] == 0)]
    assert mine["probability"].tolist() == pytest.approx(expected.values.tolist())
    assert read.ids[3].tolist() == expected.indices.tolist()
    vector = read.vector("layers[1].output")
    torch.testing.assert_close(vector.get("layers[1].output[-1]").reshape(-1), direction)


def test_a_mean_is_over_prompts() -> None:
    base, tuned, _ = planted(20)
    read = ns.diff_lens(base, tuned, TEXTS, "layers[2].output", first=1)
    each = [ns.capture(m, TEXTS, "layers[2].output[0]").get("layers[2].output[0]") for m in (tuned, base)]
    expected = (each[0] - each[1]).mean(0)
    torch.testing.assert_close(read.differences.get("layers[2].output[0]").reshape(-1), expected.reshape(-1))


def test_what_does_not_fit_is_refused() -> None:
    base, tuned, _ = planted(20)
    cases: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
        ((base, base, TEXTS), {"first": 1}, "the same"),
        ((base, tuned, TEXTS, "layers[0].mlp"), {"first": 1}, "reads the stream"),
        ((base, tuned, TEXTS), {"first": 4}, "shortest prompt"),
        ((base, wrap("gpt2", n_embd=32), TEXTS), {"first": 1}, "wide"),
    ]
    for given, options, text in cases:
        with pytest.raises(NnspliceError, match=text):
            ns.diff_lens(*given, **options)
