"""Corresponding tokens of a pair by their roles, which are relative to the span `"subject"`."""

from __future__ import annotations

from nnsplice.activations.prompts import Prompts


def partner(edited: Prompts, source: Prompts, prompt: int, token: int) -> int | None:
    """The token of the other prompt with the same role, counted from its subject; None where there is none."""
    assert edited.spans is not None and source.spans is not None
    here, there = (
        _role_ranges(*prompts.spans["subject"][prompt], len(prompts.ids[prompt]))  # type: ignore[index]
        for prompts in (edited, source)
    )
    for (start, stop), (first, last) in zip(here, there, strict=True):
        if start <= token < stop:
            return first + token - start if stop - start == last - first else None
    return None


def _role_ranges(start: int, stop: int, length: int) -> list[tuple[int, int]]:
    """The token ranges of each role: before the subject, its first, inner and last tokens; the same after it."""
    after, end = min(stop + 1, length - 1), length - 1
    inner = min(start + 1, stop - 1)
    return [
        (0, start), (start, inner), (inner, stop - 1), (stop - 1, stop),
        (stop, max(after, stop)), (max(after, stop), max(end, stop)), (max(end, stop), length),
    ]  # fmt: skip
