"""Circuit files: nnsplice's own, and graphs of EAP-IG, which MIB uses."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any, TypeGuard

import numpy as np

from nnsplice.circuits.checking import CircuitLike, check_whole, known_shape
from nnsplice.circuits.making import CircuitFields
from nnsplice.circuits.shape import LayerShape, Shape
from nnsplice.errors import BadArgument, FileError
from nnsplice.files import from_json, text_of, whole
from nnsplice.warn import warn_caller

FORMAT = "nnsplice circuit"
VERSION = 1
#: The most layers and heads that a file is believed to have.
MOST = 4096


def write(path: str | os.PathLike[str], record: Mapping[str, Any]) -> None:
    """Write plain data as JSON, whole or not at all."""
    with whole(path) as temporary:
        temporary.write_text(json.dumps(record, ensure_ascii=False, allow_nan=False), encoding="utf-8")


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the record of a circuit.

    Raises:
        FileError: the file is no circuit, or damaged.
    """
    record = from_json(text_of(path), path)
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        graph = isinstance(record, dict) and {"cfg", "nodes", "edges"} <= record.keys()
        raise FileError(
            f"{path} is no circuit of nnsplice",
            expected="a file of circuit.to_file",
            write="Circuit.from_json(path)   (it is a graph of EAP-IG)" if graph else None,
        )
    if record.get("version") != VERSION:
        raise FileError(f"{path} is of version {record.get('version')!r}", expected=f"version {VERSION}")
    kind = record.get("kind")
    listed = record.get(kind) if isinstance(kind, str) else None
    if kind not in ("nodes", "edges") or not isinstance(listed, list) or not all(_listed(kind, one) for one in listed):
        raise FileError(
            f"{path} is damaged: its nodes or edges are no addresses", expected="what circuit.to_file wrote"
        )
    scores = record.get("scores")
    if scores is not None and (
        not isinstance(scores, list)
        or len(scores) != len(listed)
        or not all(isinstance(s, float | int) for s in scores)
    ):
        raise FileError(f"{path} is damaged: it has not one score for each of its {kind}")
    return record


def record_of(circuit: CircuitLike) -> dict[str, Any]:
    """A circuit as plain data, for `write`."""
    shape, kind = circuit.shape, circuit.kind
    members = list(map(str, circuit.nodes)) if kind == "nodes" else [[str(s), str(r)] for s, r in circuit.edges]
    return {
        "format": FORMAT, "version": VERSION, "kind": kind, kind: members,
        "scores": None if circuit.scores is None else list(circuit.scores),
        "shape": None if shape is None else shape.as_list(), "provenance": dict(circuit.provenance),
    }  # fmt: skip


def fields_of(record: Mapping[str, Any]) -> CircuitFields:
    """The fields of a circuit, of a record from `read`."""
    shape = None if record.get("shape") is None else Shape.read(record["shape"])
    about = record.get("provenance")
    scores = None if record.get("scores") is None else tuple(map(float, record["scores"]))
    edges = tuple(tuple(edge) for edge in record.get("edges", ()))
    about = about if isinstance(about, dict) else {}
    return record["kind"], tuple(record.get("nodes", ())), edges, scores, shape, about


def _listed(kind: str, one: Any) -> bool:
    if kind == "nodes":
        return isinstance(one, str)
    return isinstance(one, list) and len(one) == 2 and all(isinstance(end, str) for end in one)


# --- the graphs of EAP-IG ---------------------------------------------------------------------------------------------


def graph_of_circuit(circuit: CircuitLike) -> dict[str, Any]:
    """A circuit as a graph of EAP-IG."""
    shape = known_shape(circuit, "that file lists all edges of the model")
    check_whole(circuit.nodes, "that file has no names for parts")
    mask, scores = circuit.parts(shape).edges, None
    if circuit.scores is not None and circuit.kind == "edges":
        scores = np.zeros(mask.shape)
        for (sender, receiver), score in zip(circuit.edges, circuit.scores, strict=True):
            scores[shape.receiver_number[receiver], shape.sender_number[sender]] = score
    return to_graph(shape, mask, scores, int(circuit.provenance.get("width") or 1))


def read_graph(path: str | os.PathLike[str], shape: Shape | None) -> tuple[Shape, list[tuple[int, int, float]]]:
    """The edges of a graph of EAP-IG, `(receiver, sender, score)`; warns of groups that only some heads are in."""
    shape, found, partial = from_graph(from_json(text_of(path), path), path, shape)
    if partial:
        warn_caller(
            f"{partial} edges lead to the keys or values of some heads of a group, which share them: they are "
            "taken for edges to the whole group"
        )
    return shape, found


def to_graph(shape: Shape, mask: Any, scores: Any, width: int) -> dict[str, Any]:
    """A graph of EAP-IG: every edge by its name, with its score and whether it is in the circuit.

    That graph has keys and values for each query head. An edge to a group's is all of its heads' there, and its score
    is shared equally among them.

    Args:
        mask: `[receiver, sender]`
        scores: the same shape, or None.
    """
    sizes = {(layer.heads, layer.parallel) for layer in shape.layers}
    if len(sizes) != 1:
        raise BadArgument("its layers have different numbers of heads, which a graph of EAP-IG cannot say")
    ((heads, parallel),) = sizes
    edges: dict[str, Any] = {}
    for receiver, names in enumerate(_receiver_names(shape)):
        for sender, name in enumerate(_sender_names(shape)):
            if shape.exists[receiver, sender]:
                score = 0.0 if scores is None else float(scores[receiver, sender]) / len(names)
                for one in names:
                    edges[f"{name}->{one}"] = {"score": score, "in_graph": bool(mask[receiver, sender])}
    reads = [shape.reads_of(sender) for sender in range(len(shape.senders))]
    nodes = {
        name: {"in_graph": bool(mask[:, n].any() and (not reads[n] or mask[list(reads[n])].any()))}
        for n, name in enumerate(_sender_names(shape))
    }
    nodes["logits"] = {"in_graph": True}
    about = {"n_layers": len(shape.layers), "n_heads": heads, "parallel_attn_mlp": parallel, "d_model": width}
    return {"cfg": about, "nodes": nodes, "edges": edges}


def from_graph(record: Any, of: object, shape: Shape | None) -> tuple[Shape, list[tuple[int, int, float]], int]:
    """The edges of a graph of EAP-IG: `(receiver, sender, score)` for each; and how many groups were given in part.

    Args:
        shape: the graph of the model, needed where heads share keys and values, which the file does not have.

    Raises:
        FileError: it is no such graph.
    """
    if not isinstance(record, dict) or not {"cfg", "nodes", "edges"} <= record.keys():
        raise FileError(f"{of} is no graph of EAP-IG", expected="an object with cfg, nodes and edges")
    about, edges = record["cfg"], record["edges"]
    layers, heads = (about.get(name) if isinstance(about, dict) else None for name in ("n_layers", "n_heads"))
    if not _is_count(layers) or not _is_count(heads) or not isinstance(edges, dict):
        raise FileError(f"{of} does not say how many layers and heads there are", expected="cfg.n_layers, cfg.n_heads")
    own = Shape((LayerShape(heads, heads, bool(about.get("parallel_attn_mlp"))),) * layers)
    if shape is None:
        shape = own
    elif [(one.heads, one.parallel) for one in shape.layers] != [(one.heads, one.parallel) for one in own.layers]:
        raise FileError(
            f"{of} is of a model of {layers} layers with {heads} heads, and this is another",
            expected=f"a graph of {len(shape.layers)} layers with {shape.layers[0].heads} heads",
        )
    senders = {name: number for number, name in enumerate(_sender_names(shape))}
    receivers = {name: number for number, names in enumerate(_receiver_names(shape)) for name in names}
    members = [len(names) for names in _receiver_names(shape)]
    found: dict[tuple[int, int], list[float]] = {}
    for name, info in edges.items():
        start, arrow, end = name.partition("->")
        if not arrow or start not in senders or end not in receivers or not isinstance(info, dict):
            raise FileError(
                f"{of} has an edge {name!r}", expected="names such as a0.h1->m0, a0.h1->a2.h3<q>, m1->logits"
            )
        pair = receivers[end], senders[start]
        if not shape.exists[pair]:
            raise FileError(f"{of} has an edge {name!r}, against the order in which a model runs")
        if info.get("in_graph"):
            score = info.get("score")
            found.setdefault(pair, []).append(float(score) if isinstance(score, int | float) else 0.0)
    partial = sum(len(scores) != members[receiver] for (receiver, _), scores in found.items())
    return shape, [(receiver, sender, sum(scores)) for (receiver, sender), scores in found.items()], partial


def _is_count(record: Any) -> TypeGuard[int]:
    return isinstance(record, int) and not isinstance(record, bool) and 0 < record <= MOST


def _sender_names(shape: Shape) -> list[str]:
    names = ["input"]
    for number, layer in enumerate(shape.layers):
        names += [f"a{number}.h{head}" for head in range(layer.heads)] + [f"m{number}"]
    return names


def _receiver_names(shape: Shape) -> list[list[str]]:
    """For each receiver, the names of those of the graph that are it."""
    names: list[list[str]] = []
    for number, layer in enumerate(shape.layers):
        size = layer.heads // layer.groups
        names += [[f"a{number}.h{head}<q>"] for head in range(layer.heads)]
        for part in "kv":
            groups = [range(group * size, (group + 1) * size) for group in range(layer.groups)]
            names += [[f"a{number}.h{head}<{part}>" for head in heads] for heads in groups]
        names.append([f"m{number}"])
    return [*names, ["logits"]]
