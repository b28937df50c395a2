"""`sweep`: plan and run in one call."""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike
from typing import Any

from torch import Tensor

from nnsplice import engine
from nnsplice.activations.prompts import PairSpanTexts, PromptsLike
from nnsplice.activations.saved_activation import SavedActivation
from nnsplice.metrics import Metrics
from nnsplice.results import SweepResult
from nnsplice.subspaces import Subspace
from nnsplice.sweeps.planning import plan_sweep
from nnsplice.sweeps.running import run_fresh
from nnsplice.sweeps.sets import Sites
from nnsplice.warn import warn_caller


def sweep(
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
    executor: str = "auto",
    max_tokens: int | None = None,
    journal: str | PathLike[str] | None = None,
    progress: bool = True,
    seed: int = 0,
    source: Any = None,
    together: bool = False,
) -> SweepResult:
    """Activation patching: run `corrupted` with one site's value from `clean` at a time, and record the metric.

    >>> metric = ns.logit_diff("w7", "w8")
    >>> result = ns.sweep(model, "w3 w4 w5", "w3 w6 w5", "layers[:].output[:]", metric, progress=False)
    >>> result.grid().sizes
    Frozen({'prompt': 1, 'layer': 3, 'position': 3})

    A list of paths inside the list is a set: one cell, in which all of its sites are changed together.

    >>> pair = ["layers[0].heads[1]", "layers[1].heads[0]"]
    >>> result = ns.sweep(model, "w3 w4 w5", "w3 w6 w5", [pair, pair[:1], pair[1:]], metric, progress=False)
    >>> result.grid().sel(prompt=0).set.values.tolist()[0]
    'layers[0].heads[1].output + layers[1].heads[0].output'

    With another model as `source`, the values come from its run of the same prompts, and the ends of the scale are the
    two models: each cell says how much of their difference a site carries.

    >>> import copy
    >>> tuned = ns.load(copy.deepcopy(ns.models.unwrap(model)), tokenizer=model.tokenizer)
    >>> with torch.no_grad():
    ...     _ = ns.models.unwrap(tuned).transformer.h[1].mlp.c_proj.weight.mul_(2.0)
    >>> result = ns.sweep(model, "w3 w4 w5", None, "layers[:].mlp[-1]", metric, source=tuned, progress=False)
    >>> result.effect().values.squeeze().round(6).tolist()[0]
    0.0

    `ns.plan_sweep` and `ns.run` do the same in two steps.

    Args:
        model: a model from `ns.load`, in eval mode.
        clean: the prompts that values are taken from: a text, a list of texts, token ids or chat messages. Prompt i is
            paired with prompt i of `corrupted`. None where the operation takes nothing from a clean run.
        corrupted: the prompts whose run is edited; None edits the clean run, for operations other than `"patch"`.
        sites: a path or several. Without a position, or with `[:]`, each token is a cell of its own.
        metric: `ns.logit_diff(answer, wrong)`, another metric, or a function `logits[row, vocab] -> [row]`; several in
            a list or a dictionary give the grid an axis `metric`.
        operation: `"patch"`, `"zero"`, `"mean"`, `"resample"`, `"noise"`, `"add"`, a function of the value, or
            `"knockout"` of edges of attention (`"layers[:].heads[:].pattern[-1][3]"`).
        reference: the capture that `"mean"`, `"resample"` and `"add"` take values from.
        subspace: change only the part of each value that lies in this subspace.
        window: the number of neighbouring layers that are changed together.
        spans: token spans by name, `{"subject": ["Eiffel Tower", ...]}`, a text or (start, stop) for each prompt;
            `{"clean": {...}, "corrupted": {...}}` where the prompts differ.
        align: how tokens of a pair correspond: `"position"`, `"end"` (counted from the last token), or `"role"`
            (counted from the span `"subject"`).
        executor: `"auto"`, `"packed"`, `"batched"` or `"reference"`, as for `ns.run`.
        max_tokens: the number of tokens that run at once; chosen for the device if left out.
        journal: a file that finished cells are appended to; the same call resumes from it after an interruption.
        progress: show a progress bar.
        seed: the seed of `"resample"` and `"noise"`.
        source: another model, whose run of the same prompts the values come from; `corrupted` is None then.
        together: True makes a site without a position one cell, in which all tokens are changed at once.

    Returns:
        The metric of every cell, with `.grid()`, `.effect()`, `.frame()` and `.plot()`.

    Raises:
        PathError: a site is no path, is out of range (`OutOfRange`) or has no exact value (`RefusedPlace`).
        UnknownPath: a site that this model does not have.
        BadArgument: nothing differs between the runs, options that do not fit together, or a model in train mode.
        ShapeError: the numbers of prompts differ, or the lengths of a pair with `align="position"`.
        ShortRow: a prompt has no token at a position of a site or of the metric.
        SpanError: a span that is not found, or has another length in the other prompt.
        RefusedExecutor: the executor named has no exact values for this sweep.
        FileError: the journal is of another sweep, or damaged.
    """
    plan = plan_sweep(
        model, clean, corrupted, sites, metric, operation=operation, reference=reference, subspace=subspace,
        window=window, spans=spans, align=align, seed=seed, source=source, together=together,
    )  # fmt: skip
    unseen = plan.operation.name != "patch" and not plan.metric.metric.compares
    if unseen and clean is not None and corrupted is not None:
        warn_caller(
            f"{plan.operation.name} takes nothing from the clean prompts: the corrupted run is edited, and the clean "
            "one is only the upper end of its scale. corrupted=None edits the clean run, clean=None leaves out the "
            "scale"
        )
    return run_fresh(
        plan, engine.as_model(model, sharded=source is None), executor=executor, max_tokens=max_tokens,
        journal=journal, progress=progress, source=source,
    )  # fmt: skip
