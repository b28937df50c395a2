"""Set operations on circuits: their members, and what is kept of scores and provenance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nnsplice.circuits import masks
from nnsplice.circuits.addresses import whole_of
from nnsplice.circuits.checking import CircuitLike, check_whole, known_shape
from nnsplice.circuits.members import Edge, check_parts
from nnsplice.circuits.origin import OF_MODEL, saes_in
from nnsplice.errors import BadArgument, BadType, KeyMismatch, named
from nnsplice.paths import Path


def check_alike(one: CircuitLike, other: CircuitLike, sign: str) -> None:
    """Raise for circuits of different kinds or models.

    Raises:
        BadType: the other is no circuit.
        KeyMismatch: their kinds or models differ.
    """
    if not isinstance(other, type(one)):
        raise BadType(f"circuit {sign} {named(other)}", expected="two circuits")
    if other.kind != one.kind:
        raise KeyMismatch(f"a circuit of {one.kind} {sign} one of {other.kind}", expected="two of one kind")
    if one.shape is not None and other.shape is not None and one.shape != other.shape:
        raise KeyMismatch(
            f"circuit {sign} circuit, of models with other heads or layers",
            expected="one model's",
            write="circuit.on(model)   (takes a circuit over, where that model has its sites)",
        )
    ours, theirs = one.provenance.get("weights"), other.provenance.get("weights")
    if ours and theirs and ours != theirs:
        raise KeyMismatch(
            f"circuit {sign} circuit, and they are of {one.provenance.get('model')} and of "
            f"{other.provenance.get('model')} with other weights",
            expected="circuits of one model",
            write="circuit.on(model)   (takes a circuit over to another model)",
        )
    mine, others = (saes_in(each.provenance, each.nodes) for each in (one, other))
    if name := next((name for name in mine if others.get(name, mine[name]) != mine[name]), None):
        raise KeyMismatch(
            f"circuit {sign} circuit, and an SAE {name!r} of one is another than that of the other",
            expected="circuits of one SAE",
        )


def union(one: CircuitLike, other: CircuitLike) -> list[Any]:
    """The members of both."""
    check_alike(one, other, "|")
    mine = set(one.members)
    return [*one.members, *(member for member in other.members if member not in mine)]


def intersection(one: CircuitLike, other: CircuitLike) -> list[Any]:
    """The members that are in both."""
    check_alike(one, other, "&")
    check_parts(one.members, other.members, "&")
    others = set(other.members)
    return [member for member in one.members if member in others]


def difference(one: CircuitLike, other: CircuitLike) -> list[Any]:
    """The members of the first that are not in the second."""
    check_alike(one, other, "-")
    check_parts(one.members, other.members, "-")
    others = set(other.members)
    return [member for member in one.members if member not in others]


def complement(one: CircuitLike) -> list[Any]:
    """The nodes or edges of the model that are not in a circuit."""
    shape = known_shape(one, "~circuit is all that is not in it")
    check_whole(one.nodes, "what is not in it depends on how many tokens and experts there are")
    mine = set(one.members)
    every = shape.senders if one.kind == "nodes" else shape.edges(shape.exists)
    return [member for member in every if member not in mine]


def iou(one: CircuitLike, other: CircuitLike) -> float:
    """Intersection over union; 1 for two empty circuits."""
    check_alike(one, other, "beside")
    mine, others = set(one.members), set(other.members)
    return len(mine & others) / len(mine | others) if mine or others else 1.0


def pruned(one: CircuitLike) -> list[Edge]:
    """The edges on a path from `embed` to `unembed`."""
    if one.kind == "nodes":
        raise BadArgument("a circuit of nodes has all edges between them", expected="a circuit of edges")
    shape = known_shape(one, "which heads read which group's keys says the model")
    mask, _ = masks.needed(shape, masks.mask_of((), one.edges, shape), from_embed=True)
    number = shape.sender_number
    return [edge for edge in one.edges if mask[shape.receiver_number[edge[1]], number[whole_of(edge[0])]]]


def kept_scores(members: Sequence[Any], one: CircuitLike, other: CircuitLike) -> tuple[float, ...] | None:
    """The scores of some members of two circuits, those of the first before; None unless all have one."""
    known = {**dict(zip(other.members, other.scores or (), strict=False)),
             **dict(zip(one.members, one.scores or (), strict=False))}  # fmt: skip
    return tuple(known[member] for member in members) if members and all(m in known for m in members) else None


def kept_provenance(nodes: Sequence[Path], one: CircuitLike, other: CircuitLike) -> dict[str, Any]:
    """The provenance that two circuits share, and the SAEs of these nodes."""
    found = {k: v for k, v in one.provenance.items() if other.provenance.get(k) == v and k in OF_MODEL}
    saes = {**saes_in(other.provenance, nodes), **saes_in(one.provenance, nodes)}
    return {**found, "saes": saes} if saes else found
