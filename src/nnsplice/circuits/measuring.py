"""`measure`: the metric of many circuits over many prompts, in batches."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nnsplice import engine
from nnsplice.activations.encoding import encode
from nnsplice.activations.prompts import Prompts, PromptsLike
from nnsplice.atlas import fingerprint, unwrap
from nnsplice.attribution.gradients import halving
from nnsplice.circuits import sender_parts
from nnsplice.circuits.ablations import Ablation, AblationSource, source_of
from nnsplice.circuits.constants import OptimalAblation, Training, note_of
from nnsplice.circuits.masks import EdgeMask, needed
from nnsplice.circuits.recording import record, run_plainly
from nnsplice.circuits.running import CircuitPass
from nnsplice.circuits.streams import AblatedStreams, whole_slots
from nnsplice.circuits.training import TrainingOptions, train
from nnsplice.circuits.wiring import Wiring, wiring_of
from nnsplice.errors import BadArgument, RefusedPlace, ShapeError
from nnsplice.metrics import Bound, Metrics, Several, bound_of
from nnsplice.packed.cost import Cost, CostModel
from nnsplice.paths import Path
from nnsplice.progress import bar
from nnsplice.sweeps.identity import model_record, prompts_record
from nnsplice.sweeps.rounding import TOLERANCE
from nnsplice.sweeps.running import check_mode

#: This many streams `[token, width]` take about as much memory as the activations of one token's block.
STREAMS = 64


@dataclass(frozen=True)
class Question:
    """The setting of runs of circuits: a model with its graph (`wiring`), prompts, a metric, and the ablated values."""

    model: engine.Model
    wiring: Wiring
    clean: Prompts
    corrupted: Prompts | None
    metric: Bound | Several
    source: AblationSource
    cost_model: CostModel

    @classmethod
    def of(
        cls,
        model: Any,
        clean: PromptsLike,
        corrupted: PromptsLike | None,
        metric: Metrics,
        ablation: Ablation,
        reference: PromptsLike | None = None,
        *,
        several: bool = False,
    ) -> Question:
        """The question with these arguments, checked.

        Args:
            several: allow several metrics.
        """
        model = engine.as_model(model)
        check_mode(model)
        engine.refuse_edits(model)
        engine.refuse_changed_logits(model, bare=True)
        wiring = wiring_of(model)
        prompts = _check_tokens(encode(model, clean))
        others = None if corrupted is None else _check_tokens(encode(model, corrupted))
        if others is not None:
            _check_pairs(prompts, others, ablation)
        bound = bound_of(metric, engine.tokenizer_of(model), len(prompts), prompts.texts)
        if isinstance(bound, Several) and not several:
            raise BadArgument("this takes one metric", expected="one metric, such as ns.logit_diff")
        bound.metric.check_lengths(prompts.lengths("decoder"))
        means_of = None if reference is None else _check_tokens(encode(model, reference))
        source = source_of(model, wiring, prompts, others, ablation, means_of)
        return cls(model, wiring, prompts, others, bound, source, CostModel.of(model))

    @property
    def identity(self) -> dict[str, Any]:
        """The identity of a question, as plain data."""
        return {
            **model_record(self.model),
            "clean": prompts_record(self.clean),
            "corrupted": None if self.corrupted is None else prompts_record(self.corrupted),
            "metric": self.metric.identity,
            "ablation": self.source.identity,
        }

    def check_parts(self, senders: Iterable[Path]) -> None:
        """Raise for a part of a sender that the model, the prompts or the ablation do not have."""
        sender_parts.check_parts(self.model, self.wiring, self.clean, self.source, senders)

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of several metrics; empty for a single one."""
        return self.metric.names if isinstance(self.metric, Several) else ()

    @property
    def root(self) -> nn.Module:
        """The plain module."""
        return unwrap(self.model)


@dataclass(frozen=True)
class CircuitMetrics:
    """The measurements of circuits."""

    #: `[prompt, circuit]`; of several metrics `[prompt, circuit, metric]`.
    values: np.ndarray
    #: The metric of the clean run: `[prompt]` or `[prompt, metric]`.
    clean: np.ndarray
    cost: Cost
    #: A note about trained constants.
    note: str = ""


@torch.no_grad()
def measure(
    question: Question,
    masks: Sequence[np.ndarray | EdgeMask],
    *,
    max_tokens: int | None = None,
    progress: bool = False,
    prompts: Sequence[int] | None = None,
) -> CircuitMetrics:
    """The metric of each circuit for each prompt.

    Args:
        masks: the edges of each circuit, `[receiver, sender]`.
        prompts: the indices of the prompts, in the order of the result; all if left out.
    """
    chosen = list(range(len(question.clean)) if prompts is None else prompts)
    masks = [mask if isinstance(mask, EdgeMask) else EdgeMask(mask) for mask in masks]
    if question.source.trained_from is not None:
        return _measure_trained(question, masks, max_tokens, progress)
    model, wiring = question.model, question.wiring
    at_once = engine.tokens_at_once(model, max_tokens)
    pruned: dict[Hashable, int] = {}
    which: list[int] = []
    kinds: list[EdgeMask] = []
    for mask in masks:
        small = mask.only(needed(wiring.shape, mask.edges, from_embed=question.source.is_run)[0])
        number = pruned.setdefault(small.key, len(kinds))
        which.append(number)
        if number == len(kinds):
            kinds.append(small)
    metrics = (len(question.metrics),) * bool(question.metrics)
    values = np.full((len(question.clean), len(kinds), *metrics), np.nan)
    clean = np.full((len(question.clean), *metrics), np.nan)
    order = sorted(range(len(kinds)), key=lambda number: int(kinds[number].edges.sum()))
    held = max((_tokens_for(wiring, len(sender_parts.kept_by(mask))) for mask in kinds), default=1.0)
    with engine.locked(model), bar("circuits", len(kinds) * len(chosen), "run", progress) as shown:
        cost = _check_full_circuit(question)
        sender_parts.check_experts(model, wiring, question.clean, sender_parts.experts_of(wiring, kinds))
        for batch in question.clean.take(chosen).batches(model):
            rows = [chosen[row] for row in batch]
            length = question.clean.length("decoder", rows[0])
            at = question.metric.metric.position % length - length
            # A circuit is not split, so batches of prompts are sized for the largest one.
            step = max(int(at_once / (length * held)), 1)
            for part in (rows[start : start + step] for start in range(0, len(rows), step)):
                cost += _measure_group(
                    question, part, at, [(n, kinds[n]) for n in order], at_once, values, clean, shown
                )
    return CircuitMetrics(values[chosen][:, which], clean[chosen], cost)


def _measure_trained(
    question: Question, masks: Sequence[EdgeMask], max_tokens: int | None, progress: bool
) -> CircuitMetrics:
    """The metric of each circuit, with constants trained for it (optimal ablation)."""
    known: dict[Hashable, CircuitMetrics] = {}
    trainings: list[Training] = []
    cost = Cost()
    for mask in masks:
        if (key := mask.key) in known:
            continue
        ablation, more = constants_for(
            question, mask.edges, TrainingOptions(), max_tokens=max_tokens, progress=progress
        )
        source = source_of(question.model, question.wiring, question.clean, None, ablation, None)
        known[key] = measure(replace(question, source=source), [mask], max_tokens=max_tokens)
        trainings.append(ablation.training)
        cost += more + known[key].cost
    each = [known[mask.key] for mask in masks]
    return CircuitMetrics(np.concatenate([one.values for one in each], 1), each[0].clean, cost, note_of(trainings))


def constants_for(
    question: Question,
    mask: np.ndarray,
    recipe: TrainingOptions,
    *,
    max_tokens: int | None,
    progress: bool,
    about: Mapping[str, Any] | None = None,
) -> tuple[OptimalAblation, Cost]:
    """Constants trained for the circuit of a mask, on the clean prompts; and the cost."""
    assert question.source.trained_from is not None
    with engine.locked(question.model):
        cost = _check_full_circuit(question)
        found, more = train(
            question.model, question.wiring, mask, question.clean, question.source.trained_from,
            question.metric.metric.position, recipe, room=engine.tokens_at_once(question.model, max_tokens),
            progress=progress, provenance={**model_record(question.model), **(about or {})},
        )  # fmt: skip
    return found, cost + more


def _measure_group(
    question: Question,
    rows: list[int],
    at: int,
    circuits: Sequence[tuple[int, EdgeMask]],
    at_once: int,
    values: np.ndarray,
    clean: np.ndarray,
    shown: Any,
) -> Cost:
    """Measure all circuits on some prompts of one length, into `values` and `clean`; returns the cost."""
    model, root, wiring = question.model, question.root, question.wiring
    experts = sorted(sender_parts.experts_of(wiring, [mask for _, mask in circuits]))
    own = record(root, model, wiring, question.clean, rows, at, experts)
    length = own.values.embed.shape[1]
    cost = question.cost_model.whole(question.clean, rows, 1)
    found, more = question.source.values(rows, own.values)
    cost += more
    ablated = AblatedStreams.of(root, wiring, found)
    reference = own.logits if question.metric.metric.compares else None
    clean[rows] = _as_numpy(question.metric(own.logits, rows, reference))
    done: list[Cost] = []

    def run(numbers: list[int]) -> None:
        chosen = [circuits[number] for number in numbers]
        slots, reads = sender_parts.slots_of(model, wiring, question.clean, rows, [mask for _, mask in chosen])
        made = CircuitPass(root, wiring, own.frame, ablated, question.cost_model, slots, reads)
        repeated = [*rows] * len(chosen)
        logits = made.run(lambda: run_plainly(root, model, question.clean, repeated, at))
        against = None if reference is None else reference.repeat(len(chosen), 1)
        got = _as_numpy(question.metric(logits, repeated, against))
        got = got.reshape(len(chosen), len(rows), *got.shape[1:])
        for (number, _), line in zip(chosen, got, strict=True):
            values[rows, number] = line
        done.append(
            made.cost + Cost(forwards=1, flops=len(repeated) * question.cost_model.per_token(wiring.tower.unembed))
        )
        shown.update(len(chosen) * len(rows))

    chunks = _fitting(wiring, [mask for _, mask in circuits], len(rows) * length, at_once)
    if engine.has_code_by_row(model):  # which has one row in a run of the prompt
        chunks = [[number] for numbers in chunks for number in numbers]
    for numbers in chunks:
        halving(numbers, run)
    return cost + sum(done, Cost())


def _fitting(wiring: Wiring, masks: Sequence[EdgeMask], tokens: int, at_once: int) -> list[list[int]]:
    """Groups of circuits that fit into memory together, by their tokens and the streams kept for each token."""
    chunks: list[list[int]] = []
    held: set[Hashable] = set()
    for number, mask in enumerate(masks):
        wider = held | sender_parts.kept_by(mask)
        if not chunks or (len(chunks[-1]) + 1) * tokens * _tokens_for(wiring, len(wider)) > at_once:
            chunks.append([])
            wider = sender_parts.kept_by(mask)
        chunks[-1].append(number)
        held = wider
    return chunks


def _tokens_for(wiring: Wiring, kept: int) -> float:
    """The memory of a token in units of one plain token: itself, kept differences, and the streams of receivers."""
    return 1.0 + (kept + max(len(layer.receivers) for layer in wiring.layers)) / STREAMS


def _as_numpy(values: Tensor) -> np.ndarray:
    return values.double().cpu().numpy()


def _check_tokens(prompts: Prompts) -> Prompts:
    prompts.require_tokens("a circuit runs on")
    if prompts.decoder_ids is not None:
        raise RefusedPlace("the decoder of a model with two towers reads another tower, and no edge stands for that")
    return prompts


def _check_pairs(clean: Prompts, corrupted: Prompts, ablation: Ablation) -> None:
    if ablation != "patch":
        return
    if len(clean) != len(corrupted):
        raise ShapeError(
            f"{len(clean)} clean prompts and {len(corrupted)} corrupted ones",
            expected="pairs: prompt i with prompt i",
            write='ablation="mean", or "zero", which need no pair',
        )
    for row, (a, b) in enumerate(zip(clean.lengths("decoder"), corrupted.lengths("decoder"), strict=True)):
        if a != b:
            raise ShapeError(
                f"pair {row}: the clean prompt has {a} tokens, the corrupted one {b}, so positions do not correspond",
                expected="prompts of one length in a pair",
                write='ablation="mean", or "zero", which need no pair',
            )


# --- whether the full circuit is the clean run ------------------------------------------------------------------------

_checked: weakref.WeakKeyDictionary[nn.Module, set[Hashable]] = weakref.WeakKeyDictionary()


def _check_full_circuit(question: Question) -> Cost:
    """Check, once per model, that the circuit of all edges gives the clean run's logits on the first prompt.

    Ablated values are zeros here, so a part of a layer that reads the stream past the graph's edges would read zeros.

    Raises:
        RefusedPlace: the logits differ.
    """
    root, model, wiring = question.root, question.model, question.wiring
    around = (engine.hooks_of(root.modules()), engine.replaced_in(root.modules()))
    state = (fingerprint(root), around, engine.attention_of(model), next(root.parameters()).dtype)
    known = _checked.setdefault(root, set())
    # What code of the user's does may depend on its variables, so that it is tried anew.
    if state in known and not engine.has_own_code(root.modules()):
        return Cost()
    own = record(root, model, wiring, question.clean, [0], -1)
    ablated = AblatedStreams.of(root, wiring, own.values.map(torch.zeros_like))
    made = CircuitPass(root, wiring, own.frame, ablated, question.cost_model, *whole_slots(wiring.shape.exists[None]))
    logits = made.run(lambda: run_plainly(root, model, question.clean, [0], -1))
    size = float((own.logits - own.logits.mean()).abs().max())
    off = float((logits - own.logits).abs().max())
    if not off <= TOLERANCE.get(own.logits.dtype, 2e-3) * max(size, 1.0):
        raise RefusedPlace(
            f"a circuit of all edges gives other logits than the clean run ({off:.2g} apart, of {size:.2g}), so "
            "something in the layers of this model reads the stream past its queries, keys, values and MLPs",
            expected="a model whose layers read the stream through those alone",
        )
    known.add(state)
    return made.cost + question.cost_model.whole(question.clean, [0], 1)
