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

    k: int
    others: int
    rank_correlation: float
    recall: float
    worst: Miss | None
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
    """`[cell]` or `[cell, receiver]`: the size of each estimate, pooled over prompts as in `best`."""
    return measures.size(table, measures.change(table) if table.edges is None else table.edges)


def first(sizes: np.ndarray, k: int) -> np.ndarray:
    """The flat indices of the k largest sizes in descending order, without NaN."""
    flat = sizes.reshape(-1)
    order = np.argsort(-flat, kind="stable")[:k]
    return order[~np.isnan(flat[order])]


def verification(table: Table) -> Verification:
    """The estimates compared with the cells that were computed exactly.

    Raises:
        BadArgument: no cell was.
    """
    if table.exact is None:
        raise BadArgument(
            "none of these estimates was computed exactly", write="ns.attribute(..., verify=20)   (the first 20)"
        )
    verify = table.asked["verify"]
    moved = table.exact - measures.beside(table.corrupted, table.exact)
    estimated, exact = sizes_of(table).reshape(-1), measures.size(table, moved).reshape(-1)
    checked = ~np.isnan(exact)
    if not checked.any():
        return Verification(0, 0, float("nan"), float("nan"), None, 0.0)
    k = min(verify["k"], int(checked.sum()))
    chosen = np.zeros(len(exact), dtype=bool)
    chosen[np.flatnonzero(checked)[first(estimated[checked], k)]] = True
    others = checked & ~chosen
    weight = np.where(chosen, 1.0, (verify["of"] - k) / max(int(others.sum()), 1))[checked]
    return Verification(
        k,
        int(others.sum()),
        spearman(estimated[checked], exact[checked]),
        recall(exact[checked], chosen[checked], weight, k),
        _worst(table, np.flatnonzero(checked)),
        _missed(exact, chosen, others, verify["of"] - k),
    )


#: The confidence of the bound `Verification.missed`.
CONFIDENCE = 0.95


def _missed(exact: np.ndarray, chosen: np.ndarray, others: np.ndarray, rest: int) -> float:
    """An upper bound of the share of the rest that is larger than the smallest chosen cell."""
    if not rest:
        return 0.0
    larger = int((exact[others] > exact[chosen].min()).sum())
    drawn = int(others.sum())
    return larger / rest if drawn == rest else clopper_pearson(larger, drawn, CONFIDENCE)


def clopper_pearson(found: int, drawn: int, confidence: float) -> float:
    """Clopper and Pearson's upper bound of a share, of which `found` among `drawn` were seen.

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
    """The binomial probability of at most `found` among `drawn`."""
    if not 0 < share < 1:
        return float(share <= 0 or found >= drawn)
    logs = [
        math.lgamma(drawn + 1) - math.lgamma(n + 1) - math.lgamma(drawn - n + 1)
        + n * math.log(share) + (drawn - n) * math.log1p(-share)
        for n in range(found + 1)
    ]  # fmt: skip
    return math.fsum(map(math.exp, logs))


def recall(exact: np.ndarray, chosen: np.ndarray, weight: np.ndarray, k: int) -> float:
    """The share of the truly largest k that was chosen; each cell stands for `weight` cells."""
    order = np.argsort(-exact, kind="stable")
    room = np.clip(k - np.concatenate([[0.0], np.cumsum(weight[order])[:-1]]), 0.0, weight[order])
    return float((room * chosen[order]).sum() / room.sum())


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation; equal numbers share the mean of their ranks."""
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
    """A sender as `path_patch` takes it: without a position for all tokens at once, as `[:]` means one by one there."""
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
