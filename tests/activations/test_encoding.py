"""Prompts of texts as token ids."""

from __future__ import annotations

import warnings

import pytest

import nnsplice as ns
from nnsplice.activations.encoding import encode
from zoo import wrap


def test_words_that_the_tokenizer_does_not_know_are_named_with_their_prompt() -> None:
    toy = ns.load("toy")
    with pytest.warns(UserWarning, match=r"does not know 'Eiffel', 'Gate' in prompt 1, and writes <\|unk\|> for each"):
        encode(toy, ["After Sarah and Helen got to the market", "The Eiffel Tower is in Gate"])


@pytest.mark.parametrize("text", ["After Sarah and Helen got to the market", "After <|unk|> and Helen"])
def test_known_words_and_the_unknown_token_itself_are_not_warned_of(text: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(encode(ns.load("toy"), text)) == 1


def test_an_unknown_token_that_ends_texts_is_not_warned_of() -> None:
    model = wrap("gpt2")
    tokenizer = model.tokenizer
    tokenizer.eos_token = tokenizer.unk_token
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tokenizer.unk_token_id in encode(model, "Paris w3").ids[0]
