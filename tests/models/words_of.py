"""Comparing texts of the toy language word by word."""

from __future__ import annotations

from nnsplice.models.language import tokens


def differing(one: str, other: str) -> list[int]:
    """The words at which two texts of one length differ."""
    return [i for i, (a, b) in enumerate(zip(tokens(one), tokens(other), strict=True)) if a != b]
