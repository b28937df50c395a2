"""`Faithfulness`: the metric of circuits of every size, and the share of the whole model's that they keep."""

from __future__ import annotations

import os
from dataclasses import asdict, astuple, dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from nnsplice import plots
from nnsplice.circuits.scores import By
from nnsplice.errors import BadArgument
from nnsplice.results import Run, array_files
from nnsplice.shown import counted

if TYPE_CHECKING:
    import pandas as pd

_ARRAYS = ("values", "full", "empty")


@dataclass(frozen=True, slots=True)
class Point:
    """One circuit of a faithfulness curve.

    Attributes:
        by: the order by which members were chosen: `"signed"` or `"absolute"`; None for a circuit that was given.
        pruned: whether only members on a path from `embed` to `unembed` are left.
        share: the share of all edges or nodes.
        n: the number of members.
        connected: the number of members on a path from `embed` to `unembed`.
    """

    by: str | None
    pruned: bool
    share: float
    n: int
    connected: int


@dataclass(frozen=True, eq=False, repr=False)
class Faithfulness:
    """The faithfulness of circuits: 0 for the metric of the empty circuit, 1 for that of the whole model.

    f = (m(circuit) - m(empty)) / (m(model) - m(empty)), of the mean metric over prompts.

    Attributes:
        points: the circuits.
        values: the metric, `[prompt, point]`; of several metrics, these are the last axis of all three arrays.
        full: the metric of the whole model, `[prompt]`.
        empty: the metric of the empty circuit, `[prompt]`.
        metric: the name of the metric.
        run: the cost of the run.
        metrics: the names of several metrics; none where there is one.
    """

    points: tuple[Point, ...]
    values: np.ndarray
    full: np.ndarray
    empty: np.ndarray
    metric: str
    run: Run
    metrics: tuple[str, ...] = ()

    def only(self, metric: str) -> Faithfulness:
        """The report of one of several metrics, the same as if it had been measured on its own.

        >>> metrics = [ns.logit_diff("w7", "w8"), ns.probability("w7")]
        >>> pairs = ["w3 w4 w5", "w9 w4 w5"], ["w3 w4 w3", "w9 w4 w3"]
        >>> report = ns.faithfulness(model, ns.Circuit.full(model), *pairs, metrics, progress=False)
        >>> report.only("probability").f().round(3).tolist()
        [1.0]
        """
        names = self.metrics or (self.metric,)
        if metric not in names:
            raise BadArgument(f"no metric {metric!r} was measured", expected=f"one of {', '.join(names)}")
        if not self.metrics:
            return self
        at = self.metrics.index(metric)
        return replace(
            self, values=self.values[..., at], full=self.full[:, at], empty=self.empty[:, at], metric=metric,
            metrics=(),
        )  # fmt: skip

    def _check_one(self, what: str) -> None:
        if self.metrics:
            raise BadArgument(
                f"{len(self.metrics)} metrics were measured, and {what} is of one",
                expected=f"one of {', '.join(self.metrics)}",
                write=f"report.only({self.metrics[0]!r}).{what}",
            )

    def f(self) -> np.ndarray:
        """The faithfulness of each circuit: `[point]`.

        >>> circuit = ns.Circuit.full(model)
        >>> pairs = ["w3 w4 w5", "w9 w4 w5"], ["w3 w4 w3", "w9 w4 w3"]
        >>> report = ns.faithfulness(model, circuit, *pairs, ns.logit_diff("w7", "w8"), progress=False)
        >>> report.f().round(6).tolist()
        [1.0]
        """
        self._check_one("f()")
        return self._shares(np.full((1, len(self.full)), 1.0 / len(self.full)))[0]

    @property
    def cpr(self) -> float:
        """CPR of MIB: the area under f over the share of edges, for circuits of the highest scores; larger is better.

        The area is that of trapezoids between the measured shares.
        """
        return self.area("signed")

    @property
    def cmd(self) -> float:
        """CMD of MIB: the area under |1 - f| over the share of edges, by absolute scores; smaller is better.

        The area is that of trapezoids between the measured shares.
        """
        return self.area("absolute", distance=True)

    def area(self, by: By, *, distance: bool = False, pruned: bool = False) -> float:
        """The area under f, or under |1 - f|, for one order of choosing edges.

        Args:
            by: `"signed"` or `"absolute"`.
            distance: the area under |1 - f|.
            pruned: use the numbers of edges of the pruned circuits.

        Raises:
            BadArgument: no such curve was measured.
        """
        return float(self._areas(self.f()[None], by, distance, pruned)[0])

    def ci(
        self, of: Literal["f", "cpr", "cmd"] = "f", level: float = 0.95, *, draws: int = 2000, seed: int = 0
    ) -> np.ndarray:
        """Bootstrap confidence intervals over prompts: `[point, 2]` of f, `[2]` of an area.

        NaN with fewer than two prompts.

        Args:
            of: `"f"`, `"cpr"` or `"cmd"`.
            level: the confidence level.
            draws: the number of bootstrap samples.
            seed: the seed of the samples.

        Raises:
            BadArgument: another `of` or `level`, or no curve.
        """
        self._check_one("ci()")
        if of not in ("f", "cpr", "cmd"):
            raise BadArgument(f"of={of!r}", expected='"f", "cpr" or "cmd"')
        if not 0 < level < 1:
            raise BadArgument(f"level={level}", expected="a share between 0 and 1, such as 0.95")
        prompts = len(self.full)
        if prompts < 2:
            return np.full((len(self.points), 2) if of == "f" else 2, np.nan)
        drawn = np.random.default_rng(seed).multinomial(prompts, [1.0 / prompts] * prompts, size=draws) / prompts
        shares = self._shares(drawn)
        tail = (1 - level) / 2
        if of == "f":
            return np.nanquantile(shares, [tail, 1 - tail], axis=0).T
        areas = self._areas(shares, *(("signed", False) if of == "cpr" else ("absolute", True)), False)
        return np.nanquantile(areas, [tail, 1 - tail])

    def frame(self, level: float = 0.95) -> pd.DataFrame:
        """A table with a row for each circuit: order, size, mean metric, f, and the confidence interval of f.

        Of several metrics, the rows of each under those of the one before.

        Args:
            level: the confidence level.
        """
        import pandas as pd

        if self.metrics:
            each = [self.only(name).frame(level) for name in self.metrics]
            for name, rows in zip(self.metrics, each, strict=True):
                rows.insert(0, "metric", name)
            return pd.concat(each, ignore_index=True)
        ends = self.ci(level=level)
        return pd.DataFrame(
            {
                "by": [point.by for point in self.points],
                "pruned": [point.pruned for point in self.points],
                "share": [point.share for point in self.points],
                "n": [point.n for point in self.points],
                "connected": [point.connected for point in self.points],
                "value": self.values.mean(0),
                "f": self.f(),
                "low": ends[:, 0],
                "high": ends[:, 1],
            }
        )

    def plot(self, *, ax: plots.Axes | None = None) -> plots.Axes:
        """Draw f over the share of edges on a logarithmic scale, a line for each order of choosing.

        Args:
            ax: axes to draw on; a new figure if left out.
        """
        self._check_one("plot()")
        found = self.f()
        x: dict[str, list[float]] = {}
        y: dict[str, list[float]] = {}
        for number, point in enumerate(self.points):
            name = (point.by or "given") + (", pruned" if point.pruned else "")
            x.setdefault(name, []).append(max(point.share, 1e-9))
            y.setdefault(name, []).append(float(found[number]))
        dashed = [name for name in x if name.endswith("pruned")]
        label = f"faithfulness ({self.metric})"
        axes = plots.lines(x, y, x_label="share of edges", y_label=label, level=1.0, dashed=dashed, ax=ax)
        axes.set_xscale("log")
        return axes

    def to_file(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, completely or not at all.

        Args:
            path: the file to write, or its address in an object store.
        """
        record = {
            "points": [astuple(point) for point in self.points], "metric": self.metric, "metrics": self.metrics,
            "run": asdict(self.run),
        }  # fmt: skip
        array_files.write(path, "Faithfulness", record, {name: getattr(self, name) for name in _ARRAYS})

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Faithfulness:
        """Read a file of `to_file`.

        >>> from tempfile import TemporaryDirectory
        >>> circuit = ns.Circuit.full(model)
        >>> pairs = ["w3 w4 w5", "w9 w4 w5"], ["w3 w4 w3", "w9 w4 w3"]
        >>> report = ns.faithfulness(model, circuit, *pairs, ns.logit_diff("w7", "w8"), progress=False)
        >>> with TemporaryDirectory() as folder:
        ...     report.to_file(f"{folder}/report.safetensors")
        ...     read = type(report).from_file(f"{folder}/report.safetensors")
        >>> bool((read.values == report.values).all())
        True

        Args:
            path: the file.

        Raises:
            FileError: the file is no such report, or damaged.
        """
        return array_files.read(path, "Faithfulness", _ARRAYS, lambda record, arrays: cls(
            tuple(Point(*point) for point in record["points"]), **arrays, metric=record["metric"],
            run=Run(**record["run"]), metrics=tuple(record["metrics"]),
        ))  # fmt: skip

    def __repr__(self) -> str:
        if self.metrics:
            return "\n".join(repr(self.only(name)) for name in self.metrics)
        ends = f"model {self.full.mean():.4g}, empty {self.empty.mean():.4g}"
        lines = [
            f"Faithfulness: {len(self.points)} circuits, {counted(len(self.full), 'prompt')}, {self.metric}; {ends}"
        ]
        if any(point.by == "signed" and not point.pruned for point in self.points):
            lines.append(f"CPR {self.cpr:.4g}")
        if any(point.by == "absolute" and not point.pruned for point in self.points):
            lines.append(f"CMD {self.cmd:.4g}")
        if len(self.points) == 1:
            lines.append(f"f {self.f()[0]:.4g}")
        return "\n  ".join([*lines, f"{self.run.seconds:.2f} s" + (f"; {self.run.note}" if self.run.note else "")])

    def _shares(self, weights: np.ndarray) -> np.ndarray:
        """`[draw, point]` of means over prompts that count so much."""
        full, empty = weights @ self.full, weights @ self.empty
        with np.errstate(divide="ignore", invalid="ignore"):
            return (weights @ self.values - empty[:, None]) / (full - empty)[:, None]

    def _areas(self, shares: np.ndarray, by: By, distance: bool, pruned: bool) -> np.ndarray:
        chosen = [n for n, point in enumerate(self.points) if (point.by, point.pruned) == (by, pruned)]
        if len(chosen) < 2:
            raise BadArgument(
                f"there is no curve of circuits by {by} scores, so there is no area under it",
                expected="a result with scores",
                write="ns.faithfulness(model, scores, clean, corrupted, metric)",
            )
        x = np.array([self.points[n].share for n in chosen])
        y = np.abs(1.0 - shares[:, chosen]) if distance else shares[:, chosen]
        return ((y[:, 1:] + y[:, :-1]) / 2 * np.diff(x)).sum(1)
