"""Metrics: from the logits of a run to one number for each row.

    logit_diff          the answer's logit less the wrong one's
    probability         of the answer
    log_probability     of the answer
    rank                how many tokens stand before the answer
    kl_divergence       of a reference distribution (in a sweep: the clean run's) from this one
    Metric              any of them, or one made of your own function `logits[row, vocab] -> [row]`

A metric is a value: it says which tokens it asks about, and at which position of the prompt it reads. Answers are token
texts or ids, one for all prompts or one for each. It can be called as it is on logits, inside a trace too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from nnsplice.digests import function_digest
from nnsplice.errors import BadArgument, BadType, ShortRow, named

#: One token for all prompts, or one for each: as text or as id.
Answer = str | int | Sequence[str | int]
#: `(logits, named token ids [row], reference)` -> `[row]`
Rule = Callable[..., Tensor]


@dataclass(frozen=True)
class Metric:
    """A number for each row of logits.

    >>> logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 1.0]])
    >>> ns.logit_diff(1, 0)(logits)
    tensor([ 2., -3.])
    >>> ns.Metric.of(lambda logits: logits.max(-1).values)(logits)
    tensor([2., 3.])
    """

    name: str
    rule: Rule = field(repr=False)
    #: What it asks about: the rule's argument -> the token or tokens.
    answers: Mapping[str, Answer] = field(default_factory=dict)
    #: The position of the prompt whose logits it reads.
    position: int = -1
    #: Whether it compares with the logits of another run.
    compares: bool = False
    #: Whether it reads the logits of its answers alone, so that no others need be computed.
    local: bool = False

    @classmethod
    def of(cls, metric: Metric | Callable[[Tensor], Tensor]) -> Metric:
        """A metric, or a metric made of a function `logits[row, vocab] -> [row]`."""
        if isinstance(metric, Metric):
            return metric
        if not callable(metric):
            raise BadType(
                f"{named(metric)} is no metric",
                expected="ns.logit_diff(answer, wrong) or another metric, or a function logits[row, vocab] -> [row]",
            )
        return cls(getattr(metric, "__name__", type(metric).__name__), metric)

    def at(self, position: int) -> Metric:
        """The same metric, read at another position of the prompt."""
        return replace(self, position=position)

    def check_lengths(self, lengths: Iterable[int]) -> None:
        """Raise for a prompt, by how many tokens it has, that has no such position.

        Raises:
            ShortRow: it would be read at another one.
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

    def bind(self, tokenizer: Any, prompts: int) -> Bound:
        """The metric with its answers as token ids, one for each prompt.

        Raises:
            BadArgument: a text that is not one token, or another number of answers than prompts.
        """
        ids = {name: _ids(self, name, answer, tokenizer, prompts) for name, answer in self.answers.items()}
        if len(ids) == 2 and len(set(ids.values())) == 1:
            raise BadArgument(
                f"{' and '.join(ids)} are the same, so {self.name} is 0 whatever the model says",
                expected="two different tokens",
            )
        return Bound(self, ids)


#: What a metric may be given as: a function is `logits[row, vocab] -> [row]`.
MetricLike = Metric | Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Bound:
    """A metric that knows its token ids."""

    metric: Metric
    ids: Mapping[str, tuple[int, ...]]

    def __call__(
        self, logits: Float[Tensor, "row vocab"], prompts: Sequence[int], reference: Tensor | None = None
    ) -> Tensor:
        """The number for each row, whose prompts are given by their numbers.

        A function of the user's own is given one row at a time, so that a row's number never depends on the others.

        Args:
            reference: for a metric that compares, the other run's logits of the same rows.
        """
        if self.metric.rule not in _OWN and len(logits) > 1:
            rows = ([number] for number in range(len(logits)))
            return torch.cat(
                [self(logits[r], [prompts[r[0]]], None if reference is None else reference[r]) for r in rows]
            )
        for name, ids in self.ids.items():
            wrong = next((i for i in ids if not 0 <= i < logits.shape[-1]), None)
            if wrong is not None:
                raise BadArgument(
                    f"{self.metric.name} was given {wrong} as {name}=",
                    expected=f"a token id from 0 to {logits.shape[-1] - 1}",
                )
        chosen = {
            name: torch.tensor([ids[prompt] for prompt in prompts], device=logits.device)
            for name, ids in self.ids.items()
        }
        if self.metric.compares:
            if reference is None:
                raise BadArgument(
                    f"{self.metric.name} compares two runs, and there is one", expected="reference= the other's logits"
                )
            chosen["reference"] = reference.to(logits)
        try:
            value = self.metric.rule(logits, **chosen)
        except Exception as error:
            if not self.metric.answers:  # a function of the user's own, whose error stays what it is
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

    def tokens(self, prompts: Sequence[int]) -> Tensor:
        """`[row, answer]`, the token ids that it asks about."""
        return torch.tensor([[ids[prompt] for ids in self.ids.values()] for prompt in prompts])

    def of_tokens(self, logits: Float[Tensor, "row answer"], prompts: Sequence[int]) -> Tensor:
        """The number for each row of a local metric, from the logits of just those tokens."""
        columns = {name: (column,) * len(prompts) for column, name in enumerate(self.ids)}
        return Bound(self.metric, columns)(logits, range(len(prompts)))

    @property
    def identity(self) -> dict[str, Any]:
        """What makes two metrics the same, as plain data."""
        told = {
            "name": self.metric.name,
            "position": self.metric.position,
            "ids": {k: list(v) for k, v in self.ids.items()},
        }
        return told if self.metric.rule in _OWN else {**told, "source": function_digest(self.metric.rule)}


def logit_diff(answer: Answer, wrong: Answer, *, position: int = -1) -> Metric:
    """The answer's logit less the wrong one's.

    >>> ns.logit_diff(" Paris", " Rome").name
    'logit_diff'
    """
    return Metric("logit_diff", _logit_diff, {"answer": answer, "wrong": wrong}, position, local=True)


def probability(answer: Answer, *, position: int = -1) -> Metric:
    """The probability of the answer.

    >>> ns.probability(1)(torch.tensor([[0.0, 0.0]]))
    tensor([0.5000])
    """
    return Metric("probability", _probability, {"answer": answer}, position)


def log_probability(answer: Answer, *, position: int = -1) -> Metric:
    """The logarithm of the answer's probability.

    >>> ns.log_probability(1)(torch.tensor([[0.0, 0.0]]))
    tensor([-0.6931])
    """
    return Metric("log_probability", _log_probability, {"answer": answer}, position)


def rank(answer: Answer, *, position: int = -1) -> Metric:
    """How many tokens have a higher logit than the answer: 0 is the top.

    >>> ns.rank(2)(torch.tensor([[5.0, 1.0, 3.0]]))
    tensor([1.])
    """
    return Metric("rank", _rank, {"answer": answer}, position)


def kl_divergence(*, position: int = -1) -> Metric:
    """How far the distribution has moved from that of a reference run: KL(reference, this); 0 is not at all.

    In a sweep the reference is the clean run.

    >>> logits = torch.tensor([[1.0, 2.0]])
    >>> ns.kl_divergence()(logits, reference=logits)
    tensor([0.])
    """
    return Metric("kl_divergence", _kl_divergence, {}, position, compares=True)


def _logit_diff(logits: Tensor, answer: Tensor, wrong: Tensor) -> Tensor:
    return _of(logits, answer) - _of(logits, wrong)


def _probability(logits: Tensor, answer: Tensor) -> Tensor:
    return _of(logits.softmax(-1), answer)


def _log_probability(logits: Tensor, answer: Tensor) -> Tensor:
    return _of(logits.log_softmax(-1), answer)


def _rank(logits: Tensor, answer: Tensor) -> Tensor:
    # Half precision cannot count to the size of a vocabulary.
    return (logits > _of(logits, answer)[:, None]).sum(-1).to(torch.promote_types(logits.dtype, torch.float32))


def _kl_divergence(logits: Tensor, reference: Tensor) -> Tensor:
    return divergence(reference, logits)


def divergence(reference: Tensor, logits: Tensor) -> Tensor:
    """KL(reference, logits) over the last axis, at least in single precision."""
    wide = torch.promote_types(torch.promote_types(reference.dtype, logits.dtype), torch.float32)
    there, here = reference.to(wide).log_softmax(-1), logits.to(wide).log_softmax(-1)
    return (there.exp() * (there - here)).sum(-1).clamp(min=0)


_OWN = (_logit_diff, _probability, _log_probability, _rank, _kl_divergence)


def _of(values: Tensor, token: Tensor) -> Tensor:
    return values.gather(-1, token[:, None])[:, 0]


def _ids(metric: Metric, name: str, answer: Answer, tokenizer: Any, prompts: int) -> tuple[int, ...]:
    if not isinstance(answer, str | int | Sequence):
        raise BadType(
            f"{metric.name} was given {answer!r} as {name}=", expected="a token's text or id, or one for each prompt"
        )
    each = [answer] * prompts if isinstance(answer, str | int) else list(answer)
    if len(each) != prompts:
        raise BadArgument(
            f"{metric.name} was given {len(each)} tokens as {name}=, and there are {prompts} prompts",
            expected="one token for all prompts, or one for each",
        )
    return tuple(_id(metric, name, token, tokenizer) for token in each)


def _id(metric: Metric, name: str, token: str | int, tokenizer: Any) -> int:
    if isinstance(token, int) and not isinstance(token, bool):
        return token
    if not isinstance(token, str):
        raise BadType(f"{metric.name} was given {token!r} as {name}=", expected="a token's text or id")
    if tokenizer is None:
        raise BadArgument(
            f"{metric.name} was given {token!r} as {name}=, and there is no tokenizer to read it",
            expected="a token id, or a model with a tokenizer",
        )
    ids = tokenizer(token, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        shown = ", ".join(repr(tokenizer.decode([i])) for i in ids) or "none"
        raise BadArgument(
            f"{token!r}, given to {metric.name} as {name}=, is {len(ids)} tokens: {shown}",
            expected="a text that is one token; in many vocabularies a word has its leading space",
            write=f"{name}={' ' + token.strip()!r}, or {name}={tokenizer.decode(ids[:1])!r}" if ids else None,
        )
    if ids[0] == tokenizer.unk_token_id:
        raise BadArgument(f"{token!r}, given to {metric.name} as {name}=, is not in this model's vocabulary")
    return ids[0]
