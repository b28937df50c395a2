"""The words that messages are made of."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch

import nnsplice as ns
from nnsplice.errors import named


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (1, "an int"),
        ("x", "a str"),
        (None, "a NoneType"),
        (torch.ones(1), "a Tensor"),
        (OrderedDict(), "an OrderedDict"),
    ],
)
def test_a_value_is_named_with_its_article(value: object, words: str) -> None:
    assert named(value) == words


def test_messages_speak_of_what_was_given() -> None:
    with pytest.raises(TypeError, match="an int is no model"):
        ns.load(7)  # pyright: ignore[reportArgumentType]
