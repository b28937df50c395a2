"""`BaseRuns`: the unedited runs that rows start from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import nn

from nnsplice import engine
from nnsplice.activations.prompts import Prompts
from nnsplice.atlas import unwrap
from nnsplice.packed.cost import CostModel
from nnsplice.paths import Path

#: A context for a run of the prompts with these numbers.
Around = Callable[[Sequence[int]], AbstractContextManager[Any]]


def unchanged(_prompts: Sequence[int]) -> AbstractContextManager[Any]:
    """A context that changes nothing."""
    return nullcontext()


@dataclass(frozen=True, eq=False)
class BaseRuns:
    """The model and prompts that rows edit, with a cache (`memo`) of the recording and of checks."""

    model: engine.Model
    prompts: Prompts
    #: The context of every run, for an edit that all rows share, such as the noise of a causal trace.
    around: Around = unchanged
    #: Sites, as `expand` returns them, whose values in the unedited runs are kept.
    keep: tuple[Path, ...] = ()
    memo: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def root(self) -> nn.Module:
        """The plain module."""
        return unwrap(self.model)

    @cached_property
    def cost_model(self) -> CostModel:
        """The cost of tokens in the model."""
        return CostModel.of(self.model)
