"""Unions, intersections and differences of circuits: what may be combined, and what is kept of scores and origin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from nnsplice.circuits.origin import OF_MODEL, saes_in
from nnsplice.circuits.shape import Shape
from nnsplice.errors import KeyMismatch
from nnsplice.paths import Path


class CircuitLike(Protocol):
    """What is read of a circuit here."""

    @property
    def kind(self) -> str: ...
    @property
    def nodes(self) -> tuple[Path, ...]: ...
    @property
    def members(self) -> tuple[Any, ...]: ...
    @property
    def scores(self) -> tuple[float, ...] | None: ...
    @property
    def shape(self) -> Shape | None: ...
    @property
    def provenance(self) -> Mapping[str, Any]: ...


def check_alike(one: CircuitLike, other: CircuitLike, sign: str) -> None:
    """Raise for two circuits that are not of one kind and one model.

    Raises:
        KeyMismatch: so it is.
    """
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


def kept_scores(members: Sequence[Any], one: CircuitLike, other: CircuitLike) -> tuple[float, ...] | None:
    """The scores of some members of two circuits, those of the first before; None unless all have one."""
    known = {**dict(zip(other.members, other.scores or (), strict=False)),
             **dict(zip(one.members, one.scores or (), strict=False))}  # fmt: skip
    return tuple(known[member] for member in members) if members and all(m in known for m in members) else None


def kept_provenance(nodes: Sequence[Path], one: CircuitLike, other: CircuitLike) -> dict[str, Any]:
    """What two circuits have in common of their model, and the SAEs of these nodes."""
    found = {k: v for k, v in one.provenance.items() if other.provenance.get(k) == v and k in OF_MODEL}
    saes = {**saes_in(other.provenance, nodes), **saes_in(one.provenance, nodes)}
    return {**found, "saes": saes} if saes else found
