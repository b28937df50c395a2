"""`SweepResult`: what a sweep measured, as a grid, a frame, a figure, a page and a file."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from nnsplice import plots
from nnsplice.errors import BadArgument, BadType, named
from nnsplice.paths import Path
from nnsplice.results import (
    display,
    estimates,
    figure,
    files,
    labelled,
    measures,
    merging,
    page,
    pairs,
    parquet,
    several,
    uncertainty,
    zarr_files,
)
from nnsplice.results.estimates import Verification
from nnsplice.results.kinds import kinds_of
from nnsplice.results.labelled import By
from nnsplice.results.roles import Roles, by_role
from nnsplice.results.table import Cell, Run, Table, settled
from nnsplice.shown import printable
from nnsplice.warn import warn_caller

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr


@dataclass(frozen=True, eq=False, repr=False)
class SweepResult:
    """The metric of every cell of a sweep, with the metric of the clean and the corrupted run.

    `grid()` has named axes (`prompt`, `layer`, then `head`, `group`, `neuron` or `expert`, then `position` or `role`),
    `frame()` has a row for each cell, and `effect()` is the share of the way from the corrupted to the clean metric.

    >>> metric = ns.logit_diff("w7", "w8")
    >>> result = ns.sweep(model, "w3 w4 w5", "w3 w6 w5", "layers[:].output[:]", metric, progress=False)
    >>> result.grid().dims
    ('prompt', 'layer', 'position')
    >>> [str(text).strip() for text in result.grid().token.values]
    ['w3', 'w6', 'w5']
    >>> result.effect().sel(prompt=0, position=0).values.tolist()  # before the first token that differs
    [0.0, 0.0, 0.0]

    Two results are equal if question and values are equal, whatever the run cost. Their arrays are read-only.

    Attributes:
        table: the arrays behind the properties and methods below.
    """

    table: Table

    def __post_init__(self) -> None:
        if not isinstance(self.table, Table):
            raise BadType(f"{named(self.table)} is no table of a sweep", expected="what ns.sweep returns")
        object.__setattr__(self, "table", settled(self.table))

    # --- content

    @property
    def clean(self) -> np.ndarray:
        """The metric of each prompt's clean run."""
        return self.table.clean

    @property
    def corrupted(self) -> np.ndarray:
        """The metric of each prompt's corrupted run, without any edit."""
        return self.table.corrupted

    @property
    def total_effect(self) -> np.ndarray:
        """The clean metric minus the corrupted one, for each prompt."""
        return measures.span(self.table)

    @property
    def rest(self) -> np.ndarray:
        """The part of the metric that belongs to no cell, per prompt; all cells and it add up to the metric."""
        return labelled.rest(self.table)

    @property
    def run(self) -> Run:
        """The executor and the cost of the run; not compared by `==`."""
        return self.table.run

    @property
    def asked(self) -> Mapping[str, Any]:
        """The question as plain data: model, prompts, sites, metric, operation, seed."""
        return copy.deepcopy(dict(self.table.asked))

    @property
    def cells(self) -> tuple[Cell, ...]:
        """Every cell, in execution order."""
        return self.table.cells

    @property
    def tokens(self) -> tuple[tuple[str, ...], ...]:
        """The texts of each edited prompt's tokens."""
        return self.table.tokens

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of the metrics, if several were given."""
        return self.table.metrics or (self.metric,)

    @property
    def metric(self) -> str:
        """The name of the metric; of several, all names."""
        return labelled.metric_name(self.table)

    @property
    def components(self) -> tuple[str, ...]:
        """The kinds of site, such as `layers[:].heads[:].output`."""
        return kinds_of(self.cells)

    @property
    def method(self) -> str | None:
        """The method of estimated results (`ns.attribute`); None for measured ones."""
        return estimates.method_of(self.table)

    @property
    def verification(self) -> Verification:
        """The comparison of estimated cells with exact ones."""
        return estimates.verification(self.table)

    @property
    def is_complete(self) -> bool:
        """Whether every cell has a value; False for the result of a shard."""
        return bool((self.table.done | ~self.table.exists).all())

    @cached_property
    def digest(self) -> str:
        """A hash of question and values, without timings."""
        return files.digest(self.table)

    def __eq__(self, other: object) -> bool:
        return self.digest == other.digest if isinstance(other, SweepResult) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.digest)

    # --- numbers

    def only(self, metric: str) -> SweepResult:
        """The result of one of several metrics.

        >>> metrics = [ns.logit_diff("w7", "w8"), ns.probability("w7")]
        >>> result = ns.sweep(model, "w3 w4", "w5 w4", "layers[:].output[:]", metrics, progress=False)
        >>> result.grid().dims, result.metrics
        (('prompt', 'metric', 'layer', 'position'), ('logit_diff', 'probability'))
        >>> result.only("probability").grid().dims
        ('prompt', 'layer', 'position')

        Args:
            metric: the name of the metric.

        Raises:
            BadArgument: no metric of this name was measured.
        """
        if metric not in self.metrics:
            raise BadArgument(f"no metric {metric!r} was measured", expected=f"one of {', '.join(self.metrics)}")
        return SweepResult(several.one(self.table, metric)) if self.table.metrics else self

    def grid(self, component: str | Path | None = None, *, by: By = None) -> xr.DataArray:
        """The metric as an array with named axes, NaN where a cell was not measured.

        Positions are numbers, or names of spans; the coordinate `token` has the texts of the tokens.

        Args:
            component: the kind of site, if there are several: `"layers[:].mlp.output"`, or any path to such a site.
            by: `"role"` averages the tokens of each role, as `by_role()` does; or roles as `by_role` takes them.

        Raises:
            BadArgument: several kinds of site, and none is named.
            UnknownPath: a kind that was not swept.
        """
        return labelled.grid(self.table, "value", component, by)

    def effect(self, component: str | Path | None = None, *, per_prompt: bool = False, by: By = None) -> xr.DataArray:
        """The normalized effect: 0 at the corrupted metric, 1 at the clean one.

        Changes are divided by the mean total effect of all prompts, so `.mean("prompt")` is the pooled effect.

        >>> metric = ns.logit_diff("w7", "w8")
        >>> result = ns.sweep(model, "w3 w4", "w5 w4", "layers[:].output[:]", metric, progress=False)
        >>> result.effect().sel(prompt=0, layer=2).values.round(3)   # after the last layer only the last token is read
        array([0., 1.])

        Args:
            component: the kind of site, if there are several.
            per_prompt: divide by each prompt's own total effect; a warning names prompts where it is very small.
            by: `"role"`, or roles, as for `grid`.
        """
        self._warn(own=per_prompt)
        return labelled.grid(self.table, "share" if per_prompt else "effect", component, by)

    def change(self, component: str | Path | None = None, *, by: By = None) -> xr.DataArray:
        """The metric minus that of the corrupted run, for ablations.

        Args:
            component: the kind of site, if there are several.
            by: `"role"`, or roles, as for `grid`.
        """
        return labelled.grid(self.table, "change", component, by)

    def frame(self) -> pd.DataFrame:
        """A table with a row for each measured cell of each prompt.

        The column `effect` is that of `effect()`, so its mean over prompts is the pooled effect.

        >>> metric = ns.logit_diff("w7", "w8")
        >>> result = ns.sweep(model, "w3 w4", "w5 w4", "layers[2].output[:]", metric, progress=False)
        >>> result.frame()[["prompt", "layer", "position", "token", "path"]]
           prompt  layer  position token                 path
        0       0      2         0    w5  layers[2].output[0]
        1       0      2         1    w4  layers[2].output[1]
        """
        found = several.frames(self.table, labelled.frame) if self.table.metrics else labelled.frame(self.table)
        return pairs.named(self.table, found) if pairs.are_pairs(self.table) else found

    def frames(self) -> Iterator[pd.DataFrame]:
        """`frame()` one prompt at a time, for results that do not fit into memory together."""
        by_metric = several.frames_of_prompts(self.table, labelled.frames) if self.table.metrics else None
        for found in by_metric or labelled.frames(self.table):
            yield pairs.named(self.table, found) if pairs.are_pairs(self.table) else found

    def best(self, n: int = 10, *, prompt: int | None = None) -> pd.DataFrame:
        """The cells with the largest absolute effects, largest first, pooled over prompts.

        For ablations, where the clean and the corrupted run are the same, the change of the metric is used instead.

        >>> metric = ns.logit_diff("w7", "w8")
        >>> pairs = ["w3 w4", "w3 w9"], ["w5 w4", "w5 w9"]
        >>> result = ns.sweep(model, *pairs, "layers[:].output[:]", metric, progress=False)
        >>> result.best(1)["path"].tolist(), result.best(1)["effect"].round(3).tolist()
        (['layers[2].output[1]'], [1.0])

        Args:
            n: the number of cells.
            prompt: the number of one prompt, instead of all.
        """
        several.check_one(self.table, "best")
        prompt = labelled.row_of(self.table, prompt)
        if not measures.spanless(self.table).all():
            self._warn(own=prompt is not None, prompt=prompt)
        return labelled.best(self.table, n, prompt)

    def by_role(self, roles: Roles | None = None) -> SweepResult:
        """Average over the roles of tokens, for prompts of different lengths.

        The default roles come from the span `"subject"`: `subject first`, `subject middle`, `subject last`, `first
        after`, `further` and `last`; every other span is a role of its name. A role of several tokens is averaged
        within each prompt; the column `n` of `frame()` counts them.

        >>> prompts, subjects = ["w3 w4 w5 w6", "w3 w4 w6 w7 w9"], ["w4 w5", "w4"]
        >>> traced = ns.causal_trace(model, prompts, subjects, samples=2, progress=False).by_role()
        >>> traced.grid().role.values.tolist()
        ['subject first', 'subject last', 'first after', 'further', 'last']

        Args:
            roles: roles by name: a token for all prompts, `{"last": -1}`; tokens for each, `{"verb": [[3], [4, 5]]}`;
                or a span of the sweep, `{"end": "subject[-1]"}`.

        Raises:
            SpanError: the sweep had no span `"subject"`.
        """
        return SweepResult(by_role(self.table, roles))

    # --- uncertainty

    def ci(
        self, level: float = 0.95, component: str | Path | None = None, *, draws: int = 2000, seed: int = 0
    ) -> xr.DataArray:
        """Bootstrap confidence intervals over prompts, of the pooled effect (or of the mean change, for ablations).

        The ends are percentiles, on an axis `end` (`"low"`, `"high"`); NaN where fewer than two prompts have a cell.

        Args:
            level: the confidence level.
            component: the kind of site, if there are several.
            draws: the number of bootstrap samples.
            seed: the seed of the samples.
        """
        several.check_one(self.table, "ci")
        return labelled.intervals(self.table, uncertainty.interval(self.table, level, draws, seed), component)

    def pvalue(self, component: str | Path | None = None, *, draws: int = 10_000, seed: int = 0) -> xr.DataArray:
        """Two-sided p-values of each cell's mean change, by sign flips of prompts.

        For more than twelve prompts the sign patterns are random. The number of cells is not corrected for.

        Args:
            component: the kind of site, if there are several.
            draws: the number of random sign patterns.
            seed: the seed of the patterns.
        """
        several.check_one(self.table, "pvalue")
        return labelled.by_cell(self.table, uncertainty.pvalues(self.table, draws, seed), component).rename("p")

    def stability(self, k: int = 10, *, draws: int = 1000, seed: int = 0) -> float:
        """The stability of `best(k)`: its mean Jaccard index with that of bootstrap samples of prompts, 0 to 1.

        Args:
            k: the number of cells.
            draws: the number of bootstrap samples.
            seed: the seed of the samples.
        """
        several.check_one(self.table, "stability")
        return uncertainty.stability(self.table, k, draws, seed)

    def edges(self, prompt: int | None = None) -> pd.DataFrame:
        """The scored edges, largest first: the change of the metric if the sender's change reaches this receiver only.

        Args:
            prompt: the number of one prompt, instead of the mean.
        """
        return estimates.edges(self.table, labelled.row_of(self.table, prompt))

    # --- figures and pages

    def plot(
        self,
        component: str | Path | None = None,
        *,
        prompt: int | None = None,
        of: str | None = None,
        by: By = None,
        ax: plots.Axes | None = None,
    ) -> plots.Axes:
        """Draw a heatmap of layers by tokens or heads, pooled over prompts; one column is drawn as bars.

        For `ns.interactions`: a square of sites by sites, sufficiency above the diagonal and necessity below.

        Args:
            component: the kind of site, if there are several.
            prompt: the number of one prompt, instead of all.
            of: `"effect"`, `"value"` or `"change"`; the effect where there is one.
            by: `"role"`, or roles, as for `grid`.
            ax: axes to draw on; a new figure if left out.
        """
        if by is not None:
            return SweepResult(labelled.averaged(self.table, by)).plot(component, prompt=prompt, of=of, ax=ax)
        if pairs.are_pairs(self.table):
            return pairs.draw(self.table, prompt, of, ax)
        several.check_one(self.table, "plot")
        chosen = of or self.shown
        if chosen not in ("effect", "value", "change"):
            raise BadArgument(f"of={of!r}", expected='"effect", "value" or "change"')
        prompt = labelled.row_of(self.table, prompt)
        if chosen == "effect":
            self._warn(own=prompt is not None, prompt=prompt)
        own = chosen == "effect" and prompt is not None
        array = labelled.grid(self.table, "share" if own else chosen, component)
        return figure.draw(self.table, array, chosen, prompt, self.metric, self.method, ax)

    @property
    def shown(self) -> str:
        """The quantity that a figure shows by default: `"effect"`, or `"change"` where no prompt has a total effect."""
        return measures.shown(self.table)

    def to_html(
        self,
        path: str | os.PathLike[str],
        *,
        patterns: Any = None,
        tokens: Mapping[str, Sequence[Sequence[str]]] | None = None,
    ) -> None:
        """Write a self-contained HTML page; hovering over a cell shows its address, token and numbers.

        Args:
            path: the file to write.
            patterns: a capture of `"layers[:].heads[:].pattern[:]"`: a click on a head shows its attention pattern.
            tokens: path of a cell -> for each prompt the likeliest tokens there, shown with its numbers.
        """
        page.write(path, self.table, self.metric, patterns=patterns, tokens=tokens)

    # --- files and shards

    def to_file(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, completely or not at all.

        Args:
            path: the file to write.
        """
        files.write(path, self.table)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> SweepResult:
        """Read a result of `to_file`; the numbers are bit for bit the same.

        Args:
            path: the file.

        Raises:
            FileError: the file is not a result, or is damaged.
        """
        return cls(files.read(path))

    def to_zarr(self, path: str | os.PathLike[str]) -> None:
        """Write a Zarr store (v3) with a chunk for each prompt, for many millions of cells; needs the extra `zarr`.

        Args:
            path: a new folder.
        """
        zarr_files.write(path, self.table)

    @classmethod
    def from_zarr(cls, path: str | os.PathLike[str]) -> SweepResult:
        """Read a whole store of `to_zarr`.

        Args:
            path: the store.
        """
        return cls(zarr_files.read(path))

    @staticmethod
    def open_zarr(path: str | os.PathLike[str]) -> xr.Dataset:
        """Open a store without reading its numbers; coordinates of the axis `cell` are `path`, `layer`, `head`, ...

        Args:
            path: the store.
        """
        return zarr_files.lazy(path)

    def to_parquet(self, path: str | os.PathLike[str]) -> None:
        """Write the rows of `frame()`, a group of rows for each prompt. Needs the extra `parquet`.

        Args:
            path: the file.
        """
        parquet.write(path, self.frames())

    @classmethod
    def merge(cls, results: Iterable[SweepResult]) -> SweepResult:
        """Merge results of parts of one plan: shards, and parts with prompts of their own.

        Missing cells are not done, missing prompts are left out, and the others keep their numbers.

        >>> plan = ns.plan_sweep(model, "w3 w4", "w5 w4", "layers[:].output[:]", ns.logit_diff("w7", "w8"))
        >>> parts = [ns.run(plan.shard(i, 2), model, progress=False) for i in range(2)]   # on two machines
        >>> [part.is_complete for part in parts], ns.SweepResult.merge(parts).is_complete
        ([False, False], True)

        Args:
            results: the results.

        Raises:
            KeyMismatch: results of different sweeps, or with different values of a cell.
        """
        if isinstance(results, SweepResult):
            raise BadType("merge takes a list of results", write="SweepResult.merge([first, second])")
        return cls(merging.merge([result.table for result in results]))

    def __repr__(self) -> str:
        return printable(display.text(self.table, self.metric))

    def _repr_html_(self) -> str:
        return display.html(self.table, self.metric)

    def _warn(self, *, own: bool, prompt: int | None = None) -> None:
        for name in self.metrics:
            table = several.one(self.table, name) if self.table.metrics else self.table
            for doubt in measures.doubts(table, name, own=own, prompt=prompt):
                warn_caller(doubt)
