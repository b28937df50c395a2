"""Metrics: from the logits of a run to one number for each row.

    logit_diff                  the answer's logit less the wrong one's
    probability                 of the answer
    log_probability             of the answer
    sequence_log_probability    of an answer of several tokens
    rank                        the number of tokens with a higher logit than the answer
    accuracy                    whether the answer has the highest logit
    kl_divergence               of a reference distribution (in a sweep: the clean run's) from this one
    js_divergence               the same from both sides
    Metric                      any of them, or one made of your own function `logits[row, vocab] -> [row]`

A metric is a value, with its answer tokens and the position of the prompt that it reads. Answers are token
texts or ids, one for all prompts or one for each; a set of tokens counts as one. It can be called as it is on logits,
inside a trace too. A sweep takes one metric, or a list or dictionary of several.

answers     answers as token ids
metric      Metric, and Bound: a metric with the token ids of its answers
several     several metrics of one run
rules       the metrics of this package
"""

from nnsplice.metrics.answers import Answer, continuation
from nnsplice.metrics.metric import Bound, Metric, MetricLike, Rule
from nnsplice.metrics.rules import (
    accuracy,
    divergence,
    js_divergence,
    kl_divergence,
    log_probability,
    logit_diff,
    probability,
    rank,
    sequence_log_probability,
)
from nnsplice.metrics.several import Metrics, Several, bound_of, repeated_metric

__all__ = [
    "Answer",
    "Bound",
    "Metric",
    "MetricLike",
    "Metrics",
    "Rule",
    "Several",
    "accuracy",
    "bound_of",
    "continuation",
    "divergence",
    "js_divergence",
    "kl_divergence",
    "log_probability",
    "logit_diff",
    "probability",
    "rank",
    "repeated_metric",
    "sequence_log_probability",
]
