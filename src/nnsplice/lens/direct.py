"""`direct`: direct logit attribution, the metric as a sum over heads, MLPs and embeddings.

With the size of the final norm kept constant, the metric is linear in the last state of the stream, which is a sum over
branches. So the metric is a sum too. Every term is computed, also those that were not requested, and a model is refused
whose terms do not add up to the metric of the run.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from nnsplice import engine
from nnsplice.activations.encoding import encode
from nnsplice.activations.prompts import Prompts, PromptsLike, SpanTexts
from nnsplice.attribution.branches import branches_of
from nnsplice.attribution.gradients import batches
from nnsplice.errors import BadArgument, circumstances
from nnsplice.lens.decomposition import Decomposition
from nnsplice.lens.runs import decoder_of
from nnsplice.lens.terms import check_positions, terms_of
from nnsplice.metrics import Answer, Bound, Metric, bound_of
from nnsplice.paths import Paths
from nnsplice.progress import bar
from nnsplice.results import Run, SweepResult, Table
from nnsplice.sweeps.identity import model_record, prompts_record
from nnsplice.sweeps.running import check_mode
from nnsplice.sweeps.targets import cell_of

#: The default sites.
ALL = ("embed", "layers[:].heads[:]", "layers[:].mlp")


def direct(
    model: Any,
    prompts: PromptsLike,
    metric: Metric | Callable[[Tensor], Tensor] | Answer,
    sites: Paths = ALL,
    *,
    spans: SpanTexts | None = None,
    max_tokens: int | None = None,
    progress: bool = True,
) -> SweepResult:
    """Direct logit attribution: what each site adds to the metric, with the size of the final norm kept constant.

    The cells of a prompt and `result.rest` (biases and sites that were not requested) add up to the metric, before a
    final softcap. This is checked in every call, and a model is refused where it does not hold.

    >>> metric = ns.logit_diff("w7", "w8")
    >>> parts = ns.lens.direct(model, "w3 w4 w5", metric, ["embed", "layers[:].heads[:]", "layers[:].mlp"])
    >>> whole = parts.table.values.sum() + parts.rest.sum()
    >>> bool(abs(whole - parts.clean[0]) < 1e-5)
    True
    >>> parts.grid("layers[:].heads[:].output").sizes
    Frozen({'prompt': 1, 'layer': 3, 'head': 4})

    Args:
        model: a model from `ns.load`, in eval mode.
        prompts: a text, a list of texts, token ids or chat messages.
        metric: a weighted sum of logits, such as `ns.logit_diff(answer, wrong)`; or a token for all prompts or for
            each, whose logit is meant.
        sites: `embed`, `layers[i].heads[j]` or `layers[i].attn`, `layers[i].mlp` or its neurons or experts, without
            positions: they are read where the metric reads.
        spans: as for `ns.capture`.
        max_tokens: how many tokens run at once.
        progress: show a bar.

    Returns:
        A cell for each site, in units of the metric; `result.rest` has the remainder of each prompt.

    Raises:
        BadArgument: a model in train mode or with edits of nnsight, several metrics or one that compares runs, an
            answer of several tokens, no sites, a branch together with its parts, or a position other than the metric's.
        RefusedPlace: a metric that is not linear in the logits, a site that adds nothing to the stream, or a model
            whose metric is not the sum of its terms.
        ShortRow: a prompt has no token at the metric's position.
    """
    start = time.perf_counter()
    model = engine.as_model(model)
    with circumstances("ns.lens.direct"):
        engine.refuse_edits(model)
        engine.refuse_changed_logits(model)
        check_mode(model)
        decoder_of(model)
        given = encode(model, prompts, spans)
        given.require_tokens("a metric reads")
        bound = _bound(metric, engine.tokenizer_of(model), given)
        bound.metric.check_lengths(given.lengths("decoder"))
        check_positions(sites, bound.metric.position)
        branches = branches_of(model)
        terms = terms_of(model, branches, sites)
        values, rest = np.zeros((len(given), len(terms.places))), np.zeros(len(given))
        whole = np.zeros(len(given))
        with bar("direct", len(given), "prompt", progress) as shown:
            for rows in batches(model, given, range(len(given)), engine.tokens_at_once(model, max_tokens)):
                sums = Decomposition.of(model, given, rows, bound, branches, terms)
                values[rows], rest[rows], whole[rows] = sums.parts()
                shown.update(len(rows))
    question = {
        **model_record(model), "prompts": prompts_record(given),
        "sites": [str(place) for place in terms.places], "metric": bound.identity, "operation": "direct",
    }  # fmt: skip
    reads = bound.metric.position
    cells = tuple(replace(cell_of(place.at(reads)), position=None) for place in terms.places)
    there = np.ones(values.shape, dtype=bool)
    about = Run("direct", time.perf_counter() - start, forwards=len(given))
    texts = engine.token_texts(model, given.ids)
    return SweepResult(
        Table(cells, values, there, there, whole, np.zeros_like(whole), texts, question, about, rest=rest)
    )


def _bound(metric: Any, tokenizer: Any, given: Prompts) -> Bound:
    one: Any = metric
    if not isinstance(metric, Metric) and not callable(metric):
        one = Metric("logit", _logit, {"answer": metric}, local=True)
    bound = bound_of(one, tokenizer, len(given), given.texts)
    if not isinstance(bound, Bound) or bound.metric.compares:
        raise BadArgument("one metric of one run is split into parts", expected="one metric, such as ns.logit_diff")
    return bound


def _logit(logits: Tensor, answer: Tensor) -> Tensor:
    if answer.dim() > 1:
        raise BadArgument("a set of tokens has no one logit", expected="a single token for each prompt")
    return logits.gather(-1, answer[:, None])[:, 0]
