"""`ns.steering.sweep`: layers times coefficients, from a question to a result."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any, cast

import numpy as np

from nnsplice import engine
from nnsplice.activations import SavedActivation, features
from nnsplice.activations.encoding import encode
from nnsplice.activations.prompts import Prompts, PromptsLike
from nnsplice.digests import digest_of, function_digest
from nnsplice.errors import BadArgument, NeverFired, ShapeError, circumstances
from nnsplice.metrics import Metric, MetricLike
from nnsplice.steering.cells import SteeringPlan, layers_of, run_cells
from nnsplice.steering.operators import OPERATORS, Operator
from nnsplice.steering.result import SteeringSweep
from nnsplice.steering.rules import rules_of
from nnsplice.steering.where import Where, read


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
        max_tokens: the number of tokens that run at once; chosen for the device if left out.
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
    plan = planned(
        model, prompts, vector, coefficients, metric, operator=operator, where=where, max_new_tokens=max_new_tokens,
        guard=guard, **generate_kwargs,
    )  # fmt: skip
    identity = identity_of(model, plan, anew=journal is not None)
    found = run_cells(
        model, plan, engine.tokens_at_once(model, max_tokens), identity=identity, journal=journal, progress=progress
    )
    check_fired(plan.where, found.fired)
    return result_of(found.values, found.texts, shown_of(plan, identity["model"]))


def planned(
    model: engine.Model,
    prompts: PromptsLike,
    vector: SavedActivation,
    coefficients: Sequence[float],
    metric: Any,
    *,
    operator: str | Operator = "add",
    where: str | Where = "all",
    max_new_tokens: int | None = None,
    guard: bool = True,
    **generate_kwargs: Any,
) -> SteeringPlan:
    """The plan of a sweep, with all arguments checked; they are those of `sweep`."""
    with circumstances("ns.steering.sweep"):
        if engine.in_training(model):
            raise BadArgument("the model is in train mode, so every run would be another one", write="model.eval()")
        engine.refuse_edits(model)
        engine.refuse_changed_logits(model, bare=True)
        given = encode(model, prompts)
        chosen, factors = read(where), _numbers(coefficients)
        _check(given, chosen, max_new_tokens, generate_kwargs, metric)
        if not guard and max_new_tokens is None:
            raise BadArgument("the guard of logits costs nothing", expected="guard=False with max_new_tokens")
        rules = rules_of(model, vector, 1.0, operator, chosen, None, None)
        layers_of(rules)
    names: dict[str, Any] = {"operator": rules[0].name, "where": chosen}
    if max_new_tokens is not None:
        options = {"do_sample": False, **generate_kwargs}
        names["name"] = getattr(metric, "__name__", type(metric).__name__)
        return SteeringPlan(given, rules, factors, metric, max_new_tokens, options, guard, **names)
    texts = given.texts if given.decoder_ids is None else None
    bound = Metric.of(cast("MetricLike", metric)).bind(engine.tokenizer_of(model), len(given), texts)
    bound.metric.check_lengths(given.lengths("decoder"))
    return SteeringPlan(given, rules, factors, bound, **names, name=bound.metric.name)


def shown_of(plan: SteeringPlan, model: str | None) -> dict[str, Any]:
    """The description of a plan in its result, as plain data."""
    return {
        "paths": [rule.address for rule in plan.rules], "layers": list(plan.layers),
        "coefficients": list(plan.coefficients), "prompts": list(plan.prompts.texts or ()), "metric": plan.name,
        "asked": {"model": model, "operator": plan.operator, "where": str(plan.where)},
        "has_texts": bool(plan.new_tokens),
    }  # fmt: skip


def result_of(values: np.ndarray, texts: list[list[list[str]]], shown: Mapping[str, Any]) -> SteeringSweep:
    """The result of all prompts.

    Args:
        values: the values of `CellValues`.
        shown: the description of `shown_of`.
    """
    kept = tuple(tuple(tuple(row[:-1]) for row in rows) for rows in texts) if shown["has_texts"] else ()
    return SteeringSweep(
        tuple(shown["paths"]), tuple(shown["layers"]), tuple(shown["coefficients"]), values[0, ..., :-1],
        values[1, ..., :-1], values[0, :, 0, -1], tuple(shown["prompts"]), shown["metric"], shown["asked"], kept,
    )  # fmt: skip


def check_fired(where: Where, fired: bool) -> None:
    """Raise where nothing was steered.

    Raises:
        NeverFired: no token of any prompt was.
    """
    if not fired:
        raise NeverFired(f"no token of any prompt was steered, where {where}", expected="prompts that are so long")


# --- arguments -----------------------------------------------------------------------------------------------------


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


def identity_of(model: engine.Model, plan: SteeringPlan, anew: bool) -> dict[str, Any]:
    """The identity of a sweep, as plain data."""
    operator = plan.rules[0].requested
    known = next((name for name, one in OPERATORS.items() if one is operator), None)
    saes = features.identities(model, (rule.feature for rule in plan.rules if rule.feature is not None))
    metric = {"name": plan.name, "source": function_digest(plan.metric)} if plan.new_tokens else plan.metric.identity
    identity = {
        "kind": "steering", "model": engine.name_of(model)[0], "weights": engine.weights_digest(model, anew=anew),
        "prompts": [list(row) for row in plan.prompts.ids], "paths": [rule.address for rule in plan.rules],
        "vectors": digest_of({rule.address: rule.vector for rule in plan.rules}),
        "coefficients": list(plan.coefficients), "metric": metric, "where": repr(plan.where),
        "operator": known or function_digest(operator), **({"saes": saes} if saes else {}),
    }  # fmt: skip
    if plan.new_tokens:
        options = plan.generate or {}
        plain = {key: v if isinstance(v, str | int | float) else function_digest(v) for key, v in options.items()}
        identity["generate"] = {"max_new_tokens": plan.new_tokens, "guard": plan.guard, **plain}
    return identity
