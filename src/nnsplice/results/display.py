"""A result as text: how much was measured, its sites, scale and cost."""

from __future__ import annotations

import html as escape

import numpy as np

from nnsplice.results import estimates, measures, wording
from nnsplice.results.kinds import kinds_of
from nnsplice.results.table import Table
from nnsplice.shown import counted

SHOWN = 8


def text(table: Table, metric: str) -> str:
    """A line of totals, one for each kind of site, one for the unedited runs, one for the run."""
    first, *others = _lines(table, metric)
    return "\n".join([f"SweepResult: {first}", *(f"  {line}" for line in others)])


def html(table: Table, metric: str) -> str:
    """The same for a notebook."""
    first, *others = (escape.escape(line) for line in _lines(table, metric))
    return f"<div><b>SweepResult</b>: {first}" + "".join(f"<br>&emsp;{line}" for line in others) + "</div>"


def _lines(table: Table, metric: str) -> list[str]:
    kinds, prompts = kinds_of(table.cells), len(table.clean)
    part = " (a part)" if (table.exists & ~table.done).any() else ""
    cells = counted(int(table.done.sum()), "cell")
    whole = _whole(table)
    sites = [f"{kind}, all tokens at once" if kind in whole else kind for kind in kinds[:SHOWN]]
    lines = [f"{cells}, {counted(prompts, 'prompt')}, {metric}{part}", *sites]
    if len(kinds) > SHOWN:
        lines.append(f"... and {counted(len(kinds) - SHOWN, 'more kind')} of site")
    if receivers := wording.receivers(table.asked):
        lines.append(f"through {receivers}")
    for at, name in enumerate(table.metrics):
        lines.append(f"{name}: clean {_average(table.clean[:, at])}, corrupted {_average(table.corrupted[:, at])}")
    if not table.metrics:
        lines.append(f"clean {_average(table.clean)}, corrupted {_average(table.corrupted)}")
    if method := estimates.method_of(table):
        edges = "" if table.edges is None else f", of {int((~np.isnan(measures.mean(table.edges))).sum())} edges"
        lines.append(f"measured{edges}" if method == "exact" else f"estimated by {method}{edges}, not measured")
        if table.exact is not None:
            lines.append(str(estimates.verification(table)))
    run = table.run
    if run.gate:
        passes = f"{run.gate:.3g} forward pass{'es' * (run.gate != 1)} of a 4-token prompt"
        lines.append(f"what sites promise was measured first: {passes}")
    if run.executor:
        lines.append(f"{run.executor}, {run.seconds:.2f} s" + (f", {run.known} known without" if run.known else ""))
    return [*lines, run.note] if run.note else lines


def _whole(table: Table) -> set[str]:
    """The kinds of site whose cells change all tokens of a prompt at once; none in a sweep of weights."""
    if "align" not in table.asked:
        return set()
    split = {cell.component for cell in table.cells if (cell.position, cell.role, cell.set) != (None, None, None)}
    return {cell.component for cell in table.cells} - split


def _average(values: np.ndarray) -> str:
    if not len(values):
        return "nothing"
    return f"{values[0]:.4g}" if len(values) == 1 else f"{measures.mean(values):.4g} in the mean"
