"""`Circuit`: a set of nodes of a model, or of edges between them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np

from nnsplice import plots
from nnsplice.activations.prompts import PromptsLike
from nnsplice.circuits import algebra, checking, files, making, masks, measuring, page
from nnsplice.circuits.ablations import Ablation
from nnsplice.circuits.addresses import address
from nnsplice.circuits.drawing import Drawing, draw
from nnsplice.circuits.masks import EdgeMask
from nnsplice.circuits.members import (
    Edge,
    by_layer,
    checked_edges,
    checked_nodes,
    in_degree,
    in_order,
    nodes_of,
    summary,
    text_of,
)
from nnsplice.circuits.origin import graph_of, provenance_of
from nnsplice.circuits.scores import By
from nnsplice.circuits.shape import Shape
from nnsplice.errors import BadArgument
from nnsplice.metrics import Metrics
from nnsplice.paths import Path, Paths
from nnsplice.results import SweepResult

Kind = Literal["nodes", "edges"]


@dataclass(frozen=True, eq=False, repr=False)
class Circuit:
    """A circuit: nodes of a model, or edges between them, as an immutable value.

    Senders are `embed`, `layers[i].heads[j]`, `layers[i].mlp` and `layers[i].experts[e]`, at all tokens or at some
    (`layers[i].heads[j][-1]`). Receivers are `layers[i].heads[j].q`, `layers[i].groups[g].k`, `layers[i].groups[g].v`,
    `layers[i].mlp` and `unembed`. Circuits with the same members are equal.

    >>> circuit = ns.Circuit.of(edges=[("embed", "layers[0].mlp"), ("layers[0].mlp", "unembed")])
    >>> len(circuit), ("embed", "layers[0].mlp") in circuit
    (2, True)
    >>> kept = circuit.run(model, "w3 w4 w5", "w3 w6 w5", ns.logit_diff("w7", "w8"))
    >>> kept.shape
    (1,)

    Attributes:
        kind: `"nodes"` or `"edges"`.
        nodes: the nodes; for a circuit of edges, the ends of its edges.
        edges: the (sender, receiver) pairs; empty for a circuit of nodes.
        scores: a score for each member, if it was chosen by scores.
        shape: the graph of the model, if known.
        provenance: model, weights, method and metric, as plain data.
    """

    kind: Kind
    nodes: tuple[Path, ...]
    edges: tuple[Edge, ...] = ()
    scores: tuple[float, ...] | None = None
    shape: Shape | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in ("nodes", "edges"):
            raise BadArgument(f"kind={self.kind!r}", expected='"nodes" or "edges"')
        if self.kind == "nodes" and self.edges:
            raise BadArgument("a circuit of nodes has no edges", write="Circuit.of(edges=[...])")
        check = checked_nodes if self.kind == "nodes" else checked_edges
        members, scores = in_order(self.kind, check(self.members, self.shape), self.scores)
        object.__setattr__(self, self.kind, members)
        object.__setattr__(self, "scores", scores)
        if self.kind == "edges":
            object.__setattr__(self, "nodes", nodes_of(self.edges))

    # --- making one

    @classmethod
    def of(
        cls,
        nodes: Paths | None = None,
        edges: Iterable[tuple[str | Path, str | Path]] | None = None,
        *,
        model: Any = None,
        scores: Iterable[float] | None = None,
    ) -> Circuit:
        """A circuit of given nodes, or of given edges.

        >>> ns.Circuit.of(nodes=["embed", "layers[0].heads[:]"], model=model)
        Circuit of 5 nodes: embed, 4 heads

        Args:
            nodes: paths of nodes.
            edges: pairs of a sender and a receiver.
            model: resolves paths with slices, and checks that all of them exist.
            scores: one for each member.

        Raises:
            BadArgument: neither nodes nor edges, or both, or another number of scores.
            BadType: edges that are no pairs.
        """
        made = cls(*making.given_members(nodes, edges, model, scores))
        return made if model is None else replace(made, provenance=provenance_of(model, made.nodes))

    @classmethod
    def top(cls, result: SweepResult, k: int, by: By = "absolute", *, model: Any = None) -> Circuit:
        """The k edges with the best scores; of a result without edges, the k best nodes and `embed`.

        Scores are averaged over prompts, and ties are in execution order. Nothing is pruned: see `pruned()`. Of an
        ablation (`ns.ablate`, or `ns.sweep` with any operation but `"patch"` and `"add"`) the score is what is lost.

        Args:
            result: a result with scores, such as that of `ns.attribute` or `ns.ablate`.
            k: the number of members.
            by: `"absolute"`, or `"signed"` for the edges that raise the metric most.
            model: the model, for a result that does not name all edges.
        """
        return cls(*making.top_members(result, k, by, model))

    @classmethod
    def select(cls, result: SweepResult, share: float, by: By = "absolute", *, model: Any = None) -> Circuit:
        """The best share of all scored edges or nodes, as `top`: `Circuit.select(result, 0.02)`.

        Args:
            result: a result with scores.
            share: the share, from 0 to 1.
            by: `"absolute"` or `"signed"`.
            model: the model, for a result that does not name all edges.

        Raises:
            BadArgument: a share outside 0 to 1.
        """
        return cls(*making.top_share(result, share, by, model))

    @classmethod
    def greedy(cls, result: SweepResult, k: int, by: By = "absolute", *, model: Any = None) -> Circuit:
        """k edges grown backwards from `unembed`: always the best one that leads into the circuit.

        Args:
            result: a result with scores of edges.
            k: the number of edges.
            by: `"absolute"` or `"signed"`.
            model: the model, for a result that does not name all edges.

        Raises:
            BadArgument: a result without edges, or one that does not name all of them.
        """
        return cls(*making.grown(result, k, by, model))

    @classmethod
    def full(cls, model: Any) -> Circuit:
        """The circuit of all edges; its run is the clean run.

        >>> len(ns.Circuit.full(model)), len(ns.Circuit.empty(model))
        (262, 0)

        Args:
            model: a model from `ns.load`.
        """
        shape = graph_of(model)
        return cls("edges", (), shape.edges(shape.exists), None, shape, provenance_of(model))

    @classmethod
    def empty(cls, model: Any) -> Circuit:
        """The circuit without edges; in its run everything is ablated.

        Args:
            model: a model from `ns.load`.
        """
        return cls("edges", (), (), None, graph_of(model), provenance_of(model))

    # --- algebra

    @property
    def members(self) -> tuple[Any, ...]:
        """The nodes of a circuit of nodes, or the edges of one of edges."""
        return self.nodes if self.kind == "nodes" else self.edges

    def __or__(self, other: Circuit) -> Circuit:
        return self._with(algebra.union(self, other), other)

    def __and__(self, other: Circuit) -> Circuit:
        return self._with(algebra.intersection(self, other), other)

    def __sub__(self, other: Circuit) -> Circuit:
        return self._with(algebra.difference(self, other), other)

    def __invert__(self) -> Circuit:
        return self._with(algebra.complement(self), self)

    def _with(self, members: list[Any], other: Circuit) -> Circuit:
        parts = (tuple(members), ()) if self.kind == "nodes" else ((), tuple(members))
        made = Circuit(self.kind, *parts, algebra.kept_scores(members, self, other), self.shape or other.shape)
        return replace(made, provenance=algebra.kept_provenance(made.nodes, self, other))

    def __contains__(self, one: object) -> bool:
        if isinstance(one, tuple | list):
            if self.kind == "nodes":
                raise BadArgument("a circuit of nodes has no edges", write='"layers[0].heads[1]" in circuit')
            sender, receiver = one
            return (address(sender, "sender"), address(receiver, "receiver")) in self._set
        return address(one, "sender") in (self._set if self.kind == "nodes" else set(self.nodes))  # type: ignore[arg-type]

    @cached_property
    def _set(self) -> frozenset[Any]:
        return frozenset(self.members)

    def __len__(self) -> int:
        return len(self.members)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.members)

    def __bool__(self) -> bool:
        return bool(self.members)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Circuit):
            return NotImplemented
        return (self.kind, self.members) == (other.kind, other.members)

    def __hash__(self) -> int:
        return hash((self.kind, self.members))

    @cached_property
    def digest(self) -> str:
        """A short hash of the members."""
        text = "\n".join([self.kind, *map(text_of, self.members)])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def iou(self, other: Circuit) -> float:
        """Intersection over union of the members; 1 for two empty circuits.

        Args:
            other: a circuit of the same kind.
        """
        return algebra.iou(self, other)

    def pruned(self) -> Circuit:
        """The edges that are on a path from `embed` to `unembed`.

        With `ablation="patch"` pruning does not change the run. Where a norm takes the queries or keys of all heads
        together (OLMo 2), each head reads those of all; circuits made with `model=` know that.

        >>> loose = ns.Circuit.of(edges=[("embed", "unembed"), ("layers[0].mlp", "unembed")], model=model)
        >>> [str(sender) for sender, _ in loose.pruned().edges]
        ['embed']

        Raises:
            BadArgument: a circuit of nodes.
        """
        return replace(self._with(algebra.pruned(self), self), provenance=self.provenance)

    # --- structure

    @property
    def in_degree(self) -> dict[Path, int]:
        """The number of edges into each receiver."""
        return in_degree(self.edges)

    def layers(self) -> dict[int, tuple[Path, ...]]:
        """The nodes by layer."""
        return by_layer(self.nodes)

    def to_networkx(self) -> Any:
        """A directed graph of networkx, with addresses as nodes and scores on edges.

        An edge to a head's queries is one to the head, with the attribute `into="q"`. An edge to a group's keys ends at
        `layers[i].groups[g]`, with further edges to each of its heads.
        """
        from nnsplice.circuits.networks import network_of

        return network_of(self.edges, self.nodes, self.scores if self.kind == "edges" else None, self.shape)

    def mask(self, shape: Shape) -> np.ndarray:
        """The edges as booleans in the graph of a model, `[receiver, sender]`; of nodes, all edges from one of them.

        An edge from a part of a sender, some tokens or an expert, is one from the sender.

        Args:
            shape: the graph.

        Raises:
            UnknownPath: a node that the graph does not have.
        """
        checked = self if self.shape == shape else replace(self, shape=shape)
        return masks.mask_of(checked.nodes if self.kind == "nodes" else (), checked.edges, shape)

    def parts(self, shape: Shape) -> EdgeMask:
        """The edges in the graph of a model, with the part of its sender that each carries.

        Args:
            shape: the model's graph.
        """
        return masks.with_parts(self.mask(shape), self.members, shape)

    # --- running

    def run(
        self,
        model: Any,
        clean: PromptsLike,
        corrupted: PromptsLike | None,
        metric: Metrics,
        *,
        ablation: Ablation = "patch",
        reference: PromptsLike | None = None,
        max_tokens: int | None = None,
    ) -> np.ndarray:
        """Run the circuit with everything outside ablated: the metric `[prompt]`, or of several `[prompt, metric]`.

        In a circuit of edges, each receiver reads a stream in which the senders of its edges have the values of this
        run, and all other senders the ablated ones. In a circuit of nodes, all nodes outside are replaced, `embed`
        included.

        Args:
            model: a model from `ns.load`, in eval mode.
            clean: the prompts on which the circuit runs.
            corrupted: the prompts that ablated values are taken from; None for an ablation that needs none.
            metric: one metric of single tokens, such as `ns.logit_diff(answer, wrong)`.
            ablation: `"patch"`, the corrupted run's values at the same tokens; `"zero"`; `"mean"` over tokens and
                prompts of `reference`; or a `SavedActivation` with a value for `embed.output` and every head and MLP.
            reference: the prompts of `"mean"`, if not the corrupted ones.
            max_tokens: the number of tokens that run at once; chosen for the device if left out.

        Raises:
            BadArgument: an ablation without the prompts that it needs, or a circuit of nodes without `embed`.
            ShapeError: prompts that are no pairs of one length, with `ablation="patch"`.
            RefusedPlace: a model in which the circuit of all edges is not the clean run.
            KeyMismatch: a circuit of another model.
        """
        question = measuring.Question.of(model, clean, corrupted, metric, ablation, reference, several=True)
        found = measuring.measure(question, [self.checked_mask(question)], max_tokens=max_tokens)
        return found.values[:, 0]

    def checked_mask(self, question: measuring.Question) -> EdgeMask:
        """The circuit's edges in the graph of a question's model.

        Args:
            question: model, prompts, metric and ablation.

        Raises:
            KeyMismatch: a circuit of another model.
            BadArgument: a circuit of nodes without `embed`, whose run would be the corrupted one.
        """
        return checking.checked_mask(self, question)

    def whole_mask(self, question: measuring.Question, who: str) -> np.ndarray:
        """`checked_mask` of a circuit without parts of senders.

        Args:
            question: model, prompts, metric and ablation.
            who: the caller that takes whole senders only, for the error.

        Raises:
            BadArgument: a node is a part of a sender.
        """
        checking.check_whole(self.nodes, who)
        return self.checked_mask(question).edges

    def on(self, model: Any) -> Circuit:
        """The same circuit in another model that has all of its nodes.

        Args:
            model: a model from `ns.load`.

        Raises:
            UnknownPath: a node that the model does not have.
        """
        about = {"taken over from": dict(self.provenance)} if self.provenance else {}
        return replace(self, shape=graph_of(model), provenance={**provenance_of(model, self.nodes), **about})

    # --- files

    def to_file(self, path: str | os.PathLike[str]) -> None:
        """Write a JSON file with members, scores and provenance, completely or not at all.

        Args:
            path: the file to write.
        """
        files.write(path, files.record_of(self))

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Circuit:
        """Read a circuit of `to_file`.

        Args:
            path: the file.

        Raises:
            FileError: the file is no circuit, or damaged.
        """
        return cls(*files.fields_of(files.read(path)))

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write a graph of EAP-IG (`a0.h1->m0`, `m0->a1.h2<q>`), the format of the MIB benchmark.

        That format has keys and values for each query head, so an edge to a group is written for all its heads.

        Args:
            path: the file to write.
        """
        files.write(path, files.graph_of_circuit(self))

    @classmethod
    def from_json(cls, path: str | os.PathLike[str], *, model: Any = None) -> Circuit:
        """Read a graph of EAP-IG.

        Args:
            path: the file.
            model: the model, needed where heads share keys and values: the file does not have the groups. An edge to
                some heads of a group becomes an edge to the group, and a warning counts these.

        Raises:
            FileError: the file is no such graph, or of another model.
        """
        shape, found = files.read_graph(path, None if model is None else graph_of(model))
        edges = tuple((shape.senders[s], shape.receivers[r]) for r, s, _ in found)
        about = {} if model is None else provenance_of(model)
        return cls("edges", (), edges, tuple(score for _, _, score in found), shape, about)

    # --- shown

    def plot(self, *, ax: plots.Axes | None = None) -> plots.Axes:
        """Draw the circuit: layers upwards, heads in columns, MLPs beside them, edges as wide as their score.

        Args:
            ax: axes to draw on; a new figure if left out.
        """
        return draw(self._drawing(), repr(self), ax)

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write a self-contained HTML page; hovering over an edge shows its score, and a slider filters edges.

        Args:
            path: the file to write.
        """
        nodes = None
        if self.kind == "nodes" and self.scores is not None:
            nodes = dict(zip(map(str, self.nodes), self.scores, strict=True))
        page.write(path, self._drawing(), repr(self), self.provenance, nodes)

    def _drawing(self) -> Drawing:
        scores = self.scores if self.kind == "edges" else None
        return Drawing.of(self.nodes, self.edges, scores, self.shape)

    def __repr__(self) -> str:
        return summary(self.kind, self.members, self.nodes)
