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
from nnsplice.metrics import Bound, Metric
from nnsplice.packed.cost import CostModel


@dataclass(frozen=True)
class WeightRuns:
    """Forward passes of some prompts, for a metric."""

    base: engine.Model
    given: Prompts
    metric: Bound
    batch_size: int | None
    #: The largest number of prompts that run at once; None for no limit.
    at_most: int | None = field(default=None, kw_only=True)
    #: The tuned model, where it is one.
    tuned: Sequence[Any] = field(default=(), kw_only=True)
    #: The arguments of every call besides the prompts.
    arguments: Mapping[str, Any]
    #: Whether each module (by its id) can compute the logits of the last tokens only.
    _keeps: dict[int, bool] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, base: engine.Model, tuned: Any, prompts: Any, metric: Any, batch_size: int | None) -> WeightRuns:
        """The runs of prompts, with a metric that may be bound to them already."""
        engine.refuse_edits(base)
        engine.refuse_changed_logits(base, bare=True)
        given = encode(base, prompts)
        given.require_tokens("a sweep is over")
        texts = given.texts if given.decoder_ids is None else None
        bound = metric
        if not isinstance(bound, Bound):
            bound = Metric.of(metric).bind(engine.tokenizer_of(base), len(given), texts)
        bound.metric.check_lengths(given.lengths("decoder"))
        parameters = inspect.signature(type(unwrap(base)).forward).parameters
        arguments = {"use_cache": False} if "use_cache" in parameters else {}
        return cls(base, given, bound, batch_size, arguments, tuned=() if isinstance(tuned, Mapping) else (tuned,))

    def take(self, prompts: Sequence[int], at_most: int) -> WeightRuns:
        """The runs of some of the prompts, at most `at_most` at once."""
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
        return self.given.batches(self.base, *self.tuned, size=self.batch_size, at_most=self.at_most)

    def logits(self, module: Any, rows: Sequence[int]) -> Tensor:
        """The logits `[row, vocab]` at the position that the metric reads."""
        inputs = self.given.inputs(rows, next(module.parameters()).device)
        assert isinstance(inputs, Mapping)
        fewer = {"logits_to_keep": -self._at(rows)} if self._keeps_logits(module) else {}
        output = module(**inputs, **fewer, **self.arguments)
        logits = output.logits if hasattr(output, "logits") else output[0]
        return logits[:, self._at(rows)].clone()

    def computed(self, module: Any, rows: Sequence[int]) -> int:
        """The number of tokens of each prompt whose logits are computed."""
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
        """The logits of every prompt at the position that the metric reads, `[prompt, vocab]`."""
        found: dict[int, Tensor] = {}
        for rows in self.batches():
            found |= dict(zip(rows, self.logits(module, rows), strict=True))
        return torch.stack([found[row] for row in range(len(self.given))])

    def measured(self, rows: Sequence[int], logits: Tensor, reference: Tensor) -> np.ndarray:
        """The metric of these prompts, `[row]`, from their logits `[row, vocab]`."""
        compared = reference[list(rows)] if self.metric.metric.compares else None
        return self.metric(logits, rows, compared).double().cpu().numpy()
