"""The fixture `machine`: simulated GPUs for one test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from machine.simulated import Machine


@pytest.fixture
def machine() -> Iterator[Callable[..., Machine]]:
    """`machine(count, capacity)`: from here to the end of the test there are so many simulated GPUs."""
    with ExitStack() as stack:
        yield lambda count=1, capacity=80 << 30: stack.enter_context(Machine(count, capacity))
