"""Results that are estimates: components of a cell, and the verification."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from nnsplice.errors import BadArgument
from nnsplice.results import labelled, measures
from nnsplice.results.table import Table

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, slots=True)
class Miss:
    """One estimate with its exact value: the metric of the edited run.

    Attributes:
        path: the cell.
        receiver: the receiver of an estimated edge.
        estimated: the estimate.
        exact: the exact value.
    """

    path: str
    #: Where an edge was estimated: the site that it ends at.
    receiver: str | None
    estimated: float
    exact: float


@dataclass(frozen=True, slots=True)
class Verification:
    """Estimated cells compared with their exact values.

    The cells with the largest estimates were computed exactly, and a random sample of the others, as a cell with a
    small estimate can have a large effect.

    Attributes:
        k: how many of the largest estimates were computed.
        others: how many of the others were computed.
        rank_correlation: Spearman's correlation of estimated and exact sizes; NaN where it is undefined.
        recall: the share of the truly largest k among the first k; estimated from the sample unless all were computed.
        worst: the cell with the largest error.
        missed: an upper bound, at 95% confidence (Clopper and Pearson), of the share of other cells whose true size is
            above the smallest of the first k.
    """

    #: How many of the largest estimates were computed, and how many of the others.
    k: int
    others: int
    #: Spearman's, between estimated and exact sizes of all that was computed. NaN where there is nothing to rank.
    rank_correlation: float
    #: Which share of the truly largest k is among the first k. Exact where everything was computed, else estimated:
    #: each of the others stands for as many as it was drawn from.
    recall: float
    #: The one whose estimate is furthest off.
    worst: Miss | None
    #: Of the cells that are not among the first k: the largest share that can have a true size above the smallest of
    #: those, at a confidence of 95% (Clopper and Pearson's bound, from the others that were drawn). Exact where all of
    #: them were computed; 1 where none was.
    missed: float = 1.0

    def __str__(self) -> str:
        """One line."""
        if self.worst is None:
            return "nothing to check: no cell can differ"
        about = "" if self.others == 0 else f" and {self.others} others"
        edge = "" if self.worst.receiver is None else f" -> {self.worst.receiver}"
        return (
            f"first {self.k}{about} computed exactly: rank correlation {self.rank_correlation:.2f}, "
            f"recall at {self.k} {self.recall:.0%}; worst {self.worst.path}{edge}: "
            f"{self.worst.estimated:.4g} estimated, {self.worst.exact:.4g} exact; "
            f"of all others at most {self.missed:.1%} are larger than the smallest of the first"
        )


def method_of(table: Table) -> str | None:
    """The method of an estimate; None for what was measured."""
    method = table.asked.get("method")
    return method if isinstance(method, str) else None


def sizes_of(table: Table) -> np.ndarray:
    """How large each estimate is, `[cell]` or `[cell, receiver]`: pooled over prompts, as `best` orders them."""
    return measures.size(table, measures.change(table) if table.edges is None else table.edges)


def first(sizes: np.ndarray, k: int) -> np.ndarray:
    """The flat numbers of the k largest, the largest first; never one that is not there."""
    flat = sizes.reshape(-1)
    order = np.argsort(-flat, kind="stable")[:k]
    return order[~np.isnan(flat[order])]


def verification(table: Table) -> Verification:
    """How the estimates stand beside what was computed.

    Raises:
        BadArgument: nothing was.
    """
    if table.exact is None:
        raise BadArgument(
            "none of these estimates was computed exactly", write="ns.attribute(..., verify=20)   (the first 20)"
        )
    told = table.asked["verify"]
    moved = table.exact - measures.beside(table.corrupted, table.exact)
    estimated, exact = sizes_of(table).reshape(-1), measures.size(table, moved).reshape(-1)
    checked = ~np.isnan(exact)
    if not checked.any():
        return Verification(0, 0, float("nan"), float("nan"), None, 0.0)
    k = min(told["k"], int(checked.sum()))
    chosen = np.zeros(len(exact), dtype=bool)
    chosen[np.flatnonzero(checked)[first(estimated[checked], k)]] = True
    others = checked & ~chosen
    weight = np.where(chosen, 1.0, (told["of"] - k) / max(int(others.sum()), 1))[checked]
    return Verification(
        k,
        int(others.sum()),
        spearman(estimated[checked], exact[checked]),
        recall(exact[checked], chosen[checked], weight, k),
        _worst(table, np.flatnonzero(checked)),
        _missed(exact, chosen, others, told["of"] - k),
    )


#: How sure `Verification.missed` is.
CONFIDENCE = 0.95


def _missed(exact: np.ndarray, chosen: np.ndarray, others: np.ndarray, rest: int) -> float:
    """The largest share of the rest that can be larger than the smallest of the chosen."""
    if not rest:
        return 0.0
    larger = int((exact[others] > exact[chosen].min()).sum())
    drawn = int(others.sum())
    return larger / rest if drawn == rest else clopper_pearson(larger, drawn, CONFIDENCE)


def clopper_pearson(found: int, drawn: int, confidence: float) -> float:
    """The largest share at which so few of those that were drawn are no less likely than 1 - confidence.

    >>> from nnsplice.results.estimates import clopper_pearson
    >>> round(clopper_pearson(0, 59, 0.95), 4)     # the rule of three, nearly
    0.0495
    """
    if found >= drawn:
        return 1.0
    low, high = found / drawn, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if _at_most(found, drawn, middle) > 1 - confidence:
            low = middle
        else:
            high = middle
    return high


def _at_most(found: int, drawn: int, share: float) -> float:
    """How likely it is to find at most so many, where each is one with this chance."""
    if not 0 < share < 1:
        return float(share <= 0 or found >= drawn)
    logs = [
        math.lgamma(drawn + 1) - math.lgamma(n + 1) - math.lgamma(drawn - n + 1)
        + n * math.log(share) + (drawn - n) * math.log1p(-share)
        for n in range(found + 1)
    ]  # fmt: skip
    return math.fsum(map(math.exp, logs))


def recall(exact: np.ndarray, chosen: np.ndarray, weight: np.ndarray, k: int) -> float:
    """Which share of the truly largest k was chosen, where each stands for `weight` of them."""
    order = np.argsort(-exact, kind="stable")
    room = np.clip(k - np.concatenate([[0.0], np.cumsum(weight[order])[:-1]]), 0.0, weight[order])
    return float((room * chosen[order]).sum() / room.sum())


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """The correlation of two orders; equal numbers share the mean of their ranks."""
    if len(a) < 2:
        return float("nan")
    ranks = [_ranks(values) for values in (a, b)]
    spread = [ranked.std() for ranked in ranks]
    if not all(spread):
        return float("nan")
    both = ((ranks[0] - ranks[0].mean()) * (ranks[1] - ranks[1].mean())).mean()
    return float(both / (spread[0] * spread[1]))


def _ranks(values: np.ndarray) -> np.ndarray:
    _, number, count = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return (last - (count - 1) / 2)[number]


def _worst(table: Table, checked: np.ndarray) -> Miss:
    assert table.exact is not None
    shape, ends = table.exact.shape[1:], measures.beside(table.corrupted, table.exact)
    estimated = table.values if table.edges is None else table.edges + ends
    off = measures.size(table, table.exact - estimated).reshape(-1)
    number = int(checked[np.argmax(off[checked])])
    cell, *receiver = (int(at) for at in np.unravel_index(number, shape))
    means = [float(measures.mean(values.reshape(len(ends), -1)[:, number])) for values in (estimated, table.exact)]
    if not receiver:
        return Miss(table.cells[cell].path, None, *means)
    return Miss(_sender(table, cell), table.receivers[receiver[0]], *means)


def _sender(table: Table, number: int) -> str:
    """A sender as `path_patch` takes it: all its tokens at once are no positions there, and `[:]` each by itself."""
    cell = table.cells[number]
    return cell.path.removesuffix("[:]") if cell.position is None else cell.path


def edges(table: Table, prompt: int | None) -> pd.DataFrame:
    """A row for each edge, the largest first."""
    import pandas as pd

    if table.edges is None:
        raise BadArgument(
            "this result is about sites, and has no edges between them",
            write='ns.attribute(..., method="eap")',
        )
    labelled.check_prompt(table, prompt)

    def of(values: np.ndarray) -> np.ndarray:
        return measures.mean(values) if prompt is None else values[prompt]

    scores = of(table.edges)
    cells, receivers = np.nonzero(~np.isnan(scores))
    order = np.argsort(-np.abs(scores[cells, receivers]), kind="stable")
    cells, receivers = cells[order], receivers[order]
    columns: dict[str, Any] = {
        "sender": [_sender(table, cell) for cell in cells],
        "receiver": [table.receivers[receiver] for receiver in receivers],
        "score": scores[cells, receivers],
    }
    if table.exact is not None:
        columns["exact"] = of(table.exact - table.corrupted[:, None, None])[cells, receivers]
    return pd.DataFrame(columns)
