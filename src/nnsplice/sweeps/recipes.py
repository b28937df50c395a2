"""`ablate` and `causal_trace`: sweeps with a choice of operation, sites and metric made for the caller."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace as replaced
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nnsplice import engine
from nnsplice.activations.capture import capture
from nnsplice.activations.encoding import encode
from nnsplice.activations.prompts import Prompts, PromptsLike, SpanText
from nnsplice.activations.saved_activation import SavedActivation
from nnsplice.atlas import Atlas, native_text
from nnsplice.deprecated import renamed
from nnsplice.errors import BadArgument, BadType, ShapeError, circumstances
from nnsplice.metrics import Answer, Metrics, bound_of, probability, repeated_metric
from nnsplice.paths import Path, Slice, parse_path
from nnsplice.results import SweepResult
from nnsplice.sweeps.corruption import Corruption
from nnsplice.sweeps.options import RUNNING, check_options, known_of
from nnsplice.sweeps.plan import Plan
from nnsplice.sweeps.planning import plan_sweep
from nnsplice.sweeps.running import run_fresh
from nnsplice.sweeps.sets import Sites, all_paths

#: The sites that a causal trace restores, by its kind.
KINDS = {"residual": "layers[:].output", "mlp": "layers[:].mlp.output", "attn": "layers[:].attn.output"}


@renamed(with_="operation")
def ablate(
    model: Any,
    prompts: PromptsLike,
    sites: Sites,
    metric: Metrics,
    *,
    operation: str | Callable[[Tensor], Tensor] = "zero",
    reference: SavedActivation | None = None,
    together: bool = True,
    **options: Any,
) -> SweepResult:
    """Ablate each site and measure the metric.

    A site without a position is ablated at all tokens at once; a list of paths in the list is a set, whose sites are
    ablated together.

    >>> result = ns.ablate(model, "w3 w4 w5", "layers[:].heads[:]", ns.logit_diff("w7", "w8"), progress=False)
    >>> result.grid().sizes
    Frozen({'prompt': 1, 'layer': 3, 'head': 4})
    >>> pairs = [["layers[0].heads[1]", f"layers[1].heads[{head}]"] for head in range(4)]
    >>> result = ns.ablate(model, "w3 w4 w5", pairs, ns.logit_diff("w7", "w8"), progress=False)
    >>> result.grid().sizes
    Frozen({'prompt': 1, 'set': 4})

    Args:
        model: a model from `ns.load`, in eval mode.
        prompts: a text, a list of texts, token ids or chat messages.
        sites: a path or several; with `[:]` each token is a cell of its own.
        metric: `ns.logit_diff(answer, wrong)`, another metric, or a function `logits[row, vocab] -> [row]`; several in
            a list or a dictionary give the grid an axis `metric`.
        operation: the new value: `"zero"`, `"mean"`, `"resample"`, or a function `value[row, width] -> [row, width]`.
        reference: the capture that `"mean"` and `"resample"` take values from; if left out, each prompt's mean over its
            tokens, which `"mean"` averages and `"resample"` draws from.
        together: False makes each token of a site without a position a cell, as `[:]` does.
        **options: `window`, `spans`, `align` and `seed` of `ns.plan_sweep`; `executor`, `max_tokens`, `journal` and
            `progress` of `ns.run`.

    Returns:
        The metric with each site ablated; `result.corrupted` is the metric of the run without ablation.

    Raises:
        BadType: an option that does not exist.
        PathError: a site is no path, is out of range (`OutOfRange`) or has no exact value (`RefusedPlace`).
        UnknownPath: a site that this model does not have.
        BadArgument: options that do not fit together, or a model in train mode.
    """
    check_options("ns.ablate", options, known_of(ablate, plan_sweep, _SET_BY_ABLATE))
    running = {name: options.pop(name) for name in RUNNING if name in options}
    if operation in ("mean", "resample") and reference is None:
        everywhere = list(dict.fromkeys(path.place for path in all_paths(sites)))
        reference = _mean_over_tokens(engine.as_model(model, sharded=True), prompts, everywhere)
    plan = plan_sweep(
        model, prompts, None, sites, metric, operation=operation, reference=reference, together=together, **options
    )
    return run_fresh(plan, engine.as_model(model, sharded=True), **running)


_SET_BY_ABLATE = ("corruption", "source")


def _mean_over_tokens(model: engine.Model, prompts: Any, places: Sequence[Path]) -> SavedActivation:
    """A capture of the mean over tokens of each prompt's values at these sites, a row for each prompt."""
    given = encode(model, prompts, images=True)
    paths = [place.at(Slice()) for place in places]
    means = [capture(model, given.take(rows), paths).mean("position") for rows in given.batches(model)]
    return SavedActivation.from_pairs(*((key, torch.cat([mean[key] for mean in means])) for key in means[0]))


def causal_trace(
    model: Any,
    prompts: PromptsLike,
    subject: SpanText,
    *,
    kind: str = "residual",
    sites: Sites | None = None,
    window: int = 1,
    noise: float | Tensor = 3.0,
    samples: int = 10,
    replace: bool = False,
    answer: Answer | None = None,
    metric: Metrics | None = None,
    seed: int = 1,
    **options: Any,
) -> SweepResult:
    """Causal tracing (ROME): add noise to the subject's embeddings, restore one state at a time, measure the answer.

    The grid is the probability of the answer, or another metric, after restoring a state, averaged over the noised
    runs. `clean` is the metric without noise, `corrupted` with noise and nothing restored, and `total_effect` the
    difference of the two.

    >>> result = ns.causal_trace(model, "w3 w4 w5 w6", "w4 w5", samples=2, progress=False)
    >>> result.grid().sizes
    Frozen({'prompt': 1, 'layer': 3, 'position': 4})
    >>> result.by_role().grid().sizes     # averaged over token roles, for prompts of any length; .by_role().plot()
    Frozen({'prompt': 1, 'layer': 3, 'role': 3})

    Args:
        model: a model from `ns.load`, in eval mode.
        prompts: a text, a list of texts, token ids or chat messages.
        subject: the subject of each prompt: one text for all, a text for each, or (start, stop) in tokens.
        kind: which states are restored: `"residual"` (the stream after each layer), `"mlp"` or `"attn"` (outputs).
        sites: paths to restore instead, as for `ns.sweep`; `'layers[:].output["subject"][-1]'` runs that token alone.
        window: the number of neighbouring layers that are restored together.
        noise: the standard deviation of the noise, in units of the standard deviation of the subject's token
            embeddings; or the noise itself, `[sample, token, width]`. A prompt's noise does not depend on the other
            prompts.
        samples: the number of noised runs of each prompt; all cells share them.
        replace: replace the token embeddings by the noise instead of adding it; position embeddings stay.
        answer: the answer's token, for all prompts or for each; the most probable token of the clean run if left out.
        metric: the metric in place of the answer's probability, such as `ns.logit_diff(answer, wrong)`; several as for
            `ns.sweep`.
        seed: the seed of the noise.
        **options: `executor`, `max_tokens`, `journal` and `progress` of `ns.run`.

    Returns:
        The metric with each state restored, on the axes prompt, layer and position.

    Raises:
        BadType: an option that does not exist, or noise that is neither a number nor a tensor.
        BadArgument: a `kind`, `noise` or `samples` that is not valid, `kind` and `sites` together, `answer` and
            `metric` together, another number of answers than prompts, or a metric of several tokens.
        ShapeError: noise of another shape than the subject.
        SpanError: a subject that is not found in its prompt.
    """
    check_options("ns.causal_trace", options, known_of(causal_trace, causal_trace))
    model = engine.as_model(model, sharded=True)
    if kind not in KINDS:
        raise BadArgument(f"kind={kind!r}", expected=", ".join(map(repr, KINDS)))
    if sites is not None and kind != "residual":
        raise BadArgument(f"kind={kind!r} beside sites", expected="one of them, as sites say what is restored")
    if isinstance(noise, Tensor):
        if noise.dim() != 3:
            raise ShapeError(f"noise of shape {list(noise.shape)}", expected="[sample, token, width], or a number")
        samples = noise.shape[0]
    elif not isinstance(noise, Real):
        raise BadType(f"noise={noise!r}", expected="a number of standard deviations, or the noise itself as a tensor")
    elif not math.isfinite(noise):
        raise BadArgument(f"noise={noise!r}", expected="a number of standard deviations")
    if samples < 1:
        raise BadArgument(f"samples={samples}", expected="at least 1")
    with circumstances("ns.causal_trace"):
        given = encode(model, prompts, {"subject": subject}, images=True)
        if metric is None:
            metric = probability(_top_tokens(model, given) if answer is None else answer)
        elif answer is not None:
            raise BadArgument("answer= beside metric=", expected="one of them", write="metric=ns.probability(answer)")
        bound_of(metric, engine.tokenizer_of(model), len(given))  # mistakes, with the number of prompts
        repeated = [row for row in range(len(given)) for _ in range(samples)]
        corruption = _noise_corruption(model, given, noise, samples, replace, seed)
    restored = f"{_tower_prefix(model)}{KINDS[kind]}[:]" if sites is None else sites
    each = repeated_metric(metric, len(given), samples)
    plan = plan_sweep(model, given.take(repeated), None, restored, each, window=window, corruption=corruption)
    return _averaged(run_fresh(plan, model, **options), plan, samples)


def _tower_prefix(model: engine.Model) -> str:
    """The prefix of paths in the tower that reads the prompt: `encoder.` for models with two towers, else empty."""
    return "encoder." if "encoder" in Atlas.of(model).towers and engine.is_encoder_decoder(model) else ""


def _top_tokens(model: engine.Model, given: Prompts) -> list[int]:
    from nnsplice.activations.patched import patched_logits

    # A run with its own embeddings written back in is the run itself.
    saved = [capture(model, given.take([row]), "embed.output[-1]") for row in range(len(given))]
    return [
        int(patched_logits(model, given.take([row]), own, progress=False)[0, -1].argmax())
        for row, own in enumerate(saved)
    ]


def _noise_corruption(
    model: engine.Model, given: Prompts, noise: float | Tensor, samples: int, overwrites: bool, seed: int
) -> Corruption:
    assert given.spans is not None
    # Added noise may go to the stream after position embeddings; replaced token embeddings have to be before them.
    wanted = _embedding(model, given) if overwrites else f"{_tower_prefix(model)}embed.output"
    (place,) = engine.expand(model, wanted)
    bounds = given.spans["subject"]
    width = capture(model, given.take([0]), [place.at(0)]).get(place.at(0)).shape[-1]
    positions: list[tuple[int, ...]] = []
    values: list[Tensor] = []
    for row, (start, stop) in enumerate(bounds):
        drawn = _drawn(noise, samples, stop - start, width, f"{seed} {given.ids[row]} {start} {stop}")
        scale = 1.0 if isinstance(noise, Tensor) else noise * _embedding_std(model, given.take([row]))
        for sample in range(samples):
            positions.append(tuple(range(start, stop)))
            values.append(drawn[sample] * scale)
    return Corruption(place, tuple(positions), tuple(values), overwrites)


def _drawn(noise: float | Tensor, samples: int, tokens: int, width: int, seed: str) -> Tensor:
    if isinstance(noise, Tensor):
        if noise.dim() != 3 or tuple(noise.shape[1:]) != (tokens, width):
            raise ShapeError(
                f"noise of shape {list(noise.shape)} for a subject of {tokens} tokens and width {width}",
                expected=f"[sample, {tokens}, {width}]",
            )
        return noise
    # Seeded by the prompt's tokens, so that the noise does not depend on the other prompts.
    number = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:7], "big")
    generator = torch.Generator().manual_seed(number)
    return torch.randn(samples, tokens, width, generator=generator, dtype=torch.float64)


def _embedding_std(model: engine.Model, given: Prompts) -> float:
    """The standard deviation of the subject's token embeddings in one prompt."""
    place = _embedding(model, given)
    assert given.spans is not None
    ((start, stop),) = given.spans["subject"]
    saved = capture(model, given, f"{place}[{','.join(map(str, range(start, stop)))},]")
    return float(torch.cat([tensor.flatten() for _, tensor in saved.items()]).double().std())


def _embedding(model: engine.Model, given: Prompts) -> str:
    """The path of the token embedding's output; without such a module, of the stream that enters the layers.

    The stream also for prompts with images, whose features replace the embeddings of their tokens.
    """
    stream = f"{_tower_prefix(model)}embed.output"
    if given.images is not None:
        return stream
    embed = Atlas.of(model).tower(parse_path(stream)).embed
    return stream if embed is None else f"model.{native_text(embed)}.output"


def _averaged(result: SweepResult, plan: Plan, samples: int) -> SweepResult:
    """The mean over the noised samples of each prompt; in the plan each sample is a prompt."""
    table = result.table
    prompts = len(plan.corrupted) // samples

    def mean(values: np.ndarray) -> np.ndarray:
        return values.reshape(prompts, samples, *values.shape[1:]).mean(1)

    return SweepResult(
        replaced(
            table,
            values=mean(table.values),
            done=table.done.reshape(prompts, samples, -1).all(1),
            exists=table.exists[::samples],
            clean=mean(table.clean),
            corrupted=mean(table.corrupted),
            tokens=table.tokens[::samples],
            asked={**table.asked, "samples": samples},
        )
    )
