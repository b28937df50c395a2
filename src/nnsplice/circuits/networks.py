"""Circuits as networkx graphs; the only file that imports networkx."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nnsplice.circuits.shape import Shape
from nnsplice.errors import MissingPackage
from nnsplice.paths import Path


def network_of(
    edges: Sequence[tuple[Path, Path]], nodes: Sequence[Path], scores: Sequence[float] | None, shape: Shape | None
) -> Any:
    """A graph with a node for each address and an edge for each sender and receiver."""
    try:
        import networkx
    except ImportError:
        raise MissingPackage("a graph needs networkx, which is not installed", write="pip install networkx") from None
    graph = networkx.DiGraph()
    graph.add_nodes_from(map(str, nodes))
    groups: dict[str, Path] = {}
    for number, (sender, receiver) in enumerate(edges):
        role = str(receiver.value or "stream")
        end = str(receiver).removesuffix(f".{receiver.value}") if receiver.value else str(receiver)
        if receiver.steps[-1].name == "groups":
            groups.setdefault(end, receiver)
        attributes = {} if scores is None else {"score": float(scores[number])}
        known = graph.get_edge_data(str(sender), end, default={})
        into = ",".join(dict.fromkeys([*filter(None, known.get("into", "").split(",")), role]))
        if scores is not None and "score" in known:
            attributes["score"] += known["score"]
        graph.add_edge(str(sender), end, into=into, **attributes)
    for end, group in groups.items():
        for head in _heads(group, shape):
            if head in graph:
                graph.add_edge(end, head, into="group")
    return graph


def _heads(group: Path, shape: Shape | None) -> list[str]:
    if shape is None:
        return []
    number, index = (int(step.index) for step in group.steps)  # type: ignore[arg-type]
    layer = shape.layers[number]
    size = layer.heads // layer.groups
    return [f"layers[{number}].heads[{head}]" for head in range(index * size, (index + 1) * size)]
