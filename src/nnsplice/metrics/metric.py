"""`Metric`, and `Bound`, a metric with the token ids of its answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from nnsplice.digests import function_digest
from nnsplice.errors import BadArgument, BadType, ShortRow, named
from nnsplice.metrics.answers import (
    Answer,
    Ids,
    Spelling,
    TokenSequence,
    check_spellings,
    ids_of,
    spaced_tokens,
    spellings_of,
    warn_of_spaces,
)

#: `(logits, named token ids [row], reference)` -> `[row]`
Rule = Callable[..., Tensor]


@dataclass(frozen=True)
class Metric:
    """A metric: a number for each row of logits.

    >>> logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 1.0]])
    >>> ns.logit_diff(1, 0)(logits)
    tensor([ 2., -3.])
    >>> ns.Metric.of(lambda logits: logits.max(-1).values)(logits)
    tensor([2., 3.])

    Attributes:
        name: the name.
        rule: the function of logits and answers.
        answers: the answer tokens, by the rule's argument.
        position: the position of the prompt whose logits are read.
        compares: whether it compares with the logits of a reference run.
        local: whether it needs the logits of its answers only.
        sequence: whether its answer has several tokens, which a sweep appends to the prompts.
    """

    name: str
    rule: Rule = field(repr=False)
    answers: Mapping[str, Answer | TokenSequence] = field(default_factory=dict)
    position: int = -1
    compares: bool = False
    local: bool = False
    sequence: bool = False

    @classmethod
    def of(cls, metric: Metric | Callable[[Tensor], Tensor]) -> Metric:
        """A metric from a function `logits[row, vocab] -> [row]`; a metric is returned as it is.

        Args:
            metric: the function.

        Returns:
            The metric.

        Raises:
            BadType: neither a metric nor a function.
        """
        if isinstance(metric, Metric):
            return metric
        if not callable(metric):
            raise BadType(
                f"{named(metric)} is no metric",
                expected="ns.logit_diff(answer, wrong) or another metric, or a function logits[row, vocab] -> [row]",
            )
        return cls(getattr(metric, "__name__", type(metric).__name__), metric)

    def at(self, position: int) -> Metric:
        """The same metric at another position of the prompt.

        Args:
            position: the position.

        Returns:
            The metric.
        """
        return replace(self, position=position)

    def check_lengths(self, lengths: Iterable[int]) -> None:
        """Check that every prompt has the metric's position.

        Args:
            lengths: the number of tokens of each prompt.

        Raises:
            ShortRow: a prompt is too short.
        """
        for prompt, length in enumerate(lengths):
            if not -length <= self.position < length:
                raise ShortRow(
                    f"{self.name} reads position [{self.position}], and prompt {prompt} has {length} "
                    f"token{'s' * (length != 1)}",
                    expected=f"[0] to [{length - 1}], or [-{length}] to [-1]",
                )

    def __call__(self, logits: Float[Tensor, "row vocab"], reference: Tensor | None = None) -> Tensor:
        """The number for each row; with answers as texts, bind the metric to a model first."""
        return self.bind(None, logits.shape[0])(logits, range(logits.shape[0]), reference)

    def bind(self, tokenizer: Any, prompts: int, texts: Sequence[str] | None = None) -> Bound:
        """The metric with its answers as token ids for each prompt.

        Args:
            tokenizer: the model's tokenizer; None for answers as ids.
            prompts: the number of prompts.
            texts: the prompts that the answers follow; an answer without the space that the tokenizer expects there
                warns.

        Returns:
            The metric, to be called with logits and prompt numbers.

        Raises:
            BadArgument: a text that is not one token, equal answers, or another number of answers than prompts.
        """
        if self.sequence:
            raise BadArgument(
                f"{self.name} reads the answer's tokens one after the other, so they have to stand in the prompts",
                expected="a sweep or an ablation, which appends them",
            )
        ids = {name: ids_of(self.name, name, one, tokenizer, prompts) for name, one in self.answers.items()}
        spaced: dict[str, dict[tuple[int, str], int]] = {}
        if texts is not None and tokenizer is not None:
            for name, one in self.answers.items():
                spaced[name] = spaced_tokens(one, ids[name], tokenizer, texts)
                warn_of_spaces(self.name, name, spaced[name], tokenizer, texts)
        if len(ids) == 2 and len(set(ids.values())) == 1:
            raise BadArgument(
                f"{' and '.join(ids)} are the same, so {self.name} is 0 whatever the model says",
                expected="two different tokens",
            )
        spellings = [
            spelling
            for name, one in self.answers.items()
            for spelling in spellings_of(name, one, ids[name], tokenizer, spaced.get(name, {}))
        ]
        return Bound(self, ids, tuple(spellings))


#: A metric, or a function `logits[row, vocab] -> [row]`.
MetricLike = Metric | Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Bound:
    """A metric with the token ids of its answers.

    Attributes:
        metric: the metric.
        ids: the token ids of each answer, a set or one for each prompt.
        spellings: the answers' other spellings, with or without a leading space.
    """

    metric: Metric
    ids: Mapping[str, Ids]
    spellings: tuple[Spelling, ...] = field(default=(), repr=False, compare=False)

    def __call__(
        self, logits: Float[Tensor, "row vocab"], prompts: Sequence[int], reference: Tensor | None = None
    ) -> Tensor:
        """The number for each row, whose prompts are given by their numbers.

        A function of the user's own is given one row at a time, so that the number of a row does not depend on others.
        Logits in half precision are converted to single precision.

        Args:
            reference: for a metric that compares, the other run's logits of the same rows.
        """
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        if not self._is_builtin and len(logits) > 1:
            rows = ([number] for number in range(len(logits)))
            return torch.cat(
                [self(logits[r], [prompts[r[0]]], None if reference is None else reference[r]) for r in rows]
            )
        for name, ids in self.ids.items():
            wrong = next((i for one in ids for i in _listed(one) if not 0 <= i < logits.shape[-1]), None)
            if wrong is not None:
                raise BadArgument(
                    f"{self.metric.name} was given {wrong} as {name}=",
                    expected=f"a token id from 0 to {logits.shape[-1] - 1}",
                )
        chosen = {name: _tensor([ids[p] for p in prompts]).to(logits.device) for name, ids in self.ids.items()}
        if self.metric.compares:
            if reference is None:
                raise BadArgument(
                    f"{self.metric.name} compares two runs, and there is one", expected="reference= the other's logits"
                )
            chosen["reference"] = reference.to(logits)
        try:
            value = self.metric.rule(logits, **chosen)
        except Exception as error:
            if isinstance(error, IndexError) and "too many indices" in str(error) and not self._is_builtin:
                raise BadArgument(
                    f"{self.metric.name} indexes the logits as [row, token, vocab], and a metric is given [row, vocab] "
                    f"= {list(logits.shape)}, those of position {self.metric.position}",
                    expected="a function logits[row, vocab] -> [row]",
                    write="lambda logits: logits[:, token]   (another position: ns.Metric.of(function).at(-2))",
                ) from error
            if not self.metric.answers:  # a function of the user's own keeps its error
                error.add_note(
                    f"in: the metric {self.metric.name}, which was given logits [row, vocab] = {list(logits.shape)}"
                    f" of position {self.metric.position}, and has to return one number for each row"
                )
            raise
        if not isinstance(value, Tensor) or value.shape != (logits.shape[0],):
            found = f"shape {list(value.shape)}" if isinstance(value, Tensor) else f"{named(value)}"
            raise BadArgument(
                f"{self.metric.name} made {found} of logits {list(logits.shape)}", expected="one number for each row"
            )
        return value

    def take(self, rows: Sequence[int]) -> Bound:
        """The metric for these prompts only."""
        return Bound(self.metric, {name: tuple(ids[row] for row in rows) for name, ids in self.ids.items()})

    def check_answers(self, logits: Float[Tensor, "row vocab"], prompts: Sequence[int]) -> None:
        """Warn of an answer whose other spelling is far likelier in an unedited run."""
        check_spellings(self.metric.name, self.spellings, logits, prompts)

    def tokens(self, prompts: Sequence[int]) -> Tensor:
        """`[row, answer]`, the token ids of all answers; smaller sets are padded with their first token."""
        return torch.cat([_filled(_tensor([ids[p] for p in prompts])) for ids in self.ids.values()], 1)

    def of_tokens(self, logits: Float[Tensor, "row answer"], prompts: Sequence[int]) -> Tensor:
        """The number for each row of a local metric, from the logits of just those tokens."""
        columns: dict[str, Ids] = {}
        at = 0
        for name, ids in self.ids.items():
            given = _tensor([ids[p] for p in prompts])
            sizes = [1] * len(prompts) if given.dim() == 1 else (given >= 0).sum(1).tolist()
            columns[name] = (
                (at,) * len(prompts) if given.dim() == 1 else tuple(tuple(range(at, at + size)) for size in sizes)
            )
            at += 1 if given.dim() == 1 else given.shape[1]
        return Bound(self.metric, columns)(logits, range(len(prompts)))

    @property
    def identity(self) -> dict[str, Any]:
        """Plain data that is equal for equal metrics."""
        data = {
            "name": self.metric.name,
            "position": self.metric.position,
            "ids": {k: [list(one) if isinstance(one, tuple) else one for one in v] for k, v in self.ids.items()},
        }
        return data if self._is_builtin else {**data, "source": function_digest(self.metric.rule)}

    @property
    def _is_builtin(self) -> bool:
        """Whether the rule is built in, so that its name identifies it."""
        return getattr(self.metric.rule, "__module__", "") == _BUILTIN_RULES


#: The module of the built-in rules.
_BUILTIN_RULES = "nnsplice.metrics.rules"


def _listed(one: int | tuple[int, ...]) -> tuple[int, ...]:
    return one if isinstance(one, tuple) else (one,)


def _tensor(ids: Sequence[int | tuple[int, ...]]) -> Tensor:
    """`[row]`, or `[row, answer]` where one of them is a set, filled up with -1."""
    if not any(isinstance(one, tuple) for one in ids):
        return torch.tensor(ids)
    most = max(len(_listed(one)) for one in ids)
    return torch.tensor([[*_listed(one), *[-1] * (most - len(_listed(one)))] for one in ids])


def _filled(ids: Tensor) -> Tensor:
    """`[row, answer]`, with -1 replaced by the first token of the row."""
    return ids[:, None] if ids.dim() == 1 else torch.where(ids < 0, ids[:, :1], ids)
