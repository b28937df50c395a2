"""`ns.steering.sweep`: layers times coefficients, many cells in one pass or in one generation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from nnsplice import engine
from nnsplice.activations import SavedActivation
from nnsplice.activations.prompts import Prompts, PromptsLike, encode
from nnsplice.atlas import peel
from nnsplice.digests import digest_of, function_digest
from nnsplice.errors import BadArgument, NeverFired, ShapeError, circumstances
from nnsplice.metrics import Metric, MetricLike, divergence
from nnsplice.progress import bar
from nnsplice.results import Journal
from nnsplice.steering.operators import Operator
from nnsplice.steering.padding import padding_of
from nnsplice.steering.result import SteeringSweep
from nnsplice.steering.rules import Rule, rules_of
from nnsplice.steering.session import Session
from nnsplice.steering.sites import layer_of
from nnsplice.steering.where import Where, read

#: Indices of (prompt, layer, coefficient).
Job = tuple[int, int, int]


@dataclass(frozen=True)
class SteeringPlan:
    """What all cells share.

    Attributes:
        model: the model.
        prompts: the prompts.
        rules: a rule for each layer, with coefficient 1.
        coefficients: the coefficients.
        measure: the metric, the KL and the generated text of each job.
        metric: the metric.
        new_tokens: the number of tokens to generate.
        generate: other arguments of `generate`.
        guard: whether the KL is measured.
    """

    model: engine.Model
    prompts: Prompts
    rules: tuple[Rule, ...]
    coefficients: tuple[float, ...]
    measure: Callable[[SteeringPlan, Sequence[Job], Session], list[tuple[float, float, str]]]
    metric: Any
    new_tokens: int = 0
    generate: Mapping[str, Any] | None = None
    guard: bool = True


def sweep(
    model: Any,
    prompts: PromptsLike,
    vector: SavedActivation,
    coefficients: Sequence[float],
    metric: MetricLike | Callable[[str], float],
    *,
    operator: str | Operator = "add",
    where: str | Where = "all",
    max_new_tokens: int | None = None,
    guard: bool = True,
    max_tokens: int | None = None,
    journal: str | PathLike[str] | None = None,
    progress: bool = True,
    **generate_kwargs: Any,
) -> SteeringSweep:
    """Steer one layer at a time with every coefficient, and measure the effect and the side effect.

    Cells are batched, and each has the value of a run of its own. The side effect (`kl`) is the KL divergence between
    the unsteered and the steered next-token distributions: at the metric's position, or averaged over the tokens of a
    generation.

    >>> toy = ns.load("toy")
    >>> reviews = [review for review in ns.models.toy_prompts().reviews if review.mood == "good"][:20]
    >>> good, bad = [review.text for review in reviews], [review.opposite for review in reviews]
    >>> vector = ns.steering.fit_from_prompts(toy, good, bad, "layers[1:4].output[-1]")
    >>> grid = ns.steering.sweep(toy, bad[:4], vector, [0.5, 1.0], ns.logit_diff("great", "awful"), progress=False)
    >>> grid.frame().groupby(["layer", "coefficient"])[["change", "kl"]].mean().round(1)
                       change   kl
    layer coefficient
    1     0.5             9.2  1.9
          1.0            13.9  5.9
    2     0.5            10.1  2.5
          1.0            13.9  5.8
    3     0.5            10.0  2.2
          1.0            14.1  5.9

    Args:
        model: a model from `ns.load`, in eval mode.
        prompts: the prompts to measure on: a text, a list of texts, token ids or chat messages.
        vector: a direction for one site of each layer.
        coefficients: the factors of the vector.
        metric: a metric of logits, such as `ns.logit_diff(" good", " bad")`; with `max_new_tokens` a function
            `text -> number` of the generated text.
        operator: as for `ns.steering.steer`.
        where: as for `ns.steering.steer`.
        max_new_tokens: generate this many tokens in every cell, greedily, and keep the texts.
        guard: measure the KL divergence; with `max_new_tokens` it costs a pass of the unsteered model over all texts.
        max_tokens: how many tokens run at once; chosen for the device if left out.
        journal: a file that finished cells are appended to; the same call resumes from it after an interruption.
        progress: show a progress bar.
        **generate_kwargs: arguments of transformers' `generate`, with `max_new_tokens`.

    Returns:
        Metric and KL divergence of each layer, coefficient and prompt, with `.frame()` and `.plot()`.

    Raises:
        BadArgument: a model in train mode, two sites in one layer, or options that do not fit together.
        FileError: the journal is of another sweep, or damaged.
    """
    model = engine.as_model(model)
    with circumstances("ns.steering.sweep"):
        if engine.in_training(model):
            raise BadArgument("the model is in train mode, so every run would be another one", write="model.eval()")
        engine.refuse_edits(model)
        engine.refuse_changed_logits(model, bare=True)
        given = encode(model, prompts)
        chosen, asked_numbers = read(where), _numbers(coefficients)
        _check(given, chosen, max_new_tokens, generate_kwargs, metric)
        if not guard and max_new_tokens is None:
            raise BadArgument("the guard of logits costs nothing", expected="guard=False with max_new_tokens")
        rules = rules_of(model, vector, 1.0, operator, chosen, None, None)
        layers = _layers(rules)
    tokenizer = engine.tokenizer_of(model)
    if max_new_tokens is None:
        bound = Metric.of(cast("MetricLike", metric)).bind(
            tokenizer, len(given), given.texts if given.decoder_ids is None else None
        )
        bound.metric.check_lengths(given.lengths("decoder"))
        plan = SteeringPlan(model, given, rules, asked_numbers, _LogitsMeasure(model, given, bound), bound)
        identity: Any = bound.identity
        name = bound.metric.name
    else:
        options = {"do_sample": False, **generate_kwargs}
        plan = SteeringPlan(model, given, rules, asked_numbers, _generated, metric, max_new_tokens, options, guard)
        name = getattr(metric, "__name__", type(metric).__name__)
        identity = {"name": name, "source": function_digest(metric)}
    asked = _asked(model, given, rules, asked_numbers, identity, chosen, anew=journal is not None)
    if max_new_tokens is not None:
        plain = {key: v if isinstance(v, str | int | float) else function_digest(v) for key, v in options.items()}
        asked["generate"] = {"max_new_tokens": max_new_tokens, "guard": guard, **plain}
    (values, kl), texts = _run(plan, asked, engine.room(model, max_tokens), journal, progress)
    shown = {"model": asked["model"], "operator": rules[0].name, "where": str(chosen)}
    generated = tuple(tuple(tuple(row[:-1]) for row in rows) for rows in texts) if max_new_tokens else ()
    return SteeringSweep(
        tuple(str(rule.path.place) for rule in rules), layers, asked_numbers, values[..., :-1], kl[..., :-1],
        values[:, 0, -1], given.texts or (), name, shown, generated,
    )  # fmt: skip


def _run(
    plan: SteeringPlan, asked: Mapping[str, Any], room: int, journal: Any, progress: bool
) -> tuple[np.ndarray, list[list[list[str]]]]:
    """The metric and the KL, `[2, prompt, layer, coefficient]`, with the unsteered run as a last coefficient."""
    prompts, layers, count = len(plan.prompts), len(plan.rules), len(plan.coefficients)
    values = np.full((2, prompts, layers, count + 1), np.nan)
    texts = [[[""] * (count + 1) for _ in range(layers)] for _ in range(prompts)]
    jobs = [
        (prompt, layer, number)
        for prompt in range(prompts)
        for layer in range(layers)
        for number in range(count)
        # An add of 0 is the unsteered run, which runs once for each prompt.
        if plan.coefficients[number] or plan.rules[layer].name != "add"
    ]
    jobs += [(prompt, 0, count) for prompt in range(prompts)]
    fired = False
    with ExitStack() as stack:
        log = None if journal is None else stack.enter_context(Journal.open(journal, asked, 2 * len(jobs)))
        for (prompt, cell), value in ({} if log is None else log.done()).items():
            values[cell % 2, prompt, cell // 2 // (count + 1), cell // 2 % (count + 1)] = value
        for (prompt, cell), text in ({} if log is None else log.texts()).items():
            if cell % 2 == 0:
                texts[prompt][cell // 2 // (count + 1)][cell // 2 % (count + 1)] = text
        left = [job for job in jobs if np.isnan(values[(0, *job)])]
        shown = stack.enter_context(bar("steering", len(jobs), "cell", progress, done=len(jobs) - len(left)))
        for chunk in _chunks(plan, left, room):
            session = Session(plan.model, _rules(plan, chunk))
            found = plan.measure(plan, chunk, session)
            fired = fired or any(bool(active.fired) for active in session.active_rules)
            for job, (value, kl, text) in zip(chunk, found, strict=True):
                values[(0, *job)], values[(1, *job)] = value, kl
                texts[job[0]][job[1]][job[2]] = text
            if log is not None:
                cells = [2 * (layer * (count + 1) + number) + half for _, layer, number in chunk for half in (0, 1)]
                wrote = [x for _, _, text in found for x in (text, "")] if plan.new_tokens else ()
                log.append([job[0] for job in chunk for _ in (0, 1)], cells, [x for v in found for x in v[:2]], wrote)
            shown.update(len(chunk))
    if left and not fired and len(left) > prompts:
        raise NeverFired(
            f"no token of any prompt was steered, where {plan.rules[0].where}", expected="prompts that are so long"
        )
    values[:, :, :, count] = values[:, :, :1, count]
    idle = [n for n, c in enumerate(plan.coefficients) if not c] if plan.rules[0].name == "add" else []
    values[..., idle] = values[..., [count]]
    for rows in texts:
        for row in rows:
            row[count] = rows[0][count]
            for number in idle:
                row[number] = row[count]
    return values, texts


def _rules(plan: SteeringPlan, chunk: Sequence[Job]) -> list[Rule]:
    """A rule for each layer of a chunk, with the rows of its cells."""
    found = []
    for number, rule in enumerate(plan.rules):
        rows = [r for r, (_, layer, n) in enumerate(chunk) if layer == number and n < len(plan.coefficients)]
        if rows:
            strengths = tuple(plan.coefficients[chunk[r][2]] for r in rows)
            where = rule.where.of([prompt for prompt, _, _ in chunk])
            found.append(replace(rule, rows=tuple(rows), coefficient=strengths, where=where))
    return found


def _chunks(plan: SteeringPlan, jobs: Sequence[Job], room: int) -> Iterator[Sequence[Job]]:
    """Jobs whose prompts have one length, at most `room` tokens at once."""
    lengths = plan.prompts.lengths("decoder")
    groups: dict[int, list[Job]] = {}
    for job in jobs:
        groups.setdefault(lengths[job[0]], []).append(job)
    for length, members in groups.items():
        rows = max(room // (length + plan.new_tokens), 1)
        for start in range(0, len(members), rows):
            yield members[start : start + rows]


# --- measurements -------------------------------------------------------------------------------------------------


class _LogitsMeasure:
    """The metric of steered logits, and their KL from those of the unsteered prompts, which run once."""

    def __init__(self, model: engine.Model, prompts: Prompts, metric: Any) -> None:
        self.model, self.prompts, self.metric = model, prompts, metric
        rows: list[Tensor | None] = [None] * len(prompts)
        for batch in prompts.batches(None):
            for row, logits in zip(batch, self._of(batch), strict=True):
                rows[row] = logits
        self.unsteered = torch.stack([row for row in rows if row is not None])

    def __call__(self, plan: SteeringPlan, jobs: Sequence[Job], session: Session) -> list[tuple[float, float, str]]:
        prompts = [prompt for prompt, _, _ in jobs]
        with session:
            logits = self._of(prompts)
        before = self.unsteered[prompts]
        values = self.metric(logits, prompts, before if self.metric.metric.compares else None)
        return [(v, k, "") for v, k in zip(values.double().tolist(), divergence(before, logits).tolist(), strict=True)]

    def _of(self, prompts: Sequence[int]) -> Tensor:
        inputs: Any = self.prompts.inputs(prompts, self.model.device)
        length = self.prompts.length("decoder", prompts[0])
        at = self.metric.metric.position % length - length
        kept = {"logits_to_keep": -at} if engine.keeps_logits(self.model) else {}
        with engine.turn(self.model), torch.no_grad():
            return peel(self.model)(**inputs, **kept, use_cache=False).logits[:, at]


def _generated(plan: SteeringPlan, jobs: Sequence[Job], session: Session) -> list[tuple[float, float, str]]:
    """The metric of each generated text, and the KL along it: its tokens are given to the unsteered model."""
    model, root = plan.model, cast(Any, peel(plan.model))
    ids = torch.tensor([plan.prompts.ids[prompt] for prompt, _, _ in jobs], device=model.device)
    asked: Any = {"pad_token_id": padding_of(model), "max_new_tokens": plan.new_tokens, **(plan.generate or {})}
    with engine.turn(model), torch.no_grad():
        with session:
            out = root.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), return_dict_in_generate=True,
                output_logits=plan.guard,
                **asked,
            )  # fmt: skip
        new = out.sequences[:, ids.shape[1] :]
        kl = torch.full((len(jobs),), torch.nan)
        if plan.guard:
            plain, steered = (
                _unsteered(root, ids, new, [prompt for prompt, _, _ in jobs]),
                torch.stack(out.logits, dim=1),
            )
            counted = _before_end(new, root).to(steered.dtype)
            kl = (divergence(plain, steered) * counted).sum(1) / counted.sum(1)
    texts = engine.tokenizer_of(model).batch_decode(new, skip_special_tokens=True)
    return [(float(plan.metric(text)), k, text) for text, k in zip(texts, kl.tolist(), strict=True)]


def _unsteered(root: Any, ids: Tensor, new: Tensor, prompts: Sequence[int]) -> Tensor:
    """The unsteered logits of every generated token, `[row, new, vocab]`; each prompt runs once for all its rows."""
    first = {prompt: row for row, prompt in reversed(list(enumerate(prompts)))}
    numbers = {prompt: n for n, prompt in enumerate(first)}
    rows = torch.tensor([numbers[prompt] for prompt in prompts], device=ids.device)
    begun = root(input_ids=ids[list(first.values())], use_cache=True)
    cache = engine.cache_of(begun)
    if not hasattr(cache, "batch_select_indices"):
        whole = root(input_ids=torch.cat([ids, new], dim=1), use_cache=False).logits
        return whole[:, ids.shape[1] - 1 : -1]
    last = begun.logits[rows, -1:]
    if new.shape[1] == 1:
        return last
    cache.batch_select_indices(rows)
    then = root(input_ids=new[:, :-1], use_cache=True, **{engine.cache_argument(root): cache})
    return torch.cat([last, then.logits], dim=1)


def _before_end(tokens: Tensor, root: Any) -> Tensor:
    """Which generated tokens are the text's own: those up to the one that ends it."""
    ends = root.generation_config.eos_token_id
    if ends is None:
        return torch.ones_like(tokens)
    ends_here = torch.isin(tokens, torch.as_tensor(ends, device=tokens.device)).long()
    return (ends_here.cumsum(1) - ends_here == 0).long()


# --- what is asked ----------------------------------------------------------------------------------------------------


def _check(given: Prompts, where: Where, new: int | None, kwargs: Any, metric: Any) -> None:
    if given.values is not None:
        raise BadArgument("prompts are tokens, and these are values")
    if given.decoder_ids is not None:
        raise BadArgument("a sweep measures what a causal decoder says next, and this model has two towers")
    if where.rows not in (1, len(given)):
        raise ShapeError(
            f"where is given for {where.rows} rows, and there are {len(given)} prompts",
            expected="one for all prompts, or one for each",
        )
    if new is None:
        if where.kind == "generated":
            raise BadArgument(
                'where="generated" changes nothing at the prompt, which is all that runs',
                write="ns.steering.sweep(..., metric=text_to_number, max_new_tokens=20)",
            )
        if kwargs:
            raise BadArgument(f"{', '.join(kwargs)} would have no effect", write="max_new_tokens=20, to generate")
        return
    if new < 1:
        raise BadArgument(f"max_new_tokens={new}", expected="at least 1")
    several = [name for name in ("num_beams", "num_return_sequences") if kwargs.get(name, 1) != 1]
    if several:
        raise BadArgument(f"{several[0]} makes several rows of a cell", expected="one text for each cell")
    if isinstance(metric, Metric) or not callable(metric):
        raise BadArgument("with max_new_tokens the metric is of texts", expected="a function text -> number")


def _numbers(coefficients: Any) -> tuple[float, ...]:
    found = tuple(float(c) for c in ([coefficients] if isinstance(coefficients, int | float) else coefficients))
    if not found or len(set(found)) < len(found) or not np.isfinite(found).all():
        raise BadArgument(f"coefficients={list(found)}", expected="finite numbers, each once, at least one")
    return found


def _layers(rules: Sequence[Rule]) -> tuple[int, ...]:
    layers = [layer_of(rule.path) for rule in rules]
    if None in layers or len(set(layers)) < len(layers):
        raise BadArgument(
            "a sweep compares layers, and this vector has several places for one, or a place of none",
            expected="one place for each layer",
            write="vector.subset('layers[:].output')",
        )
    return tuple(layer for layer in layers if layer is not None)


def _asked(
    model: engine.Model,
    given: Prompts,
    rules: Sequence[Rule],
    coefficients: Any,
    metric: Any,
    where: Where,
    anew: bool,
) -> dict[str, Any]:
    """The identity of a sweep, as plain data."""
    operator = rules[0].name if rules[0].name in ("add", "project_out", "clamp", "scale", "rotate") else ""
    return {
        "kind": "steering", "model": engine.name_of(model)[0], "weights": engine.weights_digest(model, anew=anew),
        "prompts": [list(row) for row in given.ids], "paths": [str(rule.path.place) for rule in rules],
        "vectors": digest_of({str(rule.path.place): rule.vector for rule in rules}),
        "coefficients": list(coefficients), "metric": metric, "where": repr(where),
        "operator": operator or function_digest(rules[0].operator),
    }  # fmt: skip
