"""`SweepResult`: what a sweep measured, as a grid, a frame, a figure, a page and a file."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from nnsplice import plots
from nnsplice.errors import BadArgument, BadType, named
from nnsplice.paths import Path
from nnsplice.results import display, estimates, figure, files, labelled, measures, merging, page, several, uncertainty
from nnsplice.results.estimates import Verification
from nnsplice.results.kinds import kind_named, kinds_of
from nnsplice.results.roles import Roles, by_role
from nnsplice.results.table import Cell, Run, Table, settled
from nnsplice.shown import printable

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

#: What tokens are averaged by: their roles, or roles of one's own.
By = str | Roles | None


@dataclass(frozen=True, eq=False, repr=False)
class SweepResult:
    """The metric of every cell, with the two ends of its scale.

    `grid()` has named axes (`prompt`, `layer`, then `head`, `group`, `neuron` or `expert`, then `position` or `role`),
    `frame()` a row for each cell, `effect()` the share of the way from the corrupted to the clean run.

    >>> metric = ns.logit_diff("w7", "w8")
    >>> result = ns.sweep(model, "w3 w4 w5", "w3 w6 w5", "layers[:].output[:]", metric, progress=False)
    >>> result.grid().dims
    ('prompt', 'layer', 'position')
    >>> [str(text).strip() for text in result.grid().token.values]
    ['w3', 'w6', 'w5']
    >>> result.effect().sel(prompt=0, position=0).values.tolist()  # before the first token that differs
    [0.0, 0.0, 0.0]

    Two results are equal when the same was asked and the same measured, whatever it cost. A result does not change:
    its arrays are read-only.
    """

    table: Table

    def __post_init__(self) -> None:
        if not isinstance(self.table, Table):
            raise BadType(f"{named(self.table)} is no table of a sweep", expected="what ns.sweep returns")
        object.__setattr__(self, "table", settled(self.table))

    # --- what it is

    @property
    def clean(self) -> np.ndarray:
        """The metric of each prompt's clean run."""
        return self.table.clean

    @property
    def corrupted(self) -> np.ndarray:
        """The metric of each prompt's corrupted run: the one that was edited, without the edit."""
        return self.table.corrupted

    @property
    def total_effect(self) -> np.ndarray:
        """What the corruption costs: clean less corrupted, per prompt."""
        return measures.span(self.table)

    @property
    def run(self) -> Run:
        """What running cost, and which executor ran; no part of the result's identity."""
        return self.table.run

    @property
    def asked(self) -> Mapping[str, Any]:
        """What was asked: model, prompts, sites, metric, operation, seed."""
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
        """The names of the metrics, in the order in which they were asked for."""
        return self.table.metrics or (self.metric,)

    @property
    def metric(self) -> str:
        """The metric's name; of several, all of them."""
        if self.table.metrics:
            return ", ".join(self.table.metrics)
        told = self.table.asked.get("metric")
        return str((told.get("name") if isinstance(told, Mapping) else told) or "value")

    @property
    def components(self) -> tuple[str, ...]:
        """The kinds of place that were changed."""
        return kinds_of(self.cells)

    @property
    def method(self) -> str | None:
        """The method where the numbers are estimates, as `ns.attribute` makes them; None where they were measured."""
        return estimates.method_of(self.table)

    @property
    def verification(self) -> Verification:
        """What computing some of the estimated cells exactly has shown.

        Raises:
            BadArgument: none was.
        """
        return estimates.verification(self.table)

    @property
    def is_complete(self) -> bool:
        """Whether every cell that a prompt has was measured; a shard's are not."""
        return bool((self.table.done | ~self.table.exists).all())

    @cached_property
    def digest(self) -> str:
        """The identity of the result: what was asked and measured, timings left out."""
        return files.digest(self.table)

    def __eq__(self, other: object) -> bool:
        return self.digest == other.digest if isinstance(other, SweepResult) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.digest)

    # --- numbers

    def only(self, metric: str) -> SweepResult:
        """The result of one of several metrics, the same as if it had been asked for alone.

        >>> metrics = [ns.logit_diff("w7", "w8"), ns.probability("w7")]
        >>> result = ns.sweep(model, "w3 w4", "w5 w4", "layers[:].output[:]", metrics, progress=False)
        >>> result.grid().dims, result.metrics
        (('prompt', 'metric', 'layer', 'position'), ('logit_diff', 'probability'))
        >>> result.only("probability") == ns.sweep(
        ...     model, "w3 w4", "w5 w4", "layers[:].output[:]", metrics[1], progress=False
        ... )
        True
        """
        if metric not in self.metrics:
            raise BadArgument(f"no metric {metric!r} was measured", expected=f"one of {', '.join(self.metrics)}")
        return SweepResult(several.one(self.table, metric)) if self.table.metrics else self

    def grid(self, component: str | Path | None = None, *, by: By = None) -> xr.DataArray:
        """The raw metric with named axes, NaN where a cell was not measured.

        Positions are numbers (or the names of spans), and the tokens' texts ride along them as the coordinate `token`:
        by prompt and position, or by position alone where all prompts have the same.

        Args:
            component: which kind of place, where several were changed: `"layers[:].mlp.output"`, or any path to one of
                its places.
            by: `"role"` averages the tokens of each role, as `by_role()` does, so that prompts of different lengths
                have one grid; or the roles themselves, as `by_role` takes them.
        """
        return self._by(by)._array("value", component)

    def effect(self, component: str | Path | None = None, *, per_prompt: bool = False, by: By = None) -> xr.DataArray:
        """The share of the way back: 0 where nothing was gained on the corrupted run, 1 where the clean is reached.

        Each prompt's change is counted in the mean total effect of all prompts, so `.mean("prompt")` is the pooled
        share: differences are averaged, then divided. A prompt whose corruption costs nearly nothing counts for nearly
        nothing there.

        >>> metric = ns.logit_diff("w7", "w8")
        >>> result = ns.sweep(model, "w3 w4", "w5 w4", "layers[:].output[:]", metric, progress=False)
        >>> result.effect().sel(prompt=0, layer=2).values.round(3)   # after the last layer only the last token is read
        array([0., 1.])

        Args:
            component: which kind of place, where several were changed.
            per_prompt: each prompt's share of its own total effect instead; a warning names the prompts where that is
                so small that their ratios are mostly noise.
            by: `"role"`, or roles, as for `grid`.
        """
        self._warn(own=per_prompt)
        return self._by(by)._array("share" if per_prompt else "effect", component)

    def change(self, component: str | Path | None = None, *, by: By = None) -> xr.DataArray:
        """How far the metric moved from the corrupted run's: what an ablation asks.

        Args:
            component: which kind of place, where several were changed.
            by: `"role"`, or roles, as for `grid`.
        """
        return self._by(by)._array("change", component)

    def frame(self) -> pd.DataFrame:
        """A row for each prompt and cell that was measured, with the ends of its scale as columns.

        The column `effect` is counted as in `effect()`: its mean over the prompts of a cell is the pooled share.

        >>> metric = ns.logit_diff("w7", "w8")
        >>> result = ns.sweep(model, "w3 w4", "w5 w4", "layers[2].output[:]", metric, progress=False)
        >>> result.frame()[["prompt", "layer", "position", "token", "path"]]
           prompt  layer  position token                 path
        0       0      2         0    w5  layers[2].output[0]
        1       0      2         1    w4  layers[2].output[1]
        """
        return several.frames(self.table, labelled.frame) if self.table.metrics else labelled.frame(self.table)

    def best(self, n: int = 10, *, prompt: int | None = None) -> pd.DataFrame:
        """The cells that matter most, shown with their sign: by the size of their effect.

        The effect is pooled over prompts: differences are averaged, then divided. Where clean and corrupted runs are
        the same, as in an ablation, the change of the metric stands for it.

        >>> metric = ns.logit_diff("w7", "w8")
        >>> pairs = ["w3 w4", "w3 w9"], ["w5 w4", "w5 w9"]
        >>> result = ns.sweep(model, *pairs, "layers[:].output[:]", metric, progress=False)
        >>> result.best(1)["path"].tolist(), result.best(1)["effect"].round(3).tolist()
        (['layers[2].output[1]'], [1.0])

        Args:
            prompt: of one prompt alone.

        Raises:
            BadArgument: the prompts have different lengths, so that a mean would mix unlike positions.
        """
        several.check_one(self.table, "best")
        labelled.check_prompt(self.table, prompt)
        if not self._is_flat:
            self._warn(own=prompt is not None, prompt=prompt)
        return labelled.best(self.table, n, prompt)

    def by_role(self, roles: Roles | None = None) -> SweepResult:
        """The same result by what the tokens are in their prompts, so that prompts of any length can be averaged.

        By itself, from the span `"subject"`: `subject first`, `subject middle`, `subject last`, `first after`,
        `further` and `last`, and every other span by its name. Of several tokens of a role the mean
        is taken in each prompt; the column `n` of `frame()` counts them.

        >>> prompts, subjects = ["w3 w4 w5 w6", "w3 w4 w6 w7 w9"], ["w4 w5", "w4"]
        >>> traced = ns.causal_trace(model, prompts, subjects, samples=2, progress=False).by_role()
        >>> traced.grid().role.values.tolist()
        ['subject first', 'subject last', 'first after', 'further', 'last']

        Args:
            roles: names of one's own with their tokens: a token for all prompts, `{"last": -1}`, tokens for each,
                `{"verb": [[3], [4, 5]]}`, or a span that the sweep was given, `{"end": "subject[-1]"}`.

        Raises:
            SpanError: nobody said where the subjects stand.
        """
        return SweepResult(by_role(self.table, roles))

    # --- how sure the averages are

    def ci(
        self, level: float = 0.95, component: str | Path | None = None, *, draws: int = 2000, seed: int = 0
    ) -> xr.DataArray:
        """The interval of every pooled effect, by a bootstrap over prompts; of the mean change where there is none.

        Prompts are drawn with replacement, each with all its cells, and the ends are the percentiles of what comes out;
        an axis `end` has `"low"` and `"high"`. It is NaN where fewer than two prompts have a cell.

        >>> pairs = ["w3 w4", "w3 w9", "w3 w11"], ["w5 w4", "w6 w9", "w7 w11"]
        >>> result = ns.sweep(model, *pairs, "layers[:].output[0]", ns.logit_diff("w7", "w8"), progress=False)
        >>> result.ci(0.9).sizes
        Frozen({'layer': 3, 'position': 1, 'end': 2})

        Args:
            level: the share of draws inside.
            component: which kind of place, where several were changed.
            draws: how many.
            seed: of the draws.
        """
        several.check_one(self.table, "ci")
        ends = uncertainty.interval(self.table, level, draws, seed)
        import xarray as xr

        both = [self._of_cells(ends[:, n], component) for n in (0, 1)]
        return xr.concat(both, "end").assign_coords(end=["low", "high"]).transpose(..., "end").rename("ci")

    def pvalue(self, component: str | Path | None = None, *, draws: int = 10_000, seed: int = 0) -> xr.DataArray:
        """Of every cell, how likely its mean change is where the cell does nothing: by flipping signs of prompts.

        Two-sided. All patterns of up to twelve prompts are tried, else so many are drawn. With thousands of cells some
        are small by chance; no correction for that is made.

        >>> pairs = ["w3 w4", "w3 w9", "w3 w11"], ["w5 w4", "w6 w9", "w7 w11"]
        >>> result = ns.sweep(model, *pairs, "layers[:].output[0]", ns.logit_diff("w7", "w8"), progress=False)
        >>> float(result.pvalue().min()) >= 2 / 2**3       # three prompts cannot say more
        True
        """
        several.check_one(self.table, "pvalue")
        return self._of_cells(uncertainty.pvalues(self.table, draws, seed), component).rename("p")

    def stability(self, k: int = 10, *, draws: int = 1000, seed: int = 0) -> float:
        """How much of `best(k)` comes again with other prompts: 1 is all of it, in every draw.

        Prompts are drawn with replacement; of each draw's first k cells and those of all prompts, the share of both
        among either (Jaccard), in the mean.

        >>> pairs = ["w3 w4", "w3 w9", "w3 w11"], ["w5 w4", "w6 w9", "w7 w11"]
        >>> result = ns.sweep(model, *pairs, "layers[:].output[0]", ns.logit_diff("w7", "w8"), progress=False)
        >>> 0.0 <= result.stability(1) <= 1.0
        True
        """
        several.check_one(self.table, "stability")
        return uncertainty.stability(self.table, k, draws, seed)

    def edges(self, prompt: int | None = None) -> pd.DataFrame:
        """A row for each edge that `"eap"` scored, the largest first: sender, receiver, score.

        A score is how far the metric moves when the sender's change reaches this receiver alone: the mean over the
        prompts, or of one of them.

        Raises:
            BadArgument: this result has no edges.
        """
        return estimates.edges(self.table, prompt)

    # --- to look at

    def plot(
        self,
        component: str | Path | None = None,
        *,
        prompt: int | None = None,
        of: str | None = None,
        by: By = None,
        ax: plots.Axes | None = None,
    ) -> plots.Axes:
        """A heatmap: layer by token, or layer by head, pooled over prompts unless one is chosen; bars of one column.

        Args:
            component: which kind of place, where several were changed.
            prompt: its number.
            of: `"effect"`, `"value"` or `"change"`; the effect where there is one.
            by: `"role"` shows roles in the place of tokens, which prompts of different lengths have in common; or the
                roles themselves, as `by_role` takes them.
            ax: axes to draw on; a new figure when left out.
        """
        if by is not None:
            return self._by(by).plot(component, prompt=prompt, of=of, ax=ax)
        several.check_one(self.table, "plot")
        chosen = of or self.shown
        if chosen not in ("effect", "value", "change"):
            raise BadArgument(f"of={of!r}", expected='"effect", "value" or "change"')
        labelled.check_prompt(self.table, prompt)
        if chosen == "effect":
            self._warn(own=prompt is not None, prompt=prompt)
        own = chosen == "effect" and prompt is not None
        array = self._array("share" if own else chosen, component)
        return figure.draw(self.table, array, chosen, prompt, self.metric, self.method, ax)

    @property
    def shown(self) -> str:
        """What a figure shows by itself: `"effect"`, or `"change"` where no prompt has one."""
        return measures.shown(self.table)

    def to_html(
        self,
        path: str | os.PathLike[str],
        *,
        patterns: Any = None,
        tokens: Mapping[str, Sequence[Sequence[str]]] | None = None,
    ) -> None:
        """Write a page that stands by itself: pointing at a cell shows its address, token and numbers.

        Args:
            patterns: a capture of `"layers[:].heads[:].pattern[:]"`: a click on a head shows how it attends.
            tokens: what the model says at a cell: its path -> for each prompt some tokens, the likeliest first; they
                are shown beside the cell's numbers.

        Raises:
            BadArgument: patterns of no head, or tokens of no cell.
        """
        page.write(path, self.table, self.metric, patterns=patterns, tokens=tokens)

    # --- files and shards

    def to_file(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, whole or not at all."""
        files.write(path, self.table)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> SweepResult:
        """Read a result; its numbers are the same to the bit.

        Raises:
            FileError: the file is no result, or damaged.
        """
        return cls(files.read(path))

    @classmethod
    def merge(cls, results: Iterable[SweepResult]) -> SweepResult:
        """The shards of one sweep as one result.

        >>> plan = ns.plan_sweep(model, "w3 w4", "w5 w4", "layers[:].output[:]", ns.logit_diff("w7", "w8"))
        >>> parts = [ns.run(plan.shard(i, 2), model, progress=False) for i in range(2)]   # on two machines
        >>> [part.is_complete for part in parts], ns.SweepResult.merge(parts).is_complete
        ([False, False], True)

        Raises:
            KeyMismatch: they are of different sweeps, or differ where they overlap.
        """
        if isinstance(results, SweepResult):
            raise BadType("merge takes a list of results", write="SweepResult.merge([first, second])")
        return cls(merging.merge([result.table for result in results]))

    def __repr__(self) -> str:
        return printable(display.text(self.table, self.metric))

    def _repr_html_(self) -> str:
        return display.html(self.table, self.metric)

    # --- inside

    def _by(self, by: By) -> SweepResult:
        if by is None:
            return self
        if isinstance(by, str) and by != "role":
            raise BadArgument(f"by={by!r}", expected='"role", or roles: {"last": -1}')
        return self.by_role(None if isinstance(by, str) else by)

    def _array(self, of: str, component: str | Path | None) -> xr.DataArray:
        kind = kind_named(self.cells, component)
        if self.table.metrics:
            whole = several.arrays(self.table, lambda table: SweepResult(table)._array(of, kind))
            return whole.assign_attrs(component=kind).rename("effect" if of == "share" else of)
        if of == "value":
            return labelled.array(self.table, self.table.values, kind, self.metric)
        if of in ("effect", "share"):
            shares = measures.effect(self.table) if of == "effect" else measures.share(self.table)
            return labelled.array(self.table, shares, kind, "effect")
        return labelled.array(self.table, measures.change(self.table), kind, f"change of {self.metric}")

    def _of_cells(self, values: np.ndarray, component: str | Path | None) -> xr.DataArray:
        """A number for each cell, on the axes of a grid without prompts."""
        whole = np.broadcast_to(values, self.table.values.shape)
        array = labelled.array(self.table, whole, kind_named(self.cells, component), "")
        if "token" in array.coords and "prompt" in array.coords["token"].dims:
            array = array.drop_vars("token")  # each prompt has tokens of its own
        return array.isel(prompt=0, drop=True)

    @property
    def _is_flat(self) -> bool:
        return bool(measures.spanless(self.table).all())

    def _warn(self, *, own: bool, prompt: int | None = None) -> None:
        for name in self.metrics:
            table = several.one(self.table, name) if self.table.metrics else self.table
            for doubt in measures.doubts(table, name, own=own, prompt=prompt):
                warnings.warn(doubt, stacklevel=3)
