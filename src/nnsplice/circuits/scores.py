"""The scores of a result, as those of the edges or nodes of a circuit."""

from __future__ import annotations

import heapq
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from nnsplice.circuits.addresses import address, whole_of
from nnsplice.circuits.members import runs_before
from nnsplice.circuits.shape import LayerShape, Shape
from nnsplice.errors import BadArgument, BadType, named
from nnsplice.paths import Path
from nnsplice.results import SweepResult

By = Literal["absolute", "signed"]
Edge = tuple[Path, Path]

#: The keys of a result's question that a circuit keeps.
_ABOUT = ("model", "revision", "weights", "method", "metric", "operation", "saes")


@dataclass(frozen=True)
class Scores:
    """A score for each edge, or for each node."""

    kind: Literal["edges", "nodes"]
    #: In execution order.
    of: tuple[Edge, ...] | tuple[Path, ...]
    values: np.ndarray
    #: The graph that they are of, where they say it.
    shape: Shape | None
    provenance: Mapping[str, Any]

    @property
    def senders(self) -> tuple[Path, ...]:
        """The nodes, or where the edges start."""
        return tuple(one[0] if isinstance(one, tuple) else one for one in self.of)

    def order(self, by: By) -> np.ndarray:
        """The numbers of all, the best first; of equal ones, those that run first."""
        if by not in ("absolute", "signed"):
            raise BadArgument(f"by={by!r}", expected='"absolute" or "signed"')
        return np.argsort(-(np.abs(self.values) if by == "absolute" else self.values), kind="stable")

    def check(self, k: int) -> int:
        """The number of members, checked.

        Raises:
            BadArgument: it is no such number.
        """
        if isinstance(k, bool) or not isinstance(k, int | np.integer) or not 0 <= k <= len(self.of):
            raise BadArgument(
                f"k={k!r}, and there are {len(self.of)} scored {self.kind}",
                expected=f"a whole number from 0 to {len(self.of)}",
                write="Circuit.select(result, 0.02)   (a share of them)"
                if isinstance(k, float)
                else f"Circuit.top(result, {len(self.of)})   (all of them)",
            )
        return int(k)


def count_of(share: float, of: int) -> int:
    """The number of members in a share: rounded, and at least one unless the share is 0."""
    return max(round(share * of), 1 if share and of else 0)


def scores_of(result: Any) -> Scores:
    """The scores of a result: of its edges, if it has some, or of heads and MLPs.

    Raises:
        BadArgument: its scores are NaN, or of single tokens, or of sites that no circuit is made of.
    """
    if not isinstance(result, SweepResult):
        raise BadType(
            f"{named(result)} has no scores",
            expected='a result, such as that of ns.attribute(..., method="eap-ig")',
        )
    table = result.table
    if table.metrics:
        raise BadArgument("this result has several metrics", write=f'result.only("{table.metrics[0]}")')
    about = {name: table.asked[name] for name in _ABOUT if table.asked.get(name) is not None}
    senders = [address(_whole(cell.path, cell.position), "sender") for cell in table.cells]
    if table.edges is None:
        moved = table.values - table.corrupted[:, None]
        moved = -moved if _takes_out(table.asked.get("operation")) else moved
        values = _pooled(moved, table.done)
        return Scores("nodes", tuple(senders), values, None, about)
    receivers = [address(path, "receiver") for path in table.receivers]
    joined = np.asarray((~np.isnan(table.edges)).any(0))
    if not joined.any():
        raise BadArgument("every score is NaN", expected="a metric that is a number, with a gradient")
    _check_nan(senders, receivers, joined)
    rows, columns = np.nonzero(joined)
    means = _pooled(table.edges[:, rows, columns], table.exists[:, rows])
    edges = tuple((senders[s], receivers[r]) for s, r in zip(rows, columns, strict=True))
    return Scores("edges", edges, means, _shape(senders, receivers, joined), about)


def _takes_out(operation: Any) -> bool:
    """Whether cells are runs without a site, so that its score is the loss."""
    if isinstance(operation, Mapping):  # in a subspace, or a function of the user's
        return "function" in operation or _takes_out(operation.get("operation"))
    return operation in ("zero", "mean", "resample", "noise")


def _check_nan(senders: Sequence[Path], receivers: Sequence[Path], joined: np.ndarray) -> None:
    """Raise for an edge of the model without a score, which would look like a missing edge.

    Raises:
        BadArgument: an edge has no score in some prompt.
    """
    # Whether heads send to the MLP of their own layer depends on the model, so on the others of the layer.
    beside = {
        (s, r): senders[s].steps[0].index
        for s, r in np.argwhere(~joined).tolist()
        if senders[s].steps[-1].name == "heads" and receivers[r].steps[-1].name == "mlp"
        and senders[s].steps[0].index == receivers[r].steps[0].index
    }  # fmt: skip
    sequential = {
        senders[s].steps[0].index
        for s, r in np.argwhere(joined).tolist()
        if senders[s].steps[-1].name == "heads" and receivers[r].steps[-1].name == "mlp"
        and senders[s].steps[0].index == receivers[r].steps[0].index
    }  # fmt: skip
    for s, r in np.argwhere(~joined).tolist():
        if beside[s, r] in sequential if (s, r) in beside else runs_before(senders[s], receivers[r], None):
            raise BadArgument(
                f"the score of {senders[s]} -> {receivers[r]} is NaN, so the first of them mean nothing",
                expected="a metric that is a number for every cell",
                write="result.edges()   (shows which have one)",
            )


def _whole(path: str, position: object) -> str:
    """A cell's path without its position, where that is all tokens."""
    return path.removesuffix("[:]") if position is None else path


def _pooled(values: np.ndarray, there: np.ndarray) -> np.ndarray:
    """The mean over the prompts that have one."""
    if np.isnan(values[there]).any():
        count = int(np.isnan(values[there]).sum())
        raise BadArgument(
            f"{count} scores are NaN, so the first of them mean nothing",
            expected="a metric that is a number for every cell",
            write="result.frame()   (shows which have one)",
        )
    counts = there.sum(0)
    if not counts.all():
        raise BadArgument("some of these cells were not measured", expected="a whole result, not a shard of one")
    return np.where(there, values, 0.0).sum(0) / counts


def _shape(senders: Sequence[Path], receivers: Sequence[Path], joined: np.ndarray) -> Shape | None:
    """The graph that all edges together are; None where some are missing."""
    counts: dict[int, dict[str, int]] = {}
    for path in receivers:
        if found := re.fullmatch(r"layers\[(\d+)\]\.(heads|groups)\[\d+\]\.(q|k|v)", str(path)):
            layer = counts.setdefault(int(found[1]), {})
            layer[found[3]] = layer.get(found[3], 0) + 1
    if not counts or sorted(counts) != list(range(len(counts))):
        return None
    layers: list[LayerShape] = []
    at_sender = {path: number for number, path in enumerate(senders)}
    at_receiver = {path: number for number, path in enumerate(receivers)}
    for number in range(len(counts)):
        heads, keys, values = (counts[number].get(part, 0) for part in "qkv")
        head = at_sender.get(address(f"layers[{number}].heads[0]", "sender"))
        mlp = at_receiver.get(address(f"layers[{number}].mlp", "receiver"))
        if head is None or mlp is None or not keys or keys != values or heads % keys:
            return None
        layers.append(LayerShape(heads, keys, not joined[head, mlp]))
    shape = Shape(tuple(layers))
    return shape if set(shape.receivers) == set(receivers) and set(shape.senders) >= set(senders) else None


def greedy(scores: Scores, k: int, shape: Shape, by: By) -> list[int]:
    """The numbers of k edges, grown backwards from `unembed`: always the best edge into the circuit so far.

    Fewer if no edge is left that leads into it.
    """
    sizes = np.abs(scores.values) if by == "absolute" else scores.values
    into: dict[Path, list[int]] = {}
    for number, (_, receiver) in enumerate(scores.of):  # type: ignore[misc]
        into.setdefault(receiver, []).append(number)
    heap: list[tuple[float, int]] = []
    opened: set[Path] = set()
    there: set[Path] = set()

    def opens(receivers: Sequence[Path]) -> None:
        for receiver in receivers:
            if receiver not in opened:
                opened.add(receiver)
                for number in into.get(receiver, ()):
                    heapq.heappush(heap, (-float(sizes[number]), number))

    opens([shape.receivers[-1]])
    chosen: list[int] = []
    while heap and len(chosen) < k:
        _, number = heapq.heappop(heap)
        chosen.append(number)
        sender = scores.of[number][0]  # type: ignore[index]
        if sender not in there:
            there.add(sender)
            opens([shape.receivers[r] for r in shape.reads_of(shape.sender_number[whole_of(sender)])])
    return chosen
