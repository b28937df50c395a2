"""Comparing texts of the toy language word by word."""

from __future__ import annotations

from nnsplice.models.toy_sentences import split_words


def differing(one: str, other: str) -> list[int]:
    """The words at which two texts of one length differ."""
    return [i for i, (a, b) in enumerate(zip(split_words(one), split_words(other), strict=True)) if a != b]
