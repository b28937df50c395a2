"""The runs that rows edit: a model, its prompts, and what is done to each run first."""

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

#: Numbers of prompts that run together -> what they run in.
Around = Callable[[Sequence[int]], AbstractContextManager[Any]]


def unchanged(_prompts: Sequence[int]) -> AbstractContextManager[Any]:
    """Nothing is done to the runs."""
    return nullcontext()


@dataclass(frozen=True, eq=False)
class Base:
    """Where rows come from. What is found out about it on the way is kept in `memo`."""

    model: engine.Model
    prompts: Prompts
    #: For edits that all rows share, such as the noise of a causal trace: while this context lasts, a call of the model
    #: is the run that rows start from.
    around: Around = unchanged
    #: Sites, as `expand` returns them, whose values are kept of the runs.
    keep: tuple[Path, ...] = ()
    memo: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def root(self) -> nn.Module:
        """The plain module."""
        return unwrap(self.model)

    @cached_property
    def cost_model(self) -> CostModel:
        """What tokens cost in the model."""
        return CostModel.of(self.model)
