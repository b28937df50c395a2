"""The members of a circuit: canonical addresses, checked against the model, in execution order."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from nnsplice.circuits.addresses import Role, address, part_of, whole_of
from nnsplice.circuits.shape import Shape
from nnsplice.errors import BadArgument, BadType, UnknownPath, closest
from nnsplice.paths import Path

Edge = tuple[Path, Path]


def checked_nodes(nodes: Iterable[str | Path], shape: Shape | None) -> list[Path]:
    """Nodes by their one spelling.

    Raises:
        UnknownPath: the graph has no such node.
    """
    found = [address(node, "sender") for node in nodes]
    for node in found:
        _check_there(node, "sender", shape)
    return found


def checked_edges(given: Iterable[Any], shape: Shape | None) -> list[Edge]:
    """Edges by the one spelling of their ends.

    Raises:
        BadArgument: one leads against the order in which a model runs.
        UnknownPath: the graph has no such site.
    """
    edges: list[Edge] = []
    for edge in given:
        if not isinstance(edge, tuple | list) or len(edge) != 2:
            raise BadType(
                f"{edge!r} is no edge", expected="a pair of a sender and a receiver",
                write='("layers[0].heads[1]", "layers[2].mlp")',
            )  # fmt: skip
        sender, receiver = address(edge[0], "sender"), address(edge[1], "receiver")
        _check_there(sender, "sender", shape)
        _check_there(receiver, "receiver", shape)
        if not runs_before(sender, receiver, shape):
            raise BadArgument(
                f"{sender} runs after {receiver} reads the stream, so there is no edge from it",
                expected="a sender that runs before the receiver",
                write="ns.Circuit.full(model).edges   (all that there are)",
            )
        edges.append((sender, receiver))
    return edges


def _check_there(path: Path, role: Role, shape: Shape | None) -> None:
    if shape is None:
        return
    known = shape.sender_number if role == "sender" else shape.receiver_number
    if (whole_of(path) if role == "sender" else path) not in known:
        raise UnknownPath(
            f"this model has no {role} {path}",
            expected=closest(str(path), map(str, known)),
            write=f"ns.Circuit.full(model).{'nodes' if role == 'sender' else 'in_degree'}   (all {role}s)",
        )


def runs_before(sender: Path, receiver: Path, shape: Shape | None) -> bool:
    """Whether there is an edge; without a model's graph, whether a model can have it."""
    if shape is not None:
        return bool(shape.exists[shape.receiver_number[receiver], shape.sender_number[whole_of(sender)]])
    if sender.steps[-1].name == "embed" or receiver.steps[-1].name == "unembed":
        return True
    above, below = int(sender.steps[0].index), int(receiver.steps[0].index)  # type: ignore[arg-type]
    # Within a layer, heads may send to the MLP where it comes after them: that depends on the model.
    same = above == below and sender.steps[-1].name == "heads" and receiver.steps[-1].name == "mlp"
    return above < below or same


_KINDS = {"embed": -1, "heads": 0, "groups": 1, "mlp": 3, "experts": 4, "unembed": 5}


def order_of(path: Path) -> tuple[int, ...]:
    """When a site runs; in one layer, queries come before keys, keys before values, and the MLP last."""
    last = path.steps[-1]
    layer = {"embed": -1, "unembed": 1 << 30}.get(last.name, path.steps[0].index)
    index = last.index if len(path.steps) > 1 and isinstance(last.index, int) else 0
    return int(layer), _KINDS[last.name] + (path.value == "v"), index  # type: ignore[arg-type]


def rank_of(member: Path | Edge) -> tuple[Any, ...]:
    """When a node runs, or an edge's sender and then its receiver."""
    if isinstance(member, tuple):
        return (*map(order_of, member), str(member[0].position), _number(member[0]))
    return (order_of(member), str(member.position), _number(member))


def _number(path: Path) -> tuple[str, int]:
    """The order of features of one MLP; the error comes first."""
    if path.sae is None:
        return ("", -1)
    return (path.sae.name, path.sae.features if isinstance(path.sae.features, int) else -1)


def in_order(
    kind: str, members: Sequence[Any], scores: Sequence[float] | None
) -> tuple[tuple[Any, ...], tuple[float, ...] | None]:
    """Members once each in execution order, and their scores; of one that is there twice, the first score.

    Raises:
        BadArgument: another number of scores, or a score that is NaN.
    """
    if scores is not None and len(scores) != len(members):
        raise BadArgument(f"{len(scores)} scores for {len(members)} {kind}", expected="one for each")
    kept: dict[Any, float] = {}
    for number in sorted(range(len(members)), key=lambda number: rank_of(members[number])):
        score = 0.0 if scores is None else float(scores[number])
        if score != score:
            raise BadArgument(f"the score of {text_of(members[number])} is NaN", expected="a number")
        kept.setdefault(members[number], score)
    return tuple(kept), None if scores is None else tuple(kept.values())


def nodes_of(edges: Iterable[Edge]) -> tuple[Path, ...]:
    """The nodes that edges start from, and those whose queries or MLPs they end at."""
    found: dict[Path, None] = {}
    for sender, receiver in edges:
        found.setdefault(sender)
        if receiver.steps[-1].name in ("heads", "mlp"):
            found.setdefault(address(re.sub(r"\.q$", "", str(receiver)), "sender"))
    return tuple(sorted(found, key=rank_of))


def in_degree(edges: Iterable[Edge]) -> dict[Path, int]:
    """The number of edges into each receiver, in execution order."""
    found = Counter(receiver for _, receiver in edges)
    return {receiver: found[receiver] for receiver in sorted(found, key=order_of)}


def by_layer(nodes: Iterable[Path]) -> dict[int, tuple[Path, ...]]:
    """The nodes of each layer."""
    found: dict[int, tuple[Path, ...]] = {}
    for node in nodes:
        if node.steps[0].name == "layers":
            layer = int(node.steps[0].index)  # type: ignore[arg-type]
            found[layer] = (*found.get(layer, ()), node)
    return found


def text_of(member: Path | Edge) -> str:
    """A member in words."""
    return " -> ".join(map(str, member)) if isinstance(member, tuple) else str(member)


def summary(kind: str, members: Sequence[Path | Edge], nodes: Iterable[Path]) -> str:
    """A circuit in a line: how many members, and nodes of each kind."""
    counts = {"embed": 0, "head": 0, "MLP": 0, "expert": 0, "feature": 0, "error": 0}
    kinds = {"embed": "embed", "heads": "head", "mlp": "MLP", "experts": "expert"}
    for name, place in dict.fromkeys((node.steps[-1].name, node.place) for node in nodes):
        part = None if place.sae is None else "error" if place.sae.features is None else "feature"
        counts[part or kinds[name]] += 1
    parts = ["embed"] if counts["embed"] else []
    parts += [f"{n} {what}{'s' * (n != 1)}" for what, n in counts.items() if n and what != "embed"]
    what = kind if len(members) != 1 else kind[:-1]
    between = " between" if kind == "edges" else ":"
    return f"Circuit of {len(members)} {what}" + (f"{between} {', '.join(parts)}" if parts else "")


def check_parts(members: Iterable[Path | Edge], others: Iterable[Path | Edge], sign: str) -> None:
    """Raise if one circuit has a whole sender and the other a part of it, which cannot be subtracted.

    Raises:
        BadArgument: they have different parts of a sender.
    """
    mine, theirs = (_senders(some) for some in (members, others))
    for whole, parts in mine.items():
        if whole in theirs and (None in parts) != (None in theirs[whole]):
            raise BadArgument(
                f"circuit {sign} circuit, and one has all of {whole}, the other a part of it",
                expected="circuits that have the same parts of a sender",
            )


def _senders(members: Iterable[Path | Edge]) -> dict[Path, set[Any]]:
    found: dict[Path, set[Any]] = {}
    for member in members:
        sender = member[0] if isinstance(member, tuple) else member
        found.setdefault(whole_of(sender), set()).add(part_of(sender))
    return found
