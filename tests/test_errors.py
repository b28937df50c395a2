"""The words that messages are made of."""

from __future__ import annotations

import pickle
from collections import OrderedDict

import pytest
import torch

import nnsplice as ns
from nnsplice import errors
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


@pytest.mark.parametrize("name", errors.__all__)
def test_an_error_has_its_public_import_path_and_keeps_its_message_in_a_pickle(name: str) -> None:
    kind = getattr(errors, name)
    assert kind.__module__ == "nnsplice.errors"
    copy = pickle.loads(pickle.dumps(kind("found", expected="right", write="this")))
    assert type(copy) is kind and str(copy) == "found\n  expected: right\n  write: this"
