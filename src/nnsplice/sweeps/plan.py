"""A sweep before it runs: pure data that can be counted, looked at, split and run elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor

from nnsplice import engine
from nnsplice.activations.prompts import PairSpanTexts, Prompts, PromptsLike, encode
from nnsplice.activations.saved_activation import SavedActivation
from nnsplice.errors import BadArgument, BadType, ShapeError, circumstances
from nnsplice.metrics import Bound, Metric, MetricLike
from nnsplice.paths import Path, Span
from nnsplice.sweeps.identity import asked_of
from nnsplice.sweeps.operations import NEEDS_REFERENCE, Operation, operation_of
from nnsplice.sweeps.pruning import split
from nnsplice.sweeps.targets import Corruption, Target, targets_of

#: One thing to run: the number of the prompt and of the target.
Job = tuple[int, int]
Sites = str | Path | Iterable[str | Path]


@dataclass(frozen=True)
class Plan:
    """What `run` will do; nothing of it depends on a live model.

    >>> plan = ns.plan_sweep(model, "w3 w4 w5", "w3 w6 w5", "layers[:].output[:]", ns.logit_diff("w7", "w8"))
    >>> len(plan)     # of nine sites the first token's cannot differ, and the last layer matters at the last token only
    5
    >>> len(plan.shard(0, 2)), len(plan.shard(1, 2))
    (3, 2)
    """

    corrupted: Prompts
    #: None for an operation that takes nothing from another run.
    clean: Prompts | None
    targets: tuple[Target, ...]
    metric: Bound
    operation: Operation
    reference: SavedActivation | None
    align: str
    seed: int
    #: What has to be computed, and what is known to be the corrupted run's value.
    jobs: tuple[Job, ...]
    known: tuple[Job, ...]
    asked: Mapping[str, Any] = field(repr=False)
    corruption: Corruption | None = field(default=None, repr=False)
    #: Texts of the tokens that positions count, per prompt.
    tokens: tuple[tuple[str, ...], ...] = field(default=(), repr=False)

    def __len__(self) -> int:
        """How many cells have to be computed."""
        return len(self.jobs)

    def preview(self, n: int = 10) -> str:
        """The first cells that will be computed, and what is known without."""
        lines = [
            f"{len(self.jobs)} cells to compute, {len(self.known)} known without; "
            f"{len(self.corrupted)} prompt{'s' * (len(self.corrupted) != 1)}, {self.operation.name}, "
            f"{self.metric.metric.name}"
        ]
        lines += [f"  prompt {prompt}  {self.targets[target].cell.path}" for prompt, target in self.jobs[:n]]
        if len(self.jobs) > n:
            lines.append(f"  ... and {len(self.jobs) - n} more")
        return "\n".join(lines)

    def shard(self, i: int, n: int) -> Plan:
        """Every n-th cell, from the i-th: the parts of n machines, whose results `SweepResult.merge` joins."""
        if n < 1 or not 0 <= i < n:
            raise BadArgument(f"shard({i}, {n})", expected="shard(i, n) with 0 <= i < n")
        return replace(self, jobs=self.jobs[i::n], known=self.known[i::n])

    def exists(self) -> np.ndarray:
        """`[prompt, target]`: whether the prompt is long enough to have the cell."""
        found = np.ones((len(self.corrupted), len(self.targets)), dtype=bool)
        for number, target in enumerate(self.targets):
            for prompt, length in enumerate(self.corrupted.lengths(target.tower)):
                if isinstance(target.position, int):
                    found[prompt, number] = -length <= target.position < length
        return found

    def positions(self, target: Target, prompt: int, *, of_clean: bool = False) -> list[int]:
        """Which own tokens of a prompt the target means: in the run that is edited, or in the clean one."""
        prompts = self.clean if of_clean and self.clean is not None else self.corrupted
        length = prompts.lengths(target.tower)[prompt]
        position = target.position
        if position is None:
            return list(range(length))
        if isinstance(position, Span):
            assert prompts.spans is not None
            start, stop = prompts.spans[position.name][prompt]
            if position.token is None:
                return list(range(start, stop))
            return [(start if position.token >= 0 else stop) + position.token]
        if position >= 0 and of_clean and self.align == "end":
            position += length - self.corrupted.lengths(target.tower)[prompt]
        return [position % length if position < 0 else position]


def plan_sweep(
    model: Any,
    clean: PromptsLike | None,
    corrupted: PromptsLike | None,
    sites: Sites,
    metric: MetricLike,
    *,
    operation: str | Callable[[Tensor], Tensor] = "patch",
    reference: SavedActivation | None = None,
    window: int = 1,
    spans: PairSpanTexts | None = None,
    align: str = "position",
    seed: int = 0,
    together: bool = False,
    corruption: Corruption | None = None,
) -> Plan:
    """Plan a sweep: every site changed by itself, in the corrupted run.

    >>> metric = ns.logit_diff("w7", "w8")
    >>> plan = ns.plan_sweep(model, "w3 w4 w5", "w3 w6 w5", "layers[0].heads[:].output[1]", metric)
    >>> print(plan.preview(2))
    4 cells to compute, 0 known without; 1 prompt, patch, logit_diff
      prompt 0  layers[0].heads[0].output[1]
      prompt 0  layers[0].heads[1].output[1]
      ... and 2 more

    Args:
        model: for its tokens and places; the plan keeps no part of it.
        clean: where values come from: a text, texts, or token ids; prompt i of it belongs to prompt i of `corrupted`.
        corrupted: the run that is edited; None edits the clean run.
        sites: paths; without positions, or with `[:]`, every position is a cell of its own.
        metric: `ns.logit_diff(answer, wrong)`, another metric, or a function `logits[row, vocab] -> [row]`.
        operation: `"patch"`, `"zero"`, `"mean"`, `"resample"`, `"noise"`, `"add"`, or a function of the value.
        reference: the capture that `mean`, `resample` and `add` take values from.
        window: how many neighbouring layers are changed together, clipped at the ends.
        spans: where named spans stand, as for `capture`; `{"clean": {...}, "corrupted": {...}}` where they differ.
        align: `"position"` for pairs of one length; `"end"` aligns tokens at the end.
        seed: of `resample` and `noise`.
        together: a site without positions means all tokens at once, as one cell.
        corruption: a change of every edited run's embeddings, beside or instead of other tokens.
    """
    model = engine.as_model(model)
    with circumstances("ns.plan_sweep"):
        chosen = operation_of(operation)
        edited, source = _prompts(model, clean, corrupted, spans, chosen)
        _check_pairs(edited, source, align)
        _check_reference(chosen, reference)
        bound = Metric.of(metric).bind(engine.tokenizer_of(model), len(edited))
        targets = targets_of(model, engine.listed(sites), edited, window, together)
    tokens = _texts(model, edited, targets)
    asked = asked_of(model, edited, source, targets, bound, chosen, reference, window, align, seed, corruption)
    plan = Plan(edited, source, targets, bound, chosen, reference, align, seed, (), (), asked, corruption, tokens)
    jobs, known = split(model, plan)
    return replace(plan, jobs=jobs, known=known)


# --- prompts ----------------------------------------------------------------------------------------------------------


def _prompts(
    model: engine.Model, clean: Any, corrupted: Any, spans: Any, operation: Operation
) -> tuple[Prompts, Prompts | None]:
    two = isinstance(spans, Mapping) and set(spans) <= {"clean", "corrupted"} and bool(spans)
    spans_clean, spans_corrupted = (spans.get("clean"), spans.get("corrupted")) if two else (spans, spans)
    if clean is None and corrupted is None:
        raise BadArgument("neither clean nor corrupted prompts", expected="prompts")
    if clean is None and operation.name == "patch":
        raise BadArgument("patching takes its values from the clean run, and clean is None", expected="clean prompts")
    source = None if clean is None else encode(model, clean, spans_clean)
    edited = source if corrupted is None else encode(model, corrupted, spans_corrupted)
    assert edited is not None
    if edited.values is not None:
        raise BadArgument("a sweep is over tokens, and these prompts are values", expected="texts or token ids")
    if source is not None and len(source) != len(edited):
        raise ShapeError(
            f"{len(source)} clean prompts and {len(edited)} corrupted ones", expected="pairs: prompt i with prompt i"
        )
    return edited, source


def _check_pairs(edited: Prompts, source: Prompts | None, align: str) -> None:
    if align not in ("position", "end"):
        raise BadArgument(f"align={align!r}", expected='"position" or "end"')
    if source is None or align == "end":
        return
    for row, (a, b) in enumerate(zip(source.lengths("encoder"), edited.lengths("encoder"), strict=True)):
        if a != b:
            raise ShapeError(
                f"pair {row}: the clean prompt has {a} tokens, the corrupted one {b}, so positions do not correspond",
                expected="prompts of one length in a pair",
                write='align="end", which counts tokens from the end, or named spans',
            )


def _check_reference(operation: Operation, reference: SavedActivation | None) -> None:
    if reference is not None and not isinstance(reference, SavedActivation):
        raise BadType(f"a reference of type {type(reference).__name__}", expected="a SavedActivation")
    if operation.name in NEEDS_REFERENCE and (reference is None or not len(reference)):
        raise BadArgument(
            f'operation="{operation.name}" takes its values from a reference, and there is none',
            expected="reference= a capture of the sites",
            write="reference=ns.capture(model, other_prompts, sites)",
        )
    if reference is not None and operation.name not in NEEDS_REFERENCE:
        raise BadArgument(
            f'operation="{operation.name}" does not use a reference, so giving one would do nothing',
            expected=f"no reference, or one of {', '.join(NEEDS_REFERENCE)}",
        )


def _texts(model: engine.Model, edited: Prompts, targets: Sequence[Target]) -> tuple[tuple[str, ...], ...]:
    decoder = bool(targets) and targets[0].tower == "decoder" and edited.decoder_ids is not None
    rows = edited.decoder_ids if decoder and edited.decoder_ids is not None else edited.ids
    tokenizer = engine.tokenizer_of(model)
    if tokenizer is None:
        return tuple(tuple(str(token) for token in row) for row in rows)
    return tuple(tuple(tokenizer.decode([token]) for token in row) for row in rows)
