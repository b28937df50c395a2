"""The fields of a `Circuit`, from given members or from the scores of a result."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from nnsplice import engine
from nnsplice.circuits.origin import check_model, expanded, graph_of
from nnsplice.circuits.scores import By, Scores, count_of, greedy, scores_of
from nnsplice.circuits.shape import Shape
from nnsplice.errors import BadArgument, BadType
from nnsplice.paths import Path, Paths, parse_path
from nnsplice.results import SweepResult

#: kind, nodes, edges, scores, shape, provenance
CircuitFields = tuple[Any, tuple[Any, ...], tuple[Any, ...], tuple[float, ...] | None, Shape | None, Mapping[str, Any]]


def given_members(
    nodes: Paths | None,
    edges: Iterable[tuple[str | Path, str | Path]] | None,
    model: Any,
    scores: Iterable[float] | None,
) -> CircuitFields:
    """A circuit of given nodes or edges."""
    if (nodes is None) == (edges is None):
        raise BadArgument("a circuit is made of nodes or of edges", expected="one of nodes= and edges=")
    shape = None if model is None else graph_of(model)
    given = None if scores is None else tuple(scores)
    if nodes is not None:
        listed = engine.listed(nodes)
        found = [path for one in listed for path in ([one] if model is None else expanded(model, one))]
        if given is not None and len(found) != len(given):
            raise BadArgument(f"{len(given)} scores for {len(found)} nodes", expected="one for each")
        return "nodes", tuple(found), (), given, shape, {}
    if isinstance(edges, str | Path):
        raise BadType(f"{edges} is no list of edges", expected="pairs of a sender and a receiver")
    return "edges", (), tuple(edges or ()), given, shape, {}


def top_members(result: SweepResult, k: int, by: By, model: Any) -> CircuitFields:
    """The k members with the best scores."""
    scores = scores_of(result)
    chosen = scores.order(by)[: scores.check(k)]
    return _chosen(scores, chosen, model, {"chosen": "top", "k": int(k), "by": by})


def top_share(result: SweepResult, share: float, by: By, model: Any) -> CircuitFields:
    """The share of members with the best scores."""
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
        raise BadArgument(f"a share of {share!r}", expected="0 to 1", write="Circuit.top(result, k) for a number")
    return top_members(result, count_of(share, len(scores_of(result).of)), by, model)


def grown(result: SweepResult, k: int, by: By, model: Any) -> CircuitFields:
    """k edges grown backwards from `unembed`."""
    scores = scores_of(result)
    if scores.kind != "edges":
        raise BadArgument(
            "greedy follows edges, and this result has scores of nodes alone",
            expected="a result with edges",
            write='ns.attribute(..., method="eap-ig")',
        )
    k = scores.check(k)
    scores.order(by)
    shape = scores.shape if model is None else graph_of(model)
    if shape is None:
        raise BadArgument(
            "this result does not name all edges, so which head belongs to which group is not known",
            write="Circuit.greedy(result, k, model=model)",
        )
    return _chosen(scores, greedy(scores, k, shape, by), model, {"chosen": "greedy", "k": k, "by": by})


def _chosen(scores: Scores, chosen: Iterable[int], model: Any, how: Mapping[str, Any]) -> CircuitFields:
    members = [scores.of[number] for number in chosen]
    values = [float(scores.values[number]) for number in chosen]
    if model is not None:
        check_model(scores.provenance, model, scores.senders)
    shape = scores.shape if model is None else graph_of(model)
    about = {**scores.provenance, **how}
    if scores.kind == "edges":
        return "edges", (), tuple(members), tuple(values), shape, about
    embed = parse_path("embed")
    if embed not in scores.of:
        # Without it nothing of the prompt enters the circuit, and results of heads have no score for it.
        members, values = [embed, *members], [0.0, *values]
    return "nodes", tuple(members), (), tuple(values), shape, about
