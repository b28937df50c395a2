"""The cells of a steering sweep, many of them in one pass or in one generation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from os import PathLike
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from nnsplice import engine
from nnsplice.activations.prompts import Prompts
from nnsplice.atlas import unwrap
from nnsplice.errors import BadArgument
from nnsplice.metrics import divergence
from nnsplice.progress import bar
from nnsplice.results import Journal
from nnsplice.steering.padding import padding_of
from nnsplice.steering.rules import Rule
from nnsplice.steering.session import Session
from nnsplice.steering.sites import layer_of
from nnsplice.steering.where import NAMED, Where

#: Indices of (prompt, layer, coefficient).
CellIndex = tuple[int, int, int]


@dataclass(frozen=True)
class SteeringPlan:
    """The settings that all cells share, without the model.

    No `Plan` of `ns.sweep`: that one has pairs of prompts, and a cell there replaces a value of one run by that of
    another. Here a cell is a rule and a coefficient on one prompt, and may generate text.

    Attributes:
        prompts: the prompts.
        rules: a rule for each layer, with coefficient 1.
        coefficients: the coefficients.
        metric: the metric of logits, or with `new_tokens` of the generated text.
        new_tokens: the number of tokens to generate.
        generate: other arguments of `generate`.
        guard: whether the KL is measured.
        operator: the operator's name.
        where: the choice of tokens.
        name: the metric's name.
    """

    prompts: Prompts
    rules: tuple[Rule, ...]
    coefficients: tuple[float, ...]
    metric: Any
    new_tokens: int = 0
    generate: Mapping[str, Any] | None = None
    guard: bool = True
    operator: str = "add"
    where: Where = NAMED["all"]
    name: str = "value"

    @property
    def layers(self) -> tuple[int, ...]:
        """The layer of each rule."""
        return layers_of(self.rules)

    def take(self, prompts: Sequence[int]) -> SteeringPlan:
        """The same for some of the prompts."""
        where = self.where.of(prompts)
        rules = tuple(replace(rule, where=where) for rule in self.rules)
        metric = self.metric if self.new_tokens else self.metric.take(prompts)
        return replace(self, prompts=self.prompts.take(prompts), rules=rules, where=where, metric=metric)


@dataclass(frozen=True)
class CellValues:
    """The measurements of the cells of some prompts.

    Attributes:
        values: the metric and the KL, `[2, prompt, layer, coefficient]`, with the unsteered run as a last coefficient.
        texts: the generated texts, `[prompt][layer][coefficient]`.
        fired: whether any token was steered; True also if there was no cell to steer.
    """

    values: np.ndarray
    texts: list[list[list[str]]]
    fired: bool


def layers_of(rules: Sequence[Rule]) -> tuple[int, ...]:
    layers = [layer_of(rule.path) for rule in rules]
    if None in layers or len(set(layers)) < len(layers):
        raise BadArgument(
            "a sweep compares layers, and this vector has several sites for one, or a site of none",
            expected="one site for each layer",
            write="vector.subset('layers[:].output')",
        )
    return tuple(layer for layer in layers if layer is not None)


def run_cells(
    model: engine.Model,
    plan: SteeringPlan,
    room: int,
    *,
    identity: Mapping[str, Any] | None = None,
    journal: str | PathLike[str] | None = None,
    progress: bool = False,
) -> CellValues:
    """Run all cells of a plan, at most `room` tokens at once.

    Args:
        identity: the identity of the sweep, for the journal.
    """
    measure = partial(_generated, model) if plan.new_tokens else _LogitsMeasure(model, plan.prompts, plan.metric)
    prompts, layers, count = len(plan.prompts), len(plan.rules), len(plan.coefficients)
    values = np.full((2, prompts, layers, count + 1), np.nan)
    texts = [[[""] * (count + 1) for _ in range(layers)] for _ in range(prompts)]
    jobs = [
        (prompt, layer, number)
        for prompt in range(prompts)
        for layer in range(layers)
        for number in range(count)
        # An add of 0 is the unsteered run, which runs once for each prompt.
        if plan.coefficients[number] or not plan.rules[layer].adds
    ]
    jobs += [(prompt, 0, count) for prompt in range(prompts)]
    fired = False
    with ExitStack() as stack:
        log = None if journal is None else stack.enter_context(Journal.open(journal, identity or {}, 2 * len(jobs)))
        for (prompt, cell), value in ({} if log is None else log.done()).items():
            values[cell % 2, prompt, cell // 2 // (count + 1), cell // 2 % (count + 1)] = value
        for (prompt, cell), text in ({} if log is None else log.texts()).items():
            if cell % 2 == 0:
                texts[prompt][cell // 2 // (count + 1)][cell // 2 % (count + 1)] = text
        pending = [job for job in jobs if np.isnan(values[(0, *job)])]
        shown = stack.enter_context(bar("steering", len(jobs), "cell", progress, done=len(jobs) - len(pending)))
        # A row of the batch is a cell, and a user's hook may treat rows differently: then each cell runs by itself.
        by_row = engine.has_code_by_row(model)
        for chunk in _chunks(plan, pending, 0 if by_row else room):
            session = Session(model, _rules(plan, chunk))
            found = measure(plan, chunk, session)
            fired = fired or any(bool(active.fired) for active in session.active_rules)
            for job, (value, kl, text) in zip(chunk, found, strict=True):
                values[(0, *job)], values[(1, *job)] = value, kl
                texts[job[0]][job[1]][job[2]] = text
            if log is not None:
                cells = [2 * (layer * (count + 1) + number) + half for _, layer, number in chunk for half in (0, 1)]
                wrote = [x for _, _, text in found for x in (text, "")] if plan.new_tokens else ()
                log.append([job[0] for job in chunk for _ in (0, 1)], cells, [x for v in found for x in v[:2]], wrote)
            shown.update(len(chunk))
    fired = fired or len(pending) <= prompts
    values[:, :, :, count] = values[:, :, :1, count]
    idle = [n for n, c in enumerate(plan.coefficients) if not c] if plan.rules[0].adds else []
    values[..., idle] = values[..., [count]]
    for rows in texts:
        for row in rows:
            row[count] = rows[0][count]
            for number in idle:
                row[number] = row[count]
    return CellValues(values, texts, fired)


def _rules(plan: SteeringPlan, chunk: Sequence[CellIndex]) -> list[Rule]:
    """A rule for each layer of a chunk, with the rows of its cells."""
    found = []
    for number, rule in enumerate(plan.rules):
        rows = [r for r, (_, layer, n) in enumerate(chunk) if layer == number and n < len(plan.coefficients)]
        if rows:
            strengths = tuple(plan.coefficients[chunk[r][2]] for r in rows)
            where = rule.where.of([prompt for prompt, _, _ in chunk])
            found.append(replace(rule, rows=tuple(rows), coefficient=strengths, where=where))
    return found


def _chunks(plan: SteeringPlan, jobs: Sequence[CellIndex], room: int) -> Iterator[Sequence[CellIndex]]:
    """Jobs whose prompts have one length, at most `room` tokens at once."""
    lengths = plan.prompts.lengths("decoder")
    groups: dict[int, list[CellIndex]] = {}
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
        for batch in prompts.batches(model):
            for row, logits in zip(batch, self._of(batch), strict=True):
                rows[row] = logits
        self.unsteered = torch.stack([row for row in rows if row is not None])

    def __call__(
        self, plan: SteeringPlan, jobs: Sequence[CellIndex], session: Session
    ) -> list[tuple[float, float, str]]:
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
        with engine.locked(self.model), torch.no_grad():
            return unwrap(self.model)(**{**inputs, **kept, "use_cache": False}).logits[:, at]


def _generated(
    model: engine.Model, plan: SteeringPlan, jobs: Sequence[CellIndex], session: Session
) -> list[tuple[float, float, str]]:
    """The metric of each generated text, and the KL along it: its tokens are given to the unsteered model."""
    root = cast(Any, unwrap(model))
    ids = torch.tensor([plan.prompts.ids[prompt] for prompt, _, _ in jobs], device=model.device)
    options: Any = {"pad_token_id": padding_of(model), "max_new_tokens": plan.new_tokens, **(plan.generate or {})}
    with engine.locked(model), torch.no_grad():
        with session:
            out = root.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), return_dict_in_generate=True,
                output_logits=plan.guard,
                **options,
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
    own = engine.has_own_code(root.modules())  # which may be written for a token of its number in a pass
    first = {prompt: row for row, prompt in reversed(list(enumerate(prompts)))}
    numbers = {prompt: n for n, prompt in enumerate(first)}
    rows = torch.tensor([numbers[prompt] for prompt in prompts], device=ids.device)
    begun = root(input_ids=ids[list(first.values())], use_cache=True)
    cache = engine.cache_of(begun)
    if not hasattr(cache, "batch_select_indices"):
        if own:
            raise BadArgument(
                "code of yours runs in this model, whose cache cannot be cut into the rows of a sweep, so the guard "
                "would measure other passes than those that generate",
                write="guard=False",
            )
        whole = root(input_ids=torch.cat([ids, new], dim=1), use_cache=False).logits
        return whole[:, ids.shape[1] - 1 : -1]
    last = begun.logits[rows, -1:]
    if new.shape[1] == 1:
        return last
    cache.batch_select_indices(rows)
    found = [last]
    for part in new[:, :-1].split(1 if own else new.shape[1], dim=1):
        then = root(input_ids=part, use_cache=True, **{engine.cache_argument(root): cache})
        cache = engine.cache_of(then)
        found.append(then.logits)
    return torch.cat(found, dim=1)


def _before_end(tokens: Tensor, root: Any) -> Tensor:
    """The generated tokens up to the one that ends the text."""
    ends = root.generation_config.eos_token_id
    if ends is None:
        return torch.ones_like(tokens)
    ends_here = torch.isin(tokens, torch.as_tensor(ends, device=tokens.device)).long()
    return (ends_here.cumsum(1) - ends_here == 0).long()
