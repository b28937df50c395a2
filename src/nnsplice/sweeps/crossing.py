"""`crossings`: the effect of tuning at a site, split into its input and its weights.

The output of a site depends on its input and on its weights, and each of these may be the base model's or the tuned
model's. That gives four runs of the base model, each with one of the four outputs written at the site. The Shapley
value of the input (or the weights) is its mean effect in both orders; the two values sum to the effect of both.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nnsplice import engine
from nnsplice.activations.access import site_of
from nnsplice.activations.capture import capture
from nnsplice.activations.encoding import encode
from nnsplice.activations.patched import patched_logits
from nnsplice.activations.prompts import Prompts, PromptsLike
from nnsplice.activations.saved_activation import SavedActivation
from nnsplice.atlas import Selection, unwrap
from nnsplice.errors import BadArgument, RefusedPlace, circumstances
from nnsplice.metrics import Bound, Metric, MetricLike
from nnsplice.paths import Path, Paths, Slice
from nnsplice.progress import bar
from nnsplice.results import Run, SweepResult, Table
from nnsplice.sweeps import other_model
from nnsplice.sweeps.collecting import check_baselines
from nnsplice.sweeps.identity import model_record, prompts_record
from nnsplice.sweeps.operations import operation_of
from nnsplice.sweeps.running import check_mode
from nnsplice.sweeps.targets import Target, TargetPart, cell_of
from nnsplice.weights import select, swap
from nnsplice.weights.regions import counterpart, regions

#: The four runs: base input and weights, tuned input, tuned weights, both tuned; and the two Shapley values.
CONDITIONS = ("neither", "fed", "computed", "both")
SHARES = ("share fed", "share computed")


def crossings(
    base: Any,
    tuned: Any,
    prompts: PromptsLike,
    sites: Paths,
    metric: MetricLike,
    *,
    progress: bool = True,
) -> SweepResult:
    """Split the effect of fine-tuning on each site into its inputs and its own weights.

    The axis `metric` has the runs `neither` (the base model), `fed` (the site's weights are the base's, what comes in
    is the tuned model's), `computed` (the other way round) and `both` (what `ns.sweep(..., source=tuned)` patches); and
    the Shapley values `share fed` and `share computed`, which sum to `both` less `neither`.

    >>> import copy
    >>> tuned = ns.load(copy.deepcopy(ns.models.unwrap(model)), tokenizer=model.tokenizer)
    >>> with torch.no_grad():
    ...     _ = ns.models.unwrap(tuned).transformer.h[0].mlp.c_proj.weight.mul_(2.0)
    >>> metric = ns.logit_diff("w7", "w8")
    >>> split = ns.crossings(model, tuned, "w3 w4 w5", "layers[:].mlp", metric, progress=False)
    >>> shares = split.grid()[0].sel(metric=["share fed", "share computed"])
    >>> (shares != 0).values.tolist()     # the first MLP was changed itself, the others are fed by it
    [[False, True, True], [True, False, False]]

    Args:
        base: the model that runs.
        tuned: another model of the same shape and tokenizer.
        prompts: texts or token ids, the same for both.
        sites: `layers[i]`, `layers[i].attn` or `layers[i].mlp`, whose values are written at all tokens.
        metric: as for `ns.sweep`.
        progress: show a bar.

    Returns:
        The six numbers of every site; the clean run is the tuned model's, the corrupted run the base model's.

    Raises:
        BadArgument: models in train mode, with edits of nnsight, of different tokens, or the same model twice; or a
            metric that compares runs.
        RefusedPlace: a site whose output is not all that its weights make.
        ShapeError: a site that has different widths in the two models.
        ShortRow: a prompt has no token at the metric's position.
    """
    start = time.perf_counter()
    base, tuned = engine.as_model(base), engine.as_model(tuned)
    with circumstances("ns.crossings"):
        for model in (base, tuned):
            engine.refuse_edits(model)
            engine.refuse_changed_logits(model)
            check_mode(model)
        given = encode(base, prompts)
        given.require_tokens("a sweep is over")
        other_model.check(base, tuned, given, operation_of("patch"), pair=False, corrupts=False)
        bound = Metric.of(metric).bind(engine.tokenizer_of(base), len(given), given.texts)
        if bound.metric.compares:
            raise BadArgument("a metric that compares runs has no value of one run", expected="another metric")
        bound.metric.check_lengths(given.lengths("decoder"))
        places = [place for path in engine.listed(sites) for place in engine.expand(base, path)]
        for place in places:
            _check_site(base, place)
            counterpart(base, tuned, regions(base, _weights(base, place)))  # raises where the two do not fit
        targets = tuple(Target(cell_of(place), (TargetPart(cell_of(place), (place,), None),)) for place in places)
        other_model.check_places(base, tuned, given, targets)
        in_tuned = other_model.counterparts(tuned, targets)
    # Before any weight is swapped, as the digests are of the models' own weights.
    question = {
        **model_record(base), "source": model_record(tuned), "prompts": prompts_record(given), "metric": bound.identity,
        "sites": [target.cell.path for target in targets], "operation": "crossings",
    }  # fmt: skip
    values = np.zeros((len(given), len(places), len(CONDITIONS) + len(SHARES)))
    ends = np.zeros((2, len(given)))
    cells = len(places) * len(given)
    with bar("crossings", cells, "cell", progress) as shown, engine.locked(base), engine.locked(tuned):
        for rows in given.batches(base, tuned):
            some = given.take(rows)
            ends[0][rows], ends[1][rows] = (_metric(bound, one, some, rows) for one in (base, tuned))
            for number, place in enumerate(places):
                values[rows, number, :4] = np.stack(
                    [
                        ends[0][rows],
                        _metric(bound, base, some, rows, place, _output(tuned, base, in_tuned[place], some)),
                        _metric(bound, base, some, rows, place, _output(base, tuned, place, some)),
                        _metric(bound, base, some, rows, place, _output(tuned, None, in_tuned[place], some)),
                    ],
                    -1,
                )
                shown.update(len(rows))
    check_baselines(bound, base=ends[0], tuned=ends[1])
    neither, fed, computed, both = (values[..., n] for n in range(4))
    values[..., 4] = ((fed - neither) + (both - computed)) / 2
    values[..., 5] = ((computed - neither) + (both - fed)) / 2
    clean = np.stack([ends[1]] * 4 + [ends[1] - ends[0]] * 2, -1)
    corrupted = np.stack([ends[0]] * 4 + [np.zeros(len(given))] * 2, -1)
    there = np.ones(values.shape[:2], dtype=bool)
    about = Run("crossings", time.perf_counter() - start, forwards=(2 + 5 * len(places)) * len(given))
    cells = tuple(target.cell for target in targets)
    return SweepResult(
        Table(cells, values, there, there, clean, corrupted, engine.token_texts(base, given.ids), question, about,
              metrics=(*CONDITIONS, *SHARES))
    )  # fmt: skip


def _check_site(model: engine.Model, place: Path) -> None:
    """Raise for a site with parameters in its module that are not among the site's weights, such as a norm."""
    names = [step.name for step in place.steps]
    if place.native or place.position is not None or names not in (["layers"], ["layers", "attn"], ["layers", "mlp"]):
        raise RefusedPlace(
            "a site is fed and computes where it is a part of the model with weights of its own",
            path=place,
            expected="layers[i], layers[i].attn or layers[i].mlp, without positions",
        )
    own = set(_weights(model, place))
    made = [name for name, _ in unwrap(model).get_submodule(site_of(place).module).named_parameters()]
    left = [name for name in made if f"{site_of(place).module}.{name}" not in own]
    if left:
        raise RefusedPlace(
            f"{site_of(place).module}.{left[0]} stands behind this site and is none of its weights",
            path=place,
            expected="a site that ends where its weights do",
            write="layers[i]   (the layer with its norms)",
        )


def _weights(model: engine.Model, place: Path) -> Selection:
    return select(model, str(place.place).removesuffix(".output"))


def _output(model: engine.Model, other: engine.Model | None, place: Path, prompts: Prompts) -> Tensor:
    """The output `[prompt, token, width]` of a site in a model's run, with its own or another model's weights."""
    block = nullcontext() if other is None else swap(model, unwrap(other), _weights(model, place))
    with block:
        return capture(model, prompts, place.at(Slice())).get(place.at(Slice()))


def _metric(
    bound: Bound,
    model: engine.Model,
    prompts: Prompts,
    rows: Sequence[int],
    place: Path | None = None,
    output: Tensor | None = None,
) -> np.ndarray:
    """The metric `[prompt]`, with an output written at a site if it is given."""
    if place is None or output is None:  # a run with its own embeddings written into it is the run itself
        saved = capture(model, prompts, "embed[-1]")
    else:
        saved = SavedActivation.from_pairs(*((str(place.at(n)), output[:, n]) for n in range(output.shape[1])))
    logits: Tensor = patched_logits(model, prompts, saved, positions=bound.metric.position, progress=False)
    with torch.no_grad():
        return bound(logits, rows).double().cpu().numpy()
