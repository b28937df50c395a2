"""Checks of a circuit: its model, whole senders, and `embed` among its nodes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from nnsplice.circuits.addresses import part_of, whole_of
from nnsplice.circuits.masks import EdgeMask
from nnsplice.circuits.members import Edge
from nnsplice.circuits.origin import check_model
from nnsplice.circuits.shape import Shape
from nnsplice.errors import BadArgument
from nnsplice.paths import Path

if TYPE_CHECKING:
    from nnsplice.circuits.measuring import Question


class CircuitLike(Protocol):
    """The fields of a circuit."""

    @property
    def kind(self) -> str: ...
    @property
    def nodes(self) -> tuple[Path, ...]: ...
    @property
    def members(self) -> tuple[Any, ...]: ...
    @property
    def edges(self) -> tuple[Edge, ...]: ...
    @property
    def scores(self) -> tuple[float, ...] | None: ...
    @property
    def shape(self) -> Shape | None: ...
    @property
    def provenance(self) -> Mapping[str, Any]: ...
    def parts(self, shape: Shape) -> EdgeMask: ...


def known_shape(circuit: CircuitLike, why: str) -> Shape:
    """The graph of a circuit's model.

    Raises:
        BadArgument: it is not known.
    """
    if circuit.shape is None:
        raise BadArgument(
            f"{why}, and this circuit does not know its model's",
            write="circuit.on(model), or Circuit.of(..., model=model)",
        )
    return circuit.shape


def check_whole(nodes: Iterable[Path], why: str) -> None:
    """Raise if a node is a part of a sender.

    Raises:
        BadArgument: a node is some tokens or an expert of a sender.
    """
    part = next((one for one in nodes if part_of(one) is not None), None)
    if part is not None:
        raise BadArgument(f"{part} is a part of a sender, and {why}", expected=f"all of it: {whole_of(part)}")


def checked_mask(circuit: CircuitLike, question: Question) -> EdgeMask:
    """A circuit's edges in the graph of a question's model, after the checks of `Circuit.checked_mask`."""
    check_model(circuit.provenance, question.model, circuit.nodes)
    mask = circuit.parts(question.wiring.shape)
    nodes = circuit.kind == "nodes"
    question.check_parts(circuit.members if nodes else [sender for sender, _ in circuit.edges])
    if nodes and circuit.nodes and not mask.edges[:, 0].any() and question.source.is_run:
        raise BadArgument(
            "this circuit of nodes is without embed, so nothing of the clean prompts enters it and its run is the "
            "corrupted one",
            expected="embed among the nodes",
            write='circuit | Circuit.of(nodes=["embed"])',
        )
    return mask
