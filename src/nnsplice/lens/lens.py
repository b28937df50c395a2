"""`Lens`: probabilities, ranks and top tokens of residual states."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from nnsplice import plots
from nnsplice.errors import BadArgument
from nnsplice.paths import Path
from nnsplice.results import SweepResult
from nnsplice.results.figure import plane
from nnsplice.results.kinds import kind_named
from nnsplice.results.labelled import array
from nnsplice.results.wording import visible

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

#: The metric without answers.
TOP = "top probability"


@dataclass(frozen=True, eq=False, repr=False)
class Lens:
    """The logit lens of every cell: its state, decoded as if it were the output of the last layer.

    `grid()` is the probability of the answers, or of the top token where none were given; `tokens()` has a row for each
    of the top tokens of every cell.

    >>> lens = ns.lens.logit(model, "w3 w4 w5", "layers[:].output", answers="w7", k=2)
    >>> lens.grid().sizes
    Frozen({'prompt': 1, 'layer': 3, 'position': 3})
    >>> len(lens.tokens())
    18

    Attributes:
        results: all metrics, on an axis `metric`: the answers' `probability`, `log_probability` and `rank`.
        ids: `[prompt, cell, k]`, the top tokens; -1 where a prompt has no such cell.
        shares: `[prompt, cell, k]`, their probabilities.
        texts: the text of each token id.
    """

    results: SweepResult
    ids: np.ndarray
    shares: np.ndarray
    texts: Mapping[int, str]

    @property
    def result(self) -> SweepResult:
        """The probabilities, as the result of a sweep; `clean` is the model's own probability, `corrupted` 0."""
        return self.only(self.results.metrics[0])

    def only(self, metric: str) -> SweepResult:
        """The result of one metric.

        Args:
            metric: `"probability"`, `"log_probability"` or `"rank"`; without answers `"top probability"`.

        Returns:
            The result.

        Raises:
            BadArgument: no metric of this name was measured.
        """
        return self.results.only(metric)

    def grid(self, component: str | Path | None = None) -> xr.DataArray:
        """The probabilities with named axes; see `SweepResult.grid`.

        Args:
            component: the kind of site, if there are several.

        Returns:
            An `xarray.DataArray`.

        Raises:
            BadArgument: several kinds of site, and none is named.
            UnknownPath: a kind that was not read.
        """
        return self.result.grid(component)

    def frame(self) -> pd.DataFrame:
        """A row for each prompt and cell, with all metrics and the top token (`top`)."""
        frame = self.results.frame()
        at = {
            (prompt, cell.path): self.texts.get(int(self.ids[prompt, number, 0]), "")
            for number, cell in enumerate(self.results.cells)
            for prompt in range(len(self.ids))
        }
        return frame.assign(top=[at[key] for key in zip(frame["prompt"], frame["path"], strict=True)])

    def best(self, n: int = 10, *, prompt: int | None = None) -> pd.DataFrame:
        """The cells where the probability is largest, in the mean over prompts or in one; see `SweepResult.best`.

        Args:
            n: the number of cells.
            prompt: the number of one prompt, instead of all.

        Returns:
            A `pandas.DataFrame`, the largest first.

        Raises:
            BadArgument: no such prompt, or prompts of different lengths, whose positions cannot be averaged.
        """
        return self.result.best(n, prompt=prompt)

    def tokens(self) -> pd.DataFrame:
        """The top tokens of every cell: a row for each, with its rank, text and probability."""
        import pandas as pd

        prompts, cells, ranks = np.nonzero(self.ids >= 0)
        of = [self.results.cells[number] for number in cells]
        columns: dict[str, Any] = {"prompt": prompts, "layer": [cell.layer for cell in of]}
        columns["position"] = [cell.position for cell in of]
        columns["rank"] = ranks
        columns["token"] = [self.texts[int(one)] for one in self.ids[prompts, cells, ranks]]
        columns["id"] = self.ids[prompts, cells, ranks]
        columns["probability"] = self.shares[prompts, cells, ranks]
        columns["path"] = [cell.path for cell in of]
        return pd.DataFrame(columns)

    def plot(
        self, component: str | Path | None = None, *, prompt: int | None = None, ax: plots.Axes | None = None
    ) -> plots.Axes:
        """A heatmap of the probabilities, layer by token, with the top token of every cell written in it.

        With answers the colour is the answer's probability, whatever the top token is.

        Args:
            component: the kind of site, if there are several.
            prompt: the number of one prompt, instead of all. The mean over several has no tokens written in it.
            ax: axes to draw on; a new figure if left out.

        Returns:
            The axes; the figure is `axes.figure`.

        Raises:
            BadArgument: several kinds of site and none is named, no such prompt, or prompts of different lengths.
            UnknownPath: a kind that was not read.
        """
        table = self.result.table
        kind = kind_named(table.cells, component)
        one = 0 if prompt is None and len(self.ids) == 1 else prompt
        shown = plane(table, array(table, table.values, kind, self.result.metric), one)
        texts = None
        if one is not None:
            if isinstance(one, bool) or not -len(self.ids) <= one < len(self.ids):
                raise BadArgument(f"prompt={prompt}", expected=f"a number below {len(self.ids)}")
            numbers = np.broadcast_to(np.arange(len(table.cells), dtype=float), table.values.shape)
            at = plane(table, array(table, np.where(table.done, numbers, np.nan), kind, ""), one).values
            texts = [["" if np.isnan(n) else self._first(one, int(n)) for n in row] for row in at]
        which = "" if len(self.ids) == 1 else f", prompt {prompt}" if one is not None else ", mean over prompts"
        return plots.heatmap(
            shown.values,
            rows=shown.rows,
            columns=shown.columns,
            row_label=shown.row_label,
            column_label=shown.column_label,
            title=f"{self.results.asked.get('operation', 'lens')} at {kind}{which}",
            value_label="probability of the answer" if self.result.metric == "probability" else self.result.metric,
            texts=texts,
            ax=ax,
        )

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write the probabilities as a page of their own; see `SweepResult.to_html`.

        Args:
            path: the file to write.
        """
        self.result.to_html(path)

    def _first(self, prompt: int, cell: int) -> str:
        return visible(self.texts.get(int(self.ids[prompt, cell, 0]), ""))

    def __repr__(self) -> str:
        text = f"Lens: the first {self.ids.shape[2]} tokens of {self.ids.shape[1]} sites\n"
        return text + repr(self.result)

    def _repr_html_(self) -> str:
        return self.result._repr_html_()
