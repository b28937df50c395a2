"""`Task`: pairs of prompts with answers for one tokenizer, filtered by a model's accuracy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, overload

import torch
from torch import Tensor

from nnsplice import engine
from nnsplice.activations.encoding import encode
from nnsplice.activations.patched import logits_to_keep
from nnsplice.atlas import unwrap
from nnsplice.errors import BadArgument, circumstances
from nnsplice.metrics import Metric, accuracy, logit_diff
from nnsplice.progress import bar
from nnsplice.warn import warn_caller

#: The number of prompts of one length that run at once.
_BATCH_SIZE = 32
#: The text of one token, or of several tokens that are all right.
AnswerText = str | tuple[str, ...]
#: Token spans (start, stop) of one prompt by name.
TokenSpans = Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class Record:
    """A clean and a corrupted prompt with their answers.

    >>> record = ns.tasks.ioi(ns.load("toy"), 1)[0]
    >>> record.clean, record.answer
    ('After Sarah and Helen got to the market, Sarah handed a ball to', ' Helen')
    >>> record.corrupted, record.wrong
    ('After Sarah and Helen got to the market, Helen handed a ball to', ' Sarah')

    Attributes:
        clean: the clean prompt.
        corrupted: the corrupted prompt.
        answer: the answer to the clean prompt.
        wrong: the wrong answer, which is the answer to the corrupted prompt.
        spans: token spans (start, stop) of the clean prompt by name.
        corrupted_spans: those of the corrupted prompt.
        variables: the values of the task's variables by name.
    """

    clean: str
    corrupted: str
    answer: AnswerText
    wrong: AnswerText
    spans: TokenSpans = field(default_factory=dict)
    corrupted_spans: TokenSpans = field(default_factory=dict)
    variables: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """Pairs of prompts with their answers. It is a sequence of records, and a slice of it is a task.

    >>> toy = ns.load("toy")
    >>> task = ns.tasks.ioi(toy, 20).filter(toy)
    >>> task
    Task ioi: 20 of 20 pairs that this model tells apart
    >>> result = ns.sweep(toy, task.clean, task.corrupted, 'layers[:].output["s2"]', task.metric, spans=task.spans,
    ...                   progress=False)
    >>> result.best(1).path[0]
    'layers[0].output["s2"]'

    Attributes:
        name: the name of the task.
        records: the pairs.
        opposite: whether the answer to the corrupted prompt is the wrong one; False if it is just less certain
            (`greater_than`).
        tried: the number of records before `filter`; None without it.
    """

    name: str
    records: tuple[Record, ...]
    opposite: bool = True
    tried: int | None = None

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)

    @overload
    def __getitem__(self, at: int) -> Record: ...
    @overload
    def __getitem__(self, at: slice) -> Task: ...
    def __getitem__(self, at: int | slice) -> Record | Task:
        return self.records[at] if isinstance(at, int) else replace(self, records=self.records[at], tried=None)

    def __repr__(self) -> str:
        pairs = f" of {self.tried} pairs that this model tells apart" if self.tried is not None else " pairs"
        return f"Task {self.name}: {len(self)}{pairs}"

    @property
    def clean(self) -> list[str]:
        """The clean prompts."""
        return [record.clean for record in self]

    @property
    def corrupted(self) -> list[str]:
        """The corrupted prompts, each with as many tokens as its clean one."""
        return [record.corrupted for record in self]

    @property
    def answers(self) -> list[AnswerText]:
        """The answers to the clean prompts."""
        return [record.answer for record in self]

    @property
    def wrong(self) -> list[AnswerText]:
        """The wrong answers, which are the answers to the corrupted prompts."""
        return [record.wrong for record in self]

    @property
    def metric(self) -> Metric:
        """The logit difference of right and wrong answers."""
        return logit_diff(self.answers, self.wrong)

    @property
    def spans(self) -> dict[str, dict[str, list[tuple[int, int]]]]:
        """The token spans that all records have, for `spans=` of a sweep."""
        names = [
            name for name in self.records[0].spans if all(name in r.spans and name in r.corrupted_spans for r in self)
        ]
        return {
            "clean": {name: [record.spans[name] for record in self] for name in names},
            "corrupted": {name: [record.corrupted_spans[name] for record in self] for name in names},
        }

    def accuracy(self, model: Any, *, by: Literal["pair", "top"] = "pair", progress: bool = True) -> float:
        """The share of records that a model gets right.

        >>> toy = ns.load("toy")
        >>> ns.tasks.ioi(toy, 20).accuracy(toy)
        1.0

        Args:
            model: a model from `ns.load`.
            by: `"pair"`: the answer is above the wrong one after the clean prompt, and below after the corrupted one
                (in `greater_than`, less far above); `"top"`: the answer has the highest logit after the clean prompt.
            progress: show a progress bar.

        Returns:
            The share, from 0 to 1.

        Raises:
            BadArgument: another `by`.
        """
        return sum(self._solved(model, by, progress)) / len(self)

    def filter(self, model: Any, *, by: Literal["pair", "top"] = "pair", progress: bool = True) -> Task:
        """Keep the records that a model gets right.

        Args:
            model: a model from `ns.load`.
            by: as for `accuracy`.
            progress: show a progress bar.

        Returns:
            The smaller task.

        Raises:
            BadArgument: the model gets none right.
        """
        solved = self._solved(model, by, progress)
        kept = tuple(record for record, is_solved in zip(self, solved, strict=True) if is_solved)
        if not kept:
            raise BadArgument(
                f"this model gets none of the {len(self)} pairs of the task {self.name} right",
                expected="a model that knows the task",
                write='by="pair", which asks less' if by == "top" else None,
            )
        if len(kept) < len(self) / 2:
            warn_caller(
                f"this model gets {len(kept)} of {len(self)} pairs of the task {self.name} right; what is found on "
                "those says little about the task"
            )
        return replace(self, records=kept, tried=self.tried or len(self))

    def _solved(self, model: Any, by: str, progress: bool) -> list[bool]:
        if by not in ("pair", "top"):
            raise BadArgument(f"by={by!r}", expected='"pair" or "top"')
        model = engine.as_model(model)
        with circumstances(f"the task {self.name}"):
            metric = accuracy(self.answers) if by == "top" else self.metric
            bound, every = metric.bind(engine.tokenizer_of(model), len(self)), range(len(self))
            clean = bound(_last_logits(model, self.clean, progress), every)
            if by == "top":
                return (clean > 0).tolist()
            corrupted = bound(_last_logits(model, self.corrupted, progress), every)
        return ((clean > 0) & (corrupted < (0 if self.opposite else clean))).tolist()


def _last_logits(model: engine.Model, prompts: Sequence[str], progress: bool) -> Tensor:
    """The logits of the last token of each prompt, `[prompt, vocab]`, in float32."""
    engine.refuse_edits(model)
    engine.refuse_changed_logits(model, bare=True)
    encoded = encode(model, prompts)
    module: Any = unwrap(model)
    found: dict[int, Tensor] = {}
    with torch.no_grad(), engine.locked(model), bar("the task's prompts", len(encoded), "prompt", progress) as shown:
        for rows in encoded.batches(model, at_most=_BATCH_SIZE):
            inputs = encoded.inputs(rows, model.device)
            assert isinstance(inputs, Mapping)
            out = module(**inputs, **logits_to_keep(model, -1, ()))
            logits = out.logits if hasattr(out, "logits") else out[0]
            found |= dict(zip(rows, logits[:, -1].float().cpu(), strict=True))
            shown.update(len(rows))
    return torch.stack([found[row] for row in range(len(encoded))])
