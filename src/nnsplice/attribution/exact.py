"""`exact`: every edge measured by path patching."""

from __future__ import annotations

from dataclasses import replace
from os import PathLike

import numpy as np

from nnsplice import engine
from nnsplice.attribution.edges import EdgeGraph
from nnsplice.attribution.path_patching import run_paths
from nnsplice.attribution.verifying import of_edges
from nnsplice.errors import BadArgument
from nnsplice.results import SweepResult
from nnsplice.sweeps.plan import Plan


def measured(
    model: engine.Model,
    plan: Plan,
    graph: EdgeGraph,
    *,
    max_tokens: int | None,
    journal: str | PathLike[str] | None,
    progress: bool,
) -> SweepResult:
    """Every edge of a plan's senders: the effect of one sender's change that reaches one receiver only."""
    joined = graph.joined(plan).numpy()
    cells, receivers = np.nonzero(joined)
    if not len(cells):
        raise BadArgument("there is no edge to measure", expected="senders that run before the receivers")
    pairs = [graph.receivers[number] for number in receivers]
    found = run_paths(
        model, of_edges(plan, cells), pairs, max_tokens=max_tokens, journal=journal, progress=progress
    ).table
    exists = plan.exists()
    edges = np.full((*exists.shape, len(graph.receivers)), np.nan)
    edges[:, cells, receivers] = found.values - found.corrupted[:, None]
    edges[~exists] = np.nan
    values = found.corrupted[:, None] + np.nansum(edges, -1)
    return SweepResult(
        replace(
            found,
            cells=tuple(target.cell for target in plan.targets),
            values=values,
            done=exists,
            exists=exists,
            asked=plan.asked,
            edges=edges,
            receivers=graph.receivers,
        )
    )
