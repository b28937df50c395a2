"""`logit`: the logit lens, residual states through the final norm and unembedding."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nnsplice import engine
from nnsplice.activations.access import site_of
from nnsplice.activations.capture import capture
from nnsplice.activations.prompts import Prompts, PromptsLike, SpanTexts
from nnsplice.atlas import Tower
from nnsplice.attribution.gradients import batches
from nnsplice.errors import BadArgument, RefusedPlace, circumstances
from nnsplice.lens.fitted import FittedLens
from nnsplice.lens.lens import TOP, Lens
from nnsplice.lens.runs import decoder_of, last_of, lens_run, prompts_of, texts_of
from nnsplice.lens.tail import Tail
from nnsplice.metrics import Answer, Metric, Several, bound_of, log_probability, probability, rank
from nnsplice.paths import Path, Slice
from nnsplice.progress import bar
from nnsplice.results import Run, SweepResult, Table
from nnsplice.sweeps.expansion import targets_of
from nnsplice.sweeps.identity import model_record, prompts_record
from nnsplice.sweeps.running import check_mode
from nnsplice.sweeps.sets import Sites
from nnsplice.sweeps.targets import Target, has_tokens, own_tokens


def logit(
    model: Any,
    prompts: PromptsLike,
    sites: Sites = "layers[:].output",
    answers: Answer | None = None,
    k: int = 5,
    *,
    lens: FittedLens | None = None,
    spans: SpanTexts | None = None,
    max_tokens: int | None = None,
    progress: bool = True,
) -> Lens:
    """The logit lens: decode states of the residual stream with the model's own final norm and unembedding.

    At the last layer the logits are the model's own. This is checked on the prompts, and a model is refused where it
    does not hold.

    >>> lens = ns.lens.logit(model, ["w3 w4 w5", "w6 w7"], "layers[:].output[-1]", answers=["w7", "w8"])
    >>> lens.grid().sizes
    Frozen({'prompt': 2, 'layer': 3, 'position': 1})
    >>> lens.only("rank").grid().dtype, lens.tokens().columns.tolist()[-4:]
    (dtype('float64'), ['token', 'id', 'probability', 'path'])

    Args:
        model: a model from `ns.load`, in eval mode.
        prompts: a text, a list of texts, token ids or chat messages.
        sites: sites of the stream: `layers[i].output`, `.input`, `.mid`, `embed`; without positions, every position is
            a cell of its own.
        answers: a token for all prompts or for each, whose probability and rank are measured in every cell; a set of
            tokens counts as one.
        k: how many top tokens are kept for each cell.
        lens: a fitted lens, whose map is applied to the states first.
        spans: token spans by name, as for `ns.capture`.
        max_tokens: how many tokens run at once.
        progress: show a bar.

    Returns:
        The probabilities and the top tokens of every cell.

    Raises:
        BadArgument: a model in train mode or with edits of nnsight, a set of sites, a span of several tokens, or a
            fitted lens of another model or other layers.
        RefusedPlace: a site that is not a state of the stream, or a model whose final norm and head do not reproduce
            its logits from the last layer's output.
    """
    start = time.perf_counter()
    model = engine.as_model(model)
    with circumstances("ns.lens.logit"):
        engine.refuse_edits(model)
        engine.refuse_changed_logits(model)
        check_mode(model)
        given = prompts_of(model, prompts, spans, images=True)
        tower = decoder_of(model)
        targets = targets_of(model, sites, given, 1, False)
        for target in targets:
            check_state(target, tower)
        places = list(dict.fromkeys(target.places[0] for target in targets))
        if lens is not None:
            lens.check(model, places)
        metric = _metric(answers, engine.tokenizer_of(model), given)
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise BadArgument(f"k={k!r}", expected="how many tokens to keep of each cell, at least 1")
    shape = (len(given), len(targets))
    found = np.full((*shape, len(metric.names)), np.nan)
    ends = np.zeros((len(given), len(metric.names)))
    there = np.array([[exists(target, given, row) for target in targets] for row in range(len(given))])
    ids, shares = np.full((*shape, k), -1), np.full((*shape, k), np.nan)
    tail: Tail | None = None
    with circumstances("ns.lens.logit"), bar("lens", len(given), "prompt", progress) as shown:
        for rows in batches(model, given, range(len(given)), engine.tokens_at_once(model, max_tokens)):
            run = lens_run(model, given, rows, [last_of(tower)])
            if tail is None:
                tail = Tail.of(model, run)
                k = min(k, tail.head.vocabulary)
            else:
                tail.check(run)
            ends[rows] = metric(run.logits[:, -1], rows).double().cpu().numpy()
            saved = capture(model, given.take(rows), [place.at(Slice()) for place in places])
            for place in places:
                jobs = [
                    (number, row, own_tokens(target.parts[0].position, given, rows[row], run.logits.shape[1])[0])
                    for number, target in enumerate(targets)
                    if target.places[0] == place
                    for row in range(len(rows))
                    if there[rows[row], number]
                ]
                if not jobs:
                    continue
                cells, at, tokens = torch.tensor(jobs).T
                states = saved.get(place.at(Slice()))[at, tokens].to(run.logits.device)
                each = np.array(rows)[at.numpy()]
                translate = None if lens is None else partial(lens.translate, model, place)
                for some, logits in tail.each(states, translate):
                    which = each[some], cells.numpy()[some]
                    found[which] = metric(logits, each[some].tolist()).double().cpu().numpy()
                    top = logits.double().softmax(-1).topk(k)
                    ids[(*which, slice(k))] = top.indices.cpu().numpy()
                    shares[(*which, slice(k))] = top.values.cpu().numpy()
            shown.update(len(rows))
    about = Run("lens", time.perf_counter() - start, forwards=2 * len(given))
    question = {
        **model_record(model), "prompts": prompts_record(given),
        "sites": [target.cell.path for target in targets], "metric": metric.identity,
        "operation": "logit lens" if lens is None else f"{lens.identity['kind']} lens",
        "lens": None if lens is None else lens.identity,
    }  # fmt: skip
    table = Table(
        tuple(target.cell for target in targets), found, there, there, ends, np.zeros_like(ends),
        engine.token_texts(model, given.ids), question, about, metrics=metric.names,
    )  # fmt: skip
    texts = texts_of(model, np.unique(ids[ids >= 0]).tolist())
    return Lens(SweepResult(table), ids[..., :k], shares[..., :k], texts)


def _metric(answers: Answer | None, tokenizer: Any, given: Prompts) -> Several:
    if answers is None:
        several: dict[str, Metric] = {TOP: Metric(TOP, _largest)}
    else:
        several = {
            "probability": probability(answers), "log_probability": log_probability(answers), "rank": rank(answers)
        }  # fmt: skip
    bound = bound_of(several, tokenizer, len(given), given.texts)
    assert isinstance(bound, Several)
    return bound


def _largest(logits: Tensor) -> Tensor:
    return logits.softmax(-1).amax(-1)


# --- which sites -----------------------------------------------------------------------------------------------------


def check_state(target: Target, tower: Tower) -> None:
    """Raise for a cell that is not one state of the stream at one token."""
    path = target.places[0]
    if target.is_set:
        raise BadArgument(
            "a set of sites has no one state that could be read", path=target.cell.path, expected="single sites"
        )
    if not is_stream(path, tower):
        raise RefusedPlace(
            "this site is no state of the stream, which is what the model's head reads",
            path=path,
            expected="layers[i].output, layers[i].input, layers[i].mid or embed",
            write="ns.lens.direct(model, prompts, metric, sites)   (what a branch adds to the metric)",
        )
    if getattr(target.parts[0].position, "token", 0) is None:
        raise BadArgument(
            "a span of several tokens has a state for each",
            path=target.cell.path,
            write=f"{target.cell.path}[-1]   (its last token)",
        )


def is_stream(path: Path, tower: Tower) -> bool:
    """Whether a site is the stream: before, within or after a layer."""
    site = site_of(path)
    if site.columns is not None or site.index is not None:
        return False
    for block in tower.blocks:
        if site.occurrence == block.occurrence and site.item in (None, 0):
            if site.module == block.module or (site.module == block.end and site.end == "output"):
                return True
            if block.mid == (site.module, site.end) and site.kind == block.mid_kind:
                return True
    return False


def exists(target: Target, given: Prompts, row: int) -> bool:
    """Whether a prompt is long enough to have the cell."""
    return has_tokens(target.parts[0].position, given.lengths("decoder")[row])
