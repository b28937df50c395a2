"""The metrics of this package, and their rules.

An answer may be a set of tokens, `{" Paris", " paris"}`, which counts as one token with their summed probability.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nnsplice.metrics.answers import Answer, TokenSequence
from nnsplice.metrics.metric import Metric


def logit_diff(answer: Answer, wrong: Answer, *, position: int = -1) -> Metric:
    """The difference between the answer's logit and the wrong answer's.

    A set of tokens (`{" Paris", " paris"}`) counts as one token with their summed probability.

    >>> ns.logit_diff(" Paris", " Rome").name
    'logit_diff'
    >>> ns.logit_diff({0, 1}, 2)(torch.tensor([[0.0, 0.0, 0.0]]))
    tensor([0.6931])

    Args:
        answer: the right token, as text or id; a set of them; or one for each prompt, in a list,
            which for a single prompt is a set.
        wrong: the wrong token, in the same forms.
        position: the position of the prompt whose logits are read.

    Returns:
        The metric, for sweeps, or to be called with logits `[row, vocab]`.
    """
    return Metric("logit_diff", _logit_diff, {"answer": answer, "wrong": wrong}, position, local=True)


def probability(answer: Answer, *, position: int = -1) -> Metric:
    """The probability of the answer.

    >>> ns.probability(1)(torch.tensor([[0.0, 0.0]]))
    tensor([0.5000])

    Args:
        answer: a token, as text or id; a set of tokens, whose probabilities are added; or one for each prompt, in a
            list, which for a single prompt is a set.
        position: the position of the prompt whose logits are read.

    Returns:
        The metric, for sweeps, or to be called with logits `[row, vocab]`.
    """
    return Metric("probability", _probability, {"answer": answer}, position)


def log_probability(answer: Answer, *, position: int = -1) -> Metric:
    """The natural logarithm of the answer's probability.

    >>> ns.log_probability(1)(torch.tensor([[0.0, 0.0]]))
    tensor([-0.6931])

    Args:
        answer: a token, as text or id; a set of tokens, whose probabilities are added; or one for each prompt, in a
            list, which for a single prompt is a set.
        position: the position of the prompt whose logits are read.

    Returns:
        The metric, for sweeps, or to be called with logits `[row, vocab]`.
    """
    return Metric("log_probability", _log_probability, {"answer": answer}, position)


def rank(answer: Answer, *, position: int = -1) -> Metric:
    """The rank of the answer among all logits: the number of tokens with a higher one, so 0 is the top.

    >>> ns.rank(2)(torch.tensor([[5.0, 1.0, 3.0]]))
    tensor([1.])

    Args:
        answer: a token, as text or id; a set of tokens, of which the best counts; or one for each prompt, in a
            list, which for a single prompt is a set.
        position: the position of the prompt whose logits are read.

    Returns:
        The metric, for sweeps, or to be called with logits `[row, vocab]`.
    """
    return Metric("rank", _rank, {"answer": answer}, position)


def kl_divergence(*, position: int = -1) -> Metric:
    """The KL divergence KL(reference || run) between the next-token distributions of two runs.

    In a sweep the reference is the clean run.

    >>> logits = torch.tensor([[1.0, 2.0]])
    >>> ns.kl_divergence()(logits, reference=logits)
    tensor([0.])

    Args:
        position: the position of the prompt whose logits are read.

    Returns:
        The metric, for sweeps, or to be called with logits `[row, vocab]` and `reference=`.
    """
    return Metric("kl_divergence", _kl_divergence, {}, position, compares=True)


def accuracy(answer: Answer, *, position: int = -1) -> Metric:
    """1 where the answer has the highest logit, else 0.

    >>> ns.accuracy(1)(torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 1.0]]))
    tensor([1., 0.])

    Args:
        answer: a token, as text or id; a set of tokens, of which any counts; or one for each prompt, in a
            list, which for a single prompt is a set.
        position: the position of the prompt whose logits are read.

    Returns:
        The metric, for sweeps, or to be called with logits `[row, vocab]`.
    """
    return Metric("accuracy", _accuracy, {"answer": answer}, position)


def js_divergence(*, position: int = -1) -> Metric:
    """The Jensen-Shannon divergence between the next-token distributions of two runs, at most log 2.

    The mean KL divergence of both runs from their average distribution. In a sweep the reference is the clean run.

    >>> logits = torch.tensor([[1.0, 2.0]])
    >>> ns.js_divergence()(logits, reference=logits)
    tensor([0.])

    Args:
        position: the position of the prompt whose logits are read.

    Returns:
        The metric, for sweeps, or to be called with logits `[row, vocab]` and `reference=`.
    """
    return Metric("js_divergence", _js_divergence, {}, position, compares=True)


def sequence_log_probability(answer: TokenSequence) -> Metric:
    """The log probability of an answer of several tokens, each conditioned on the ones before.

    A sweep appends the answer's tokens to the clean and the corrupted prompts; positions count the prompt's own tokens.
    An ablation of all tokens includes the answer's. It needs a causal decoder, and costs one sweep for each token of
    the answer.

    >>> metric = ns.sequence_log_probability("w7 w8")
    >>> result = ns.sweep(model, "w3 w4 w5", "w3 w6 w5", "layers[:].output[:]", metric, progress=False)
    >>> result.grid().sizes
    Frozen({'prompt': 1, 'layer': 3, 'position': 3})

    Args:
        answer: the text that follows the prompt, with its leading space, or its token ids; or one for each prompt, in a
            list, which for a single prompt is a set.

    Returns:
        The metric, for sweeps and ablations.
    """
    return Metric("sequence_log_probability", _log_probability, {"answer": answer}, sequence=True)


# --- rules ------------------------------------------------------------------------------------------------------------


def _logit_diff(logits: Tensor, answer: Tensor, wrong: Tensor) -> Tensor:
    return _of(logits, answer) - _of(logits, wrong)


def _probability(logits: Tensor, answer: Tensor) -> Tensor:
    if answer.dim() == 1:
        return _of(logits.softmax(-1), answer)
    return _of(logits.log_softmax(-1), answer).exp()


def _log_probability(logits: Tensor, answer: Tensor) -> Tensor:
    return _of(logits.log_softmax(-1), answer)


def _rank(logits: Tensor, answer: Tensor) -> Tensor:
    best = _of(logits, answer) if answer.dim() == 1 else _each(logits, answer).amax(-1)
    # Half precision cannot count to the size of a vocabulary.
    return (logits > best[:, None]).sum(-1).to(torch.promote_types(logits.dtype, torch.float32))


def _accuracy(logits: Tensor, answer: Tensor) -> Tensor:
    right = logits.argmax(-1)[:, None] == (answer[:, None] if answer.dim() == 1 else answer)
    return right.any(-1).to(torch.promote_types(logits.dtype, torch.float32))


def _kl_divergence(logits: Tensor, reference: Tensor) -> Tensor:
    return divergence(reference, logits)


def _js_divergence(logits: Tensor, reference: Tensor) -> Tensor:
    wide = torch.promote_types(torch.promote_types(reference.dtype, logits.dtype), torch.float32)
    both = torch.stack([reference.to(wide).log_softmax(-1), logits.to(wide).log_softmax(-1)])
    middle = both.logsumexp(0) - torch.tensor(2.0, dtype=wide).log()
    return (both.exp() * (both - middle)).sum(-1).mean(0).clamp(min=0)


def divergence(reference: Tensor, logits: Tensor) -> Tensor:
    """KL(reference, logits) over the last axis, at least in single precision."""
    wide = torch.promote_types(torch.promote_types(reference.dtype, logits.dtype), torch.float32)
    there, here = reference.to(wide).log_softmax(-1), logits.to(wide).log_softmax(-1)
    return (there.exp() * (there - here)).sum(-1).clamp(min=0)


def _of(values: Tensor, token: Tensor) -> Tensor:
    """The value of each row's token; of a set, the logarithm of the sum of their exponentials."""
    return values.gather(-1, token[:, None])[:, 0] if token.dim() == 1 else _each(values, token).logsumexp(-1)


def _each(values: Tensor, tokens: Tensor) -> Tensor:
    """`[row, answer]`, minus infinity where a row has fewer."""
    found = values.gather(-1, tokens.clamp(min=0))
    return found.masked_fill(tokens < 0, float("-inf"))
