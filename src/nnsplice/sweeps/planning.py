"""`plan_sweep`: pair prompts, expand sites, and separate cells that cannot change."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from torch import Tensor

from nnsplice import engine
from nnsplice.activations.encoding import encode
from nnsplice.activations.prompts import PairSpanTexts, Prompts, PromptsLike
from nnsplice.activations.saved_activation import SavedActivation
from nnsplice.errors import BadArgument, BadType, ShapeError, ShortRow, SpanError, circumstances
from nnsplice.metrics import Metric, Metrics, bound_of
from nnsplice.paths import Span
from nnsplice.subspaces import Subspace
from nnsplice.sweeps import knockouts, other_model, subspace_fit
from nnsplice.sweeps.corruption import Corruption
from nnsplice.sweeps.expansion import targets_of
from nnsplice.sweeps.identity import asked_of
from nnsplice.sweeps.jobs import Jobs
from nnsplice.sweeps.operations import NEEDS_REFERENCE, Operation, operation_of
from nnsplice.sweeps.plan import Plan
from nnsplice.sweeps.pruning import same, split
from nnsplice.sweeps.role_alignment import partner
from nnsplice.sweeps.sequences import answer_runs
from nnsplice.sweeps.sets import Sites
from nnsplice.sweeps.targets import Target
from nnsplice.warn import warn_caller


def plan_sweep(
    model: Any,
    clean: PromptsLike | None,
    corrupted: PromptsLike | None,
    sites: Sites,
    metric: Metrics,
    *,
    operation: str | Callable[[Tensor], Tensor] = "patch",
    reference: SavedActivation | None = None,
    subspace: Subspace | None = None,
    window: int = 1,
    spans: PairSpanTexts | None = None,
    align: str = "position",
    seed: int = 0,
    together: bool = False,
    corruption: Corruption | None = None,
    source: Any = None,
) -> Plan:
    """Plan a sweep: one cell for each site, which is changed by itself in the corrupted run.

    >>> metric = ns.logit_diff("w7", "w8")
    >>> plan = ns.plan_sweep(model, "w3 w4 w5", "w3 w6 w5", "layers[0].heads[:].output[1]", metric)
    >>> print(plan.preview(2))
    4 cells to compute, 0 known without; 1 prompt, patch, logit_diff
      prompt 0  layers[0].heads[0].output[1]
      prompt 0  layers[0].heads[1].output[1]
      ... and 2 more

    Args:
        model: a model from `ns.load`; the plan keeps its tokens and sites, and no part of the model.
        clean: the prompts that values are taken from: a text, a list of texts, token ids or chat messages. Prompt i is
            paired with prompt i of `corrupted`; a pair of equal prompts is not run, as its cells have the corrupted
            run's value. None where the operation takes nothing from a clean run.
        corrupted: the prompts whose run is edited; None edits the clean run, for operations other than `"patch"`.
        sites: a path or several. With `[:]`, or without a position unless `together`, each token is a cell. A list of
            paths in the list is a set, which is one cell: its sites are changed together, at all tokens where a path
            has no position.
        metric: `ns.logit_diff(answer, wrong)`, another metric, or a function `logits[row, vocab] -> [row]`. Several
            metrics, in a list or in a dictionary by name, are measured in the same runs and give the grid an axis
            `metric`.
        operation: `"patch"`, `"zero"`, `"mean"`, `"resample"`, `"noise"`, `"add"`, or a function
            `value[row, width] -> [row, width]`; `"knockout"` removes edges of attention, which paths name by query and
            key: `"layers[:].heads[:].pattern[-1][3]"`. The query's other keys then share the whole softmax.
        reference: the capture that `"mean"`, `"resample"` and `"add"` take values from.
        subspace: change only the part of each value that lies in this subspace, `h + Q Qᵀ (new - h)`, whatever the
            operation; every site has to be as wide.
        window: the number of neighbouring layers that are changed together; fewer at the first and last layers.
        spans: token spans by name, as for `ns.capture`; `{"clean": {...}, "corrupted": {...}}` where the prompts
            differ.
        align: how tokens of a pair correspond: `"position"`, for prompts of one length; `"end"`, counted from the last
            token; or `"role"`, counted from the span `"subject"`: its first and last token, the token after it, the
            last of all, and the stretches between where both have one length. Tokens without a partner are no cells.
        seed: the seed of `"resample"` and `"noise"`.
        together: True makes a site without a position one cell, in which all tokens are changed at once, as in
            `ns.ablate` and `ns.path_patch`.
        corruption: a change of the embeddings in every edited run, as `ns.causal_trace` makes it; used with or instead
            of corrupted prompts.
        source: another model, whose run of the same prompts the values come from (`corrupted` is None then): a tuned
            one, another checkpoint. `ns.run` takes it too.

    Returns:
        The plan, with `len(plan)` cells to compute, `plan.preview()` and `plan.shard(i, n)`; `ns.run(plan, model)`
        computes it.

    Raises:
        PathError: a site is no path, is out of range (`OutOfRange`) or has no exact value (`RefusedPlace`).
        UnknownPath: a site that this model does not have.
        BadArgument: nothing differs between the runs, or options that do not fit together.
        ShapeError: the numbers of prompts differ, or the lengths of a pair with `align="position"`.
        ShortRow: a prompt has no token at a position of a site or of the metric.
        SpanError: a span that is not found, or has another length in the other prompt.
    """
    model = engine.as_model(model, sharded=source is None)
    other = None if source is None else engine.as_model(source)
    with circumstances("ns.plan_sweep"):
        engine.refuse_changed_logits(model)
        chosen = operation_of(operation, subspace)
        edited, there = _prompts(model, clean, corrupted, spans, chosen)
        _check_pairs(edited, there, align)
        if other is not None:
            other_model.check(model, other, edited, chosen, pair=corrupted is not None, corrupts=corruption is not None)
        elif corrupted is None and corruption is None and chosen.name == "patch":
            raise nothing_differs()
        _check_reference(chosen, reference)
        reference = None if reference is None else reference._located(model)
        runs = None
        if isinstance(metric, Metric) and metric.sequence:
            runs = answer_runs(model, metric, edited, there, align)
            bound = runs.metric
        else:
            texts = edited.texts if edited.decoder_ids is None else None
            bound = bound_of(metric, engine.tokenizer_of(model), len(edited), texts)
        _check_read(bound.metric, edited, there, align)
        targets = targets_of(model, sites, edited, window, together)
        knockouts.check(model, chosen, targets, edited)
        subspace_fit.check(model, chosen, targets, edited)
        if chosen.name == "patch" and there is not None:
            _check_spans(targets, edited, there)
        if other is not None:
            other_model.check_places(model, other, edited, targets)
        elif chosen.name == "patch" and corruption is None:
            _warn_of_equal_pairs(edited, there)
    tokens = edited.token_texts(model, targets[0].tower if targets else "encoder")
    scored = bound.identity if runs is None else runs.identity
    asked = asked_of(model, edited, there, targets, scored, chosen, reference, window, align, seed, corruption, other)
    none = Jobs.of(())
    plan = Plan(edited, there, targets, bound, chosen, reference, align, seed, none, none, asked, corruption, tokens)
    if runs is not None:
        plan = replace(plan, corrupted=runs.corrupted, clean=runs.clean, owners=runs.owners, appended=runs.appended)
    plan = replace(plan, foreign=other is not None)
    jobs, known = split(model, plan)
    if other is not None and other_model.identical(model, other):
        jobs, known = none, jobs + known
    return replace(plan, jobs=jobs, known=known)


# --- prompts ----------------------------------------------------------------------------------------------------------


def _prompts(
    model: engine.Model, clean: Any, corrupted: Any, spans: Any, operation: Operation
) -> tuple[Prompts, Prompts | None]:
    two = isinstance(spans, Mapping) and set(spans) <= {"clean", "corrupted"} and bool(spans)
    two = two and all(of is None or isinstance(of, Mapping) for of in spans.values())
    spans_clean, spans_corrupted = (spans.get("clean"), spans.get("corrupted")) if two else (spans, spans)
    if clean is None and corrupted is None:
        raise BadArgument("neither clean nor corrupted prompts", expected="prompts")
    if clean is None and operation.name == "patch":
        raise BadArgument("patching takes its values from the clean run, and clean is None", expected="clean prompts")
    source = None if clean is None else encode(model, clean, spans_clean, images=True, sounds=True)
    apart = circumstances('corrupted=   (with spans of its own: spans={"clean": {...}, "corrupted": {...}})')
    with apart if spans and not two else nullcontext():
        edited = source if corrupted is None else encode(model, corrupted, spans_corrupted, images=True, sounds=True)
    assert edited is not None
    edited.require_tokens("a sweep is over")
    if source is not None and len(source) != len(edited):
        raise ShapeError(
            f"{len(source)} clean prompts and {len(edited)} corrupted ones", expected="pairs: prompt i with prompt i"
        )
    return edited, source


def _check_pairs(edited: Prompts, source: Prompts | None, align: str) -> None:
    if align not in ("position", "end", "role"):
        raise BadArgument(f"align={align!r}", expected='"position", "end" or "role"')
    if align == "role" and edited.decoder_ids is not None:
        raise BadArgument(
            'align="role" counts tokens from the subjects, which a model of two towers has in one of them alone',
            expected='"position" or "end"',
        )
    if align == "role":
        for prompts in (edited, source or edited):
            if "subject" not in (prompts.spans or {}):
                raise SpanError(
                    'align="role" counts tokens from the span "subject", which is not given',
                    expected='spans={"clean": {"subject": ...}, "corrupted": {"subject": ...}}',
                )
    if source is None or align != "position":
        return
    for tower in ("encoder", "decoder"):
        for row, (a, b) in enumerate(zip(source.lengths(tower), edited.lengths(tower), strict=True)):
            if a != b:
                raise ShapeError(
                    f"pair {row}: the clean prompt has {a} tokens, the corrupted one {b}, so positions do not "
                    "correspond",
                    expected="prompts of one length in a pair",
                    write='align="end": the clean tokens count from the end, named spans in their own prompt; or '
                    'align="role", with the span "subject"',
                )


def _check_spans(targets: Sequence[Target], edited: Prompts, source: Prompts) -> None:
    """Check that a span's tokens correspond in both prompts of each pair."""
    positions = [part.position for target in targets for part in target.parts]
    for span in dict.fromkeys(position for position in positions if isinstance(position, Span)):
        if span.name not in (source.spans or {}):
            raise SpanError(
                f'the span "{span.name}" is not given for the clean prompts',
                expected=f'spans={{"clean": {{"{span.name}": ...}}, "corrupted": {{...}}}}',
            )
        assert source.spans is not None and edited.spans is not None
        for row, pair in enumerate(zip(source.spans[span.name], edited.spans[span.name], strict=True)):
            a, b = (stop - start for start, stop in pair)
            if span.token is None and a != b:
                raise SpanError(
                    f'pair {row}: the span "{span.name}" has {a} tokens in the clean prompt and {b} in the corrupted '
                    "one, so they do not correspond",
                    expected="spans of one length in a pair, or one token of the span",
                    write=f'["{span.name}"][-1] for its last token, ["{span.name}"][0] for its first',
                )
            if span.token is not None and not -a <= span.token < a:
                raise ShortRow(f'pair {row}: the span "{span.name}" has {a} tokens in the clean prompt: [{span}]')


def _check_read(metric: Metric, edited: Prompts, source: Prompts | None, align: str) -> None:
    """Check that every prompt has the position that the metric reads."""
    lengths = edited.lengths("decoder")
    metric.check_lengths(lengths)
    for row, (a, b) in enumerate(zip((source or edited).lengths("decoder"), lengths, strict=True)):
        if align == "role" and source is not None and partner(edited, source, row, metric.position % b) is None:
            raise ShortRow(
                f"pair {row}: {metric.name} reads [{metric.position}] of the corrupted prompt, whose role the clean "
                "one does not have",
                expected="a position that both prompts of a pair have by its role, such as the last",
            )
        if align == "end" and a < (from_end := b - metric.position % b):
            raise ShortRow(
                f"pair {row}: {metric.name} reads [{metric.position}] of the corrupted prompt, which is [-{from_end}], "
                f"and the clean one has {a} token{'s' * (a != 1)}",
                expected="a position that both prompts of a pair have, counted from the end",
            )


def _warn_of_equal_pairs(edited: Prompts, source: Prompts | None) -> None:
    """Warn where both prompts of every pair are equal, so that no cell can differ."""
    if source is not None and source is not edited and all(same(edited, source, row) for row in range(len(edited))):
        warn_caller(
            "the corrupted prompts are the clean ones, so nothing can differ: every cell is the corrupted run's value"
        )


def nothing_differs() -> BadArgument:
    """The error for a patch without corrupted prompts."""
    return BadArgument(
        "corrupted is None, so patching would change nothing",
        expected="corrupted prompts in which something differs",
        write="ns.ablate(model, prompts, sites, metric), which needs no second prompt",
    )


def _check_reference(operation: Operation, reference: SavedActivation | None) -> None:
    if reference is not None and not isinstance(reference, SavedActivation):
        raise BadType(
            f"a reference of type {type(reference).__name__}",
            expected="a SavedActivation",
            write="reference=ns.capture(model, other_prompts, sites)",
        )
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
