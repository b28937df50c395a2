"""Forward passes of a sweep of weights, on plain modules."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nnsplice import engine
from nnsplice.activations.encoding import encode
from nnsplice.activations.prompts import Prompts
from nnsplice.atlas import unwrap
from nnsplice.errors import BadArgument
from nnsplice.metrics import Bound, Metric
from nnsplice.packed.cost import CostModel


@dataclass(frozen=True)
class WeightRuns:
    """Forward passes of some prompts and their metric."""

    base: engine.Model
    given: Prompts
    metric: Bound
    batch_size: int | None
    #: How many prompts there is memory for.
    at_most: int | None = field(default=None, kw_only=True)
    #: Whether the tuned model may tell rows of a batch apart.
    by_row: bool = field(default=False, kw_only=True)
    #: What every call is given beside the prompts.
    arguments: Mapping[str, Any]
    #: For each module: whether it can compute the logits of the last tokens only.
    _keeps: dict[int, bool] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, base: engine.Model, tuned: Any, prompts: Any, metric: Any, batch_size: int | None) -> WeightRuns:
        """Runs of prompts in any of their forms, with a metric that may be bound to them."""
        engine.refuse_edits(base)
        engine.refuse_changed_logits(base, bare=True)
        given = encode(base, prompts)
        if given.values is not None:
            raise BadArgument("a sweep is over tokens, and these prompts are values", expected="texts or token ids")
        texts = given.texts if given.decoder_ids is None else None
        bound = metric
        if not isinstance(bound, Bound):
            bound = Metric.of(metric).bind(engine.tokenizer_of(base), len(given), texts)
        bound.metric.check_lengths(given.lengths("decoder"))
        taken = inspect.signature(type(unwrap(base)).forward).parameters
        by_row = not isinstance(tuned, Mapping) and engine.has_code_by_row(tuned)
        arguments = {"use_cache": False} if "use_cache" in taken else {}
        return cls(base, given, bound, batch_size, arguments, by_row=by_row)

    def take(self, prompts: Sequence[int], at_most: int) -> WeightRuns:
        """Those of some of the prompts, at most so many at once."""
        return replace(self, given=self.given.take(prompts), metric=self.metric.take(prompts), at_most=at_most)

    @cached_property
    def cost_model(self) -> CostModel:
        """The cost of tokens in the model."""
        return CostModel.of(self.base)

    @property
    def tokens(self) -> tuple[tuple[str, ...], ...]:
        """The prompts' tokens as texts."""
        return engine.token_texts(self.base, self.given.decoder_ids or self.given.ids)

    def batches(self) -> list[list[int]]:
        """Prompts of one length that run together."""
        at_most = 1 if self.by_row and self.batch_size is None else self.at_most
        return self.given.batches(self.base, self.batch_size, at_most=at_most)

    def logits(self, module: Any, rows: Sequence[int]) -> Tensor:
        """`[row, vocab]`, at the position that the metric reads."""
        inputs = self.given.inputs(rows, next(module.parameters()).device)
        assert isinstance(inputs, Mapping)
        fewer = {"logits_to_keep": -self._at(rows)} if self._keeps_logits(module) else {}
        logits = module(**inputs, **fewer, **self.arguments)
        logits = logits.logits if hasattr(logits, "logits") else logits[0]
        return logits[:, self._at(rows)].clone()

    def computed(self, module: Any, rows: Sequence[int]) -> int:
        """The number of tokens of these prompts whose logits are computed."""
        return -self._at(rows) if self._keeps_logits(module) else self.given.length("decoder", rows[0])

    def _at(self, rows: Sequence[int]) -> int:
        """The position that the metric reads, counted from the end."""
        length = self.given.length("decoder", rows[0])
        return self.metric.metric.position % length - length

    def _keeps_logits(self, module: Any) -> bool:
        if id(module) not in self._keeps:
            self._keeps[id(module)] = engine.keeps_logits(module)
        return self._keeps[id(module)]

    def all_logits(self, module: Any) -> Tensor:
        """The same of every prompt, in their order."""
        found: dict[int, Tensor] = {}
        for rows in self.batches():
            found |= dict(zip(rows, self.logits(module, rows), strict=True))
        return torch.stack([found[row] for row in range(len(self.given))])

    def measured(self, rows: Sequence[int], logits: Tensor, reference: Tensor) -> np.ndarray:
        """The metric of these prompts, whose logits these are."""
        compared = reference[list(rows)] if self.metric.metric.compares else None
        return self.metric(logits, rows, compared).double().cpu().numpy()
