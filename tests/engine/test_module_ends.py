"""Values at the ends of modules, read and changed outside of traces, against plain arithmetic."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nnsplice import engine
from nnsplice.atlas import Site


class _Inner(nn.Module):
    def forward(self, states: Tensor, scale: float = 2.0) -> tuple[Tensor, str]:
        return states * scale, "kept"


class _Outer(nn.Module):
    def __init__(self, named: bool) -> None:
        super().__init__()
        self.inner, self.named = _Inner(), named

    def forward(self, states: Tensor) -> tuple[Tensor, str]:
        return self.inner(states=states, scale=3.0) if self.named else self.inner(states, scale=3.0)


STATES = torch.arange(6.0).reshape(1, 2, 3)


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize(("end", "expected"), [("input", (STATES + 1) * 3), ("output", STATES * 3 + 1)])
def test_what_a_module_reads_or_returns_is_changed_and_seen_while_it_lasts(
    named: bool, end: Any, expected: Tensor
) -> None:
    root, seen = _Outer(named), []
    site = Site("inner", end, item=0)
    with engine.changing(root, site, lambda value: value + 1), engine.reading(root, site, seen.append):
        made, beside = root(STATES)
    assert torch.equal(made, expected) and beside == "kept"
    assert [value.tolist() for value in seen] == [((STATES if end == "input" else STATES * 3) + 1).tolist()]
    assert torch.equal(root(STATES)[0], STATES * 3) and len(seen) == 1


def test_a_change_that_comes_first_is_seen_by_hooks_that_were_there_before() -> None:
    root, seen = _Outer(False), []
    site = Site("inner", "input", item=0)
    with (
        engine.reading(root, site, seen.append),
        engine.changing(root, site, lambda value: value + 1, first=True),
    ):
        root(STATES)
    assert torch.equal(seen[0], STATES + 1)
