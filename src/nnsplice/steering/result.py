"""`SteeringSweep`: the measurements of a sweep, and the choice of a cell."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from nnsplice import plots
from nnsplice.errors import BadArgument
from nnsplice.results import array_files
from nnsplice.shown import counted, printable
from nnsplice.steering import sweep_figures

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

_ARRAYS = ("values", "kl", "baseline")


@dataclass(frozen=True, slots=True)
class Choice:
    """One cell of a steering sweep.

    Attributes:
        path: the site.
        layer: the layer.
        coefficient: the coefficient.
        score: the mean metric over prompts.
        baseline: the mean metric without steering.
        kl: the mean KL divergence from the unsteered run.
    """

    path: str
    layer: int
    coefficient: float
    score: float
    baseline: float
    kl: float


# No SweepResult: that has a clean and a corrupted run as the ends of its scale, and effects as shares of their
# difference. A steering sweep has one unsteered run, a coefficient axis, and a KL divergence beside each value.
@dataclass(frozen=True, eq=False, repr=False)
class SteeringSweep:
    """The metric and the KL divergence of each prompt, layer and coefficient of `ns.steering.sweep`.

    >>> toy = ns.load("toy")
    >>> reviews = [review for review in ns.models.toy_prompts().reviews if review.mood == "good"][:20]
    >>> good, bad = [review.text for review in reviews], [review.opposite for review in reviews]
    >>> vector = ns.steering.fit_from_prompts(toy, good, bad, "layers[1:4].output[-1]")
    >>> mood = ns.logit_diff("great", "awful")
    >>> grid = ns.steering.sweep(toy, bad[:4], vector, [0.25, 0.5, 1.0], mood, progress=False)
    >>> grid
    SteeringSweep: 36 cells, 4 prompts, logit_diff
      3 layers [1, 2, 3], 3 coefficients [0.25, 0.5, 1.0], operator add, where all
      unsteered -7.945, highest 6.156 at layer 3, coefficient 1 with KL 5.92
    >>> best = grid.choose(guard="kl", limit=2.0)   # the largest effect within this KL divergence
    >>> best.layer, best.coefficient
    (1, 0.5)

    Attributes:
        paths: the site of each layer.
        layers: the layers.
        coefficients: the coefficients.
        values: the metric, `[prompt, layer, coefficient]`.
        kl: the KL divergence from the unsteered run, `[prompt, layer, coefficient]`.
        baseline: the metric without steering, `[prompt]`.
        prompts: the prompts, if they were texts.
        metric: the name of the metric.
        asked: model, operator and choice of tokens.
        texts: the generated texts, `[prompt][layer][coefficient]`.
    """

    paths: tuple[str, ...]
    layers: tuple[int, ...]
    coefficients: tuple[float, ...]
    values: np.ndarray
    kl: np.ndarray
    baseline: np.ndarray
    prompts: tuple[str, ...] = ()
    metric: str = "value"
    asked: Mapping[str, Any] = field(default_factory=dict)
    texts: tuple[tuple[tuple[str, ...], ...], ...] = ()

    def __post_init__(self) -> None:
        shape = (len(self.baseline), len(self.layers), len(self.coefficients))
        for name, array in (("values", self.values), ("kl", self.kl)):
            if array.shape != shape:
                raise BadArgument(f"{name} of shape {list(array.shape)}", expected=f"{list(shape)}")
        for name in _ARRAYS:
            fixed = np.array(getattr(self, name), dtype=np.float64)
            fixed.setflags(write=False)
            object.__setattr__(self, name, fixed)

    # --- numbers

    def grid(self, of: str = "value") -> xr.DataArray:
        """The numbers as an array with named axes.

        Args:
            of: `"value"`, `"change"` (from the unsteered run) or `"kl"`.
        """
        import xarray as xr

        coordinates = {"prompt": np.arange(len(self.baseline)), "layer": list(self.layers)}
        return xr.DataArray(
            self._array(of), dims=("prompt", "layer", "coefficient"),
            coords={**coordinates, "coefficient": list(self.coefficients)}, name=of,
        )  # fmt: skip

    def frame(self) -> pd.DataFrame:
        """A table with a row for each prompt, layer and coefficient."""
        import pandas as pd

        prompt, layer, coefficient = (index.ravel() for index in np.indices(self.values.shape))
        found = {
            "prompt": prompt, "layer": np.array(self.layers)[layer], "path": [self.paths[n] for n in layer],
            "coefficient": np.array(self.coefficients)[coefficient], "value": self.values.ravel(),
            "change": self._array("change").ravel(), "kl": self.kl.ravel(),
        }  # fmt: skip
        if self.texts:
            found["text"] = [text for rows in self.texts for row in rows for text in row]
        return pd.DataFrame(found)

    def best(self, n: int = 10, *, want: str = "high") -> pd.DataFrame:
        """The cells with the highest (or lowest) mean metric.

        Args:
            n: the number of cells.
            want: `"high"` or `"low"`.

        Raises:
            BadArgument: `n` below 1.
        """
        import pandas as pd

        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise BadArgument(f"best({n!r})", expected="how many cells to show, at least 1")
        layer, coefficient = (index.ravel() for index in np.indices(self.values.shape[1:]))
        means = {of: self._array(of).mean(0).ravel() for of in ("value", "change", "kl")}
        order = np.argsort(means["value"] if _is_low(want) else -means["value"], kind="stable")[:n]
        columns: dict[str, Any] = {
            "layer": np.array(self.layers)[layer], "path": np.array(self.paths)[layer],
            "coefficient": np.array(self.coefficients)[coefficient], **means,
        }  # fmt: skip
        return pd.DataFrame({name: column[order] for name, column in columns.items()})

    def choose(self, *, guard: str | None = "kl", limit: float | None = None, want: str = "high") -> Choice:
        """The cell with the highest (or lowest) mean metric within a limit of the KL divergence.

        >>> import numpy as np
        >>> gains, costs = np.array([[[0.5, 3.0]]]), np.array([[[0.1, 2.0]]])   # of one prompt, one layer
        >>> grid = ns.steering.SteeringSweep(("layers[2].output",), (2,), (1.0, 4.0), gains, costs, np.array([-1.0]))
        >>> grid.choose(guard=None).coefficient
        4.0
        >>> grid.choose(guard="kl", limit=0.5)
        Choice(path='layers[2].output', layer=2, coefficient=1.0, score=0.5, baseline=-1.0, kl=0.1)

        Args:
            guard: `"kl"`, or None for no limit.
            limit: the largest mean KL divergence.
            want: `"high"` or `"low"`.

        Raises:
            BadArgument: no cell within the limit, or a sweep without KL divergence.
        """
        if guard not in ("kl", None):
            raise BadArgument(f"there is no guard {guard!r}", expected='"kl", or None')
        if (guard is None) != (limit is None):
            idle = "limit= without a guard would have no effect" if guard is None else "a guard without a limit"
            raise BadArgument(idle, write='choose(guard="kl", limit=0.5), or choose(guard=None)')
        score, kl = self.values.mean(0), self.kl.mean(0)
        steers = np.array(self.coefficients) != 0
        allowed = np.broadcast_to(steers, score.shape) & ~np.isnan(score)
        if not allowed.any():
            raise BadArgument(
                "no cell that steers has a metric that is a number in the mean over the prompts",
                expected="coefficients beside 0, and a metric that is a number for every prompt",
            )
        if limit is not None:
            if np.isnan(kl).all():
                raise BadArgument("this sweep did not measure its guard", write="ns.steering.sweep(..., guard=True)")
            allowed = allowed & (kl <= limit)
        if not allowed.any():
            least = float(np.where(steers, kl, np.inf).min())
            raise BadArgument(
                f"no cell stays within a KL of {limit:g}; the least that one has is {least:.3g}",
                expected="a higher limit, or smaller coefficients in the sweep",
            )
        sign = -1.0 if _is_low(want) else 1.0
        layer, coefficient = np.unravel_index(int(np.where(allowed, sign * score, -np.inf).argmax()), score.shape)
        return Choice(
            self.paths[layer], self.layers[layer], self.coefficients[coefficient], float(score[layer, coefficient]),
            float(self.baseline.mean()), float(kl[layer, coefficient]),
        )  # fmt: skip

    # --- to look at

    def plot(self, of: str = "value", *, prompt: int | None = None, ax: plots.Axes | None = None) -> plots.Axes:
        """Draw the sweep, averaged over prompts.

        Args:
            of: `"value"`, `"change"` or `"kl"` for a heatmap; `"lines"` for the metric by coefficient, a line for each
                layer; `"frontier"` for the metric by KL divergence.
            prompt: the number of one prompt, instead of the mean.
            ax: axes to draw on; a new figure if left out.
        """
        layers, coefficients, level = self.layers, self.coefficients, float(self.baseline.mean())
        if of == "lines":
            return sweep_figures.lines(self._chosen("value", prompt), layers, coefficients, self.metric, level, ax)
        kl_label = f"KL of the next token{', mean along the text' if self.texts else ''}"
        if of == "frontier":
            change, kl = self._chosen("change", prompt), self._chosen("kl", prompt)
            return sweep_figures.frontier(change, kl, layers, coefficients, self.metric, kl_label, ax)
        values = self._chosen(of, prompt)
        unsteered = float(self.baseline.mean() if prompt is None else self.baseline[prompt])
        title = {"value": self.metric, "change": f"change of {self.metric}", "kl": kl_label}[of]
        label = f"{self.metric} (unsteered: {unsteered:.3g}, white)" if of == "value" else title
        centre = {"value": unsteered, "change": 0.0}.get(of)
        return sweep_figures.heatmap(values, layers, coefficients, title, label, centre, ax)

    def _chosen(self, of: str, prompt: int | None) -> np.ndarray:
        array = self._array(of)
        if prompt is None:
            return array.mean(0)
        if isinstance(prompt, bool) or not -len(array) <= prompt < len(array):
            raise BadArgument(f"prompt={prompt}", expected=f"a number below {len(array)}, or nothing for the mean")
        return array[prompt]

    def _array(self, of: str) -> np.ndarray:
        if of not in ("value", "change", "kl"):
            raise BadArgument(f"of={of!r}", expected='"value", "change" or "kl"; for figures "lines" or "frontier" too')
        return {"value": self.values, "change": self.values - self.baseline[:, None, None], "kl": self.kl}[of]

    # --- files

    def to_file(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, completely or not at all.

        Args:
            path: the file to write, or its address in an object store.
        """
        header = {
            "paths": self.paths, "layers": self.layers, "coefficients": self.coefficients, "prompts": self.prompts,
            "metric": self.metric, "asked": dict(self.asked), "texts": self.texts,
        }  # fmt: skip
        array_files.write(path, "SteeringSweep", header, {name: getattr(self, name) for name in _ARRAYS})

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> SteeringSweep:
        """Read a sweep of `to_file`.

        Args:
            path: the file.

        Raises:
            FileError: the file is no sweep of steering, or damaged.
        """
        return array_files.read(path, "SteeringSweep", _ARRAYS, lambda header, arrays: cls(
            tuple(header["paths"]), tuple(header["layers"]), tuple(header["coefficients"]), **arrays,
            prompts=tuple(header["prompts"]), metric=header["metric"], asked=header["asked"],
            texts=tuple(tuple(tuple(row) for row in rows) for rows in header["texts"]),
        ))  # fmt: skip

    def __repr__(self) -> str:
        prompts, layers, coefficients = self.values.shape
        head = f"SteeringSweep: {counted(self.values.size, 'cell')}, {counted(prompts, 'prompt')}, {self.metric}"
        asked = ", ".join(f"{name} {value}" for name, value in self.asked.items() if name in ("operator", "where"))
        best = self.best(1).iloc[0]
        lines = "\n".join(
            [
                head,
                f"  {counted(layers, 'layer')} {_brief(self.layers)}, {counted(coefficients, 'coefficient')} "
                f"{list(self.coefficients)}" + (f", {asked}" if asked else ""),
                f"  unsteered {self.baseline.mean():.4g}, highest {best['value']:.4g} at layer {int(best['layer'])}, "
                f"coefficient {best['coefficient']:g} with KL {best['kl']:.3g}",
            ]
        )
        return printable(lines)

    def _repr_html_(self) -> str:
        import html

        first, *rest = (html.escape(line.strip()) for line in repr(self).splitlines())
        return f"<div><b>{first}</b>" + "".join(f"<br>&emsp;{line}" for line in rest) + "</div>"


def _brief(layers: Sequence[int]) -> str:
    """The numbers of layers, of many the first and the last."""
    return str(list(layers)) if len(layers) <= 12 else f"[{layers[0]}, {layers[1]}, ..., {layers[-1]}]"


def _is_low(want: str) -> bool:
    if want not in ("high", "low"):
        raise BadArgument(f"want={want!r}", expected='"high" or "low"')
    return want == "low"
