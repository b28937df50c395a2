"""`faithfulness`: the share of the metric that circuits of every size keep."""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from nnsplice import closures, plots
from nnsplice.activations.prompts import PromptsLike
from nnsplice.circuits.ablations import Ablation
from nnsplice.circuits.addresses import part_of
from nnsplice.circuits.circuit import Circuit
from nnsplice.circuits.masks import Mask, needed
from nnsplice.circuits.measuring import Question, measure
from nnsplice.circuits.origin import check_model
from nnsplice.circuits.scores import Scores, count_of, scores_of
from nnsplice.circuits.shape import Shape
from nnsplice.errors import BadArgument, BadType, FileError, circumstances, named
from nnsplice.files import from_json
from nnsplice.headers import read_header
from nnsplice.metrics import Metrics
from nnsplice.paths import parse_path
from nnsplice.results import Run, SweepResult
from nnsplice.stores import opened, whole

if TYPE_CHECKING:
    import pandas as pd

HEADER, KIND, FORMAT = "nnsplice", "Faithfulness", 1
_ARRAYS = ("values", "full", "empty")
#: The shares of all edges that MIB measures at.
SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
By = Literal["signed", "absolute"]
#: Whose area is CPR, and whose CMD.
ORDERS: tuple[By, ...] = ("signed", "absolute")


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

    #: How its members were chosen; None for a circuit that was given.
    by: str | None
    #: Whether what no path from `embed` to `unembed` goes through was taken out.
    pruned: bool
    #: The share of all edges or nodes, and how many these are; how many are left when pruned.
    share: float
    n: int
    connected: int


@dataclass(frozen=True, eq=False, repr=False)
class Faithfulness:
    """The faithfulness of circuits: 0 for the metric of the empty circuit, 1 for that of the whole model.

    f = (m(circuit) - m(empty)) / (m(model) - m(empty)), of the mean metric over prompts.

    Attributes:
        points: the circuits.
        values: the metric, `[prompt, point]`.
        full: the metric of the whole model, `[prompt]`.
        empty: the metric of the empty circuit, `[prompt]`.
        metric: the name of the metric.
        run: the cost of the run.
    """

    points: tuple[Point, ...]
    #: `[prompt, point]`, and `[prompt]` of the whole model and of the empty circuit; of several metrics, these are the
    #: last axis of each.
    values: np.ndarray
    full: np.ndarray
    empty: np.ndarray
    metric: str
    run: Run
    #: The names of several metrics; none where there is one.
    metrics: tuple[str, ...] = ()

    def only(self, metric: str) -> Faithfulness:
        """The report of one of several metrics, the same as if it had been asked for alone.

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

    def _one(self, what: str) -> None:
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
        self._one("f()")
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
            pruned: of the pruned circuits.

        Returns:
            The area.

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

        Returns:
            The lower and upper ends.

        Raises:
            BadArgument: another `of` or `level`, or no curve.
        """
        self._one("ci()")
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

        Returns:
            A `pandas.DataFrame`.
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

        Returns:
            The axes; the figure is `axes.figure`.
        """
        self._one("plot()")
        found = self.f()
        x: dict[str, list[float]] = {}
        y: dict[str, list[float]] = {}
        for number, point in enumerate(self.points):
            name = (point.by or "given") + (", pruned" if point.pruned else "")
            x.setdefault(name, []).append(max(point.share, 1e-9))
            y.setdefault(name, []).append(float(found[number]))
        axes = plots.lines(x, y, x_label="share of edges", y_label=f"faithfulness ({self.metric})", level=1.0, ax=ax)
        axes.set_xscale("log")
        return axes

    def to_file(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, completely or not at all.

        Args:
            path: the file to write, or its address in an object store.
        """
        from safetensors.numpy import save_file

        told = {
            "kind": KIND, "format": FORMAT, "points": [astuple(point) for point in self.points], "metric": self.metric,
            "metrics": self.metrics, "run": asdict(self.run),
        }  # fmt: skip
        with whole(path) as temporary:
            arrays = {name: np.ascontiguousarray(getattr(self, name)) for name in _ARRAYS}
            save_file(arrays, temporary, metadata={HEADER: json.dumps(told)})

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Faithfulness:
        """Read what `to_file` wrote.

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

        Returns:
            The report.

        Raises:
            FileError: the file is none, or damaged.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with opened(path) as found:
                header = read_header(path, local=found.local).metadata
                told = from_json(header.get(HEADER, "{}"), f"the header of {path}")
                if told.get("kind") != KIND or told["format"] > FORMAT:
                    raise FileError(f"{path} holds no faithfulness", expected="a file of Faithfulness.to_file")
                with safe_open(os.fspath(found.local), framework="np") as file:
                    arrays = {name: file.get_tensor(name) for name in _ARRAYS}
            points = tuple(Point(*point) for point in told["points"])
            return cls(points, **arrays, metric=told["metric"], run=Run(**told["run"]), metrics=tuple(told["metrics"]))
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, FileError):
                raise
            raise FileError(f"{path} is damaged or no safetensors file: {error}") from None

    def __repr__(self) -> str:
        if self.metrics:
            return "\n".join(repr(self.only(name)) for name in self.metrics)
        ends = f"model {self.full.mean():.4g}, empty {self.empty.mean():.4g}"
        lines = [
            f"Faithfulness: {len(self.points)} circuits, {_count(len(self.full), 'prompt')}, {self.metric}; {ends}"
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


def faithfulness(
    model: Any,
    circuits: Circuit | SweepResult | Sequence[Circuit],
    clean: PromptsLike,
    corrupted: PromptsLike | None,
    metric: Metrics,
    *,
    ablation: Ablation = "patch",
    reference: PromptsLike | None = None,
    shares: Sequence[float] = SHARES,
    max_tokens: int | None = None,
    progress: bool = True,
) -> Faithfulness:
    """Faithfulness: the share of the metric that circuits keep, of one circuit, several, or a curve over sizes.

    For scores, circuits of each share of the edges (or nodes) are measured: by the highest scores, whose area is CPR,
    and by the largest absolute scores, whose area is CMD. Ties are in execution order. Each circuit is also measured
    `pruned`, without what is on no path from `embed` to `unembed`; where removed edges have the values of another run,
    pruning changes nothing and is not run.

    >>> metric = ns.logit_diff("w7", "w8")
    >>> pairs = ["w3 w4 w5", "w9 w4 w5"], ["w3 w4 w3", "w9 w4 w3"]
    >>> sites = ["embed", "layers[:].heads[:]", "layers[:].mlp"]
    >>> scores = ns.attribute(model, *pairs, sites, metric, method="eap-ig", progress=False)
    >>> report = ns.faithfulness(model, scores, *pairs, metric, shares=[0.1, 0.5, 1.0], progress=False)
    >>> report.frame()[["by", "share", "n"]].drop_duplicates().values.tolist()[:3]
    [['signed', 0.1, 26], ['signed', 0.5, 131], ['signed', 1.0, 262]]
    >>> float(report.f()[-1].round(6)), report.cpr < 10
    (1.0, True)

    Args:
        model: a model from `ns.load`, in eval mode.
        circuits: a circuit, several, or a result with scores of edges or nodes, such as that of `ns.attribute`.
        clean: the prompts on which circuits run; the model's own metric on them is 1.
        corrupted: the prompts that ablated values are taken from; None for an ablation that needs none.
        metric: one metric of single tokens, such as `ns.logit_diff(answer, wrong)`.
        ablation: `"patch"`, `"zero"`, `"mean"` or a `SavedActivation`, as for `Circuit.run`.
        reference: the prompts of `"mean"`, if not the corrupted ones.
        shares: the circuit sizes of the curve, as shares of all edges; those of the MIB benchmark if left out.
        max_tokens: how many tokens run at once; chosen for the device if left out.
        progress: show a progress bar.

    Returns:
        The metric of each circuit, with `.f()`, `.cpr`, `.cmd` and `.frame()`.

    Raises:
        BadType: neither circuits nor scores.
        BadArgument: shares that do not grow from 0 to 1, several metrics, or a metric that is NaN.
        ShapeError: prompts that are no pairs of one length, with `ablation="patch"`.
        RefusedPlace: a model in which the circuit of all edges is not the clean run.
        KeyMismatch: a circuit of another model.
    """
    start = time.perf_counter()
    with circumstances("ns.faithfulness"):
        question = Question.of(model, clean, corrupted, metric, ablation, reference, several=True)
        points, masks = circuits_of(circuits, question, shares)
        found = measure(question, masks, max_tokens=max_tokens, progress=progress)
        about = Run(
            "circuits",
            time.perf_counter() - start,
            **found.cost.as_dict(),
            gate=closures.spent(question.model),
            note=found.note,
        )
        return report(points, found.values, found.clean, question.metric.metric.name, question.metrics, about)


def circuits_of(
    circuits: Circuit | SweepResult | Sequence[Circuit], question: Question, shares: Sequence[float]
) -> tuple[list[Point], list[Mask]]:
    """The circuits that are measured, and their edges, with those of the empty circuit before them."""
    shape = question.wiring.shape
    if isinstance(circuits, SweepResult):
        scores = scores_of(circuits)
        check_model(scores.provenance, question.model, scores.senders)
        question.check_parts(scores.senders)
        points, masks = _curve(scores, shape, shares)
    else:
        points, masks = _given(circuits, question)
    return points, [Mask(np.zeros_like(shape.exists)), *masks]


def report(
    points: Sequence[Point], values: np.ndarray, clean: np.ndarray, metric: str, metrics: tuple[str, ...], run: Run
) -> Faithfulness:
    """What was measured, with a warning where the ends of the scale are close.

    Args:
        values: `[prompt, circuit]`, of the empty circuit first; of several metrics these are a last axis.
        clean: of the whole model, without that of the circuits.

    Raises:
        BadArgument: a metric of an end that is NaN.
    """
    empty, full = values[:, 0], clean
    each = (ends.reshape(len(ends), -1).T for ends in (full, empty))
    said = [_check_ends(a, b, name) for name, a, b in zip(metrics or (metric,), *each, strict=True)]
    about = replace(run, note="; ".join(filter(None, (*said, run.note))))
    return Faithfulness(tuple(points), values[:, 1:], full, empty, metric, about, metrics)


def _curve(scores: Scores, shape: Shape, shares: Sequence[float]) -> tuple[list[Point], list[Mask]]:
    if not len(shares) or any(not 0 <= share <= 1 for share in shares) or list(shares) != sorted(set(shares)):
        raise BadArgument(f"shares={list(shares)}", expected="growing numbers from 0 to 1")
    points: list[Point] = []
    masks: list[Mask] = []
    for by in ORDERS:
        order = scores.order(by)
        for share in shares:
            n = count_of(share, len(order))
            mask = _mask(scores, order[:n], shape)
            connected = mask.only(needed(shape, mask.edges, from_embed=True)[0])
            counts = int(connected.edges.sum())
            masks += [mask, connected]
            points += [Point(by, pruned, float(share), n, counts) for pruned in (False, True)]
    return points, masks


def _mask(scores: Scores, chosen: np.ndarray, shape: Shape) -> Mask:
    some: list[Any] = [scores.of[number] for number in chosen]
    edges = scores.kind == "edges"
    members: list[Any] = some if edges else [parse_path("embed"), *some]
    if any(part_of(one[0] if edges else one) is not None for one in members):
        kind, parts = ("edges", ((), tuple(members))) if edges else ("nodes", (tuple(members), ()))
        return Circuit(kind, *parts, shape=shape).parts(shape)  # type: ignore[arg-type]
    found = np.zeros(shape.exists.shape, dtype=bool)
    if not edges:
        found[:, [shape.sender_number[one] for one in members]] = True
    elif members:
        pairs = [(shape.receiver_number[r], shape.sender_number[s]) for s, r in members]
        found[tuple(np.array(pairs).T)] = True
    return Mask(found & shape.exists)


def _given(circuits: Any, question: Question) -> tuple[list[Point], list[Mask]]:
    each = [circuits] if isinstance(circuits, Circuit) else circuits
    if not isinstance(each, Sequence) or not each or not all(isinstance(one, Circuit) for one in each):
        raise BadType(
            f"{named(circuits)} is neither circuits nor scores",
            expected='a Circuit, a list of them, or a result of ns.attribute(..., method="eap-ig")',
        )
    shape = question.wiring.shape
    points: list[Point] = []
    masks: list[Mask] = []
    for one in each:
        mask = one.checked_mask(question)
        of = shape.n_edges if one.kind == "edges" else len(shape.senders)
        connected, _ = needed(shape, mask.edges, from_embed=True)
        points.append(Point(None, False, len(one) / of, len(one), int(connected.sum())))
        masks.append(mask)
    return points, masks


def _check_ends(full: np.ndarray, empty: np.ndarray, metric: str) -> str:
    """Warn where the two ends of the scale are no further apart than chance puts them.

    Raises:
        BadArgument: they are no numbers.
    """
    if np.isnan(full).any() or np.isnan(empty).any():
        raise BadArgument(
            f"{metric} of the model or of the empty circuit is NaN", expected="a metric that is a number for both"
        )
    apart = full - empty
    error = apart.std(ddof=1) / np.sqrt(len(apart)) if len(apart) > 1 else 0.0
    if abs(apart.mean()) <= 2 * error or apart.mean() == 0:
        said = (
            f"the model and the empty circuit are {apart.mean():.3g} apart in the mean {metric}, with a standard error "
            f"of {error:.3g}: shares of that say little"
        )
        warnings.warn(said, stacklevel=4)
        return said
    return ""


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"
