"""Functions that other processes import by name, in the tests of distributed sweeps."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from zoo import wrap


def tiny() -> Any:
    """The model of these tests."""
    return wrap("gpt2")


def other() -> Any:
    """The same with other weights."""
    return wrap("gpt2", seed=5)


def largest(logits: Tensor) -> Tensor:
    """A metric of one's own."""
    return logits.max(-1).values


def halved(value: Tensor) -> Tensor:
    """An operation of one's own."""
    return value / 2
