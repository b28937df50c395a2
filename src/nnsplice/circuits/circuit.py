"""`Circuit`: a set of nodes of a model, or of edges between them."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np

from nnsplice import engine, plots
from nnsplice.activations.prompts import PromptsLike
from nnsplice.circuits import algebra, files, masks, measuring, page
from nnsplice.circuits.ablations import Ablation
from nnsplice.circuits.addresses import address, part_of, whole_of
from nnsplice.circuits.drawing import Drawing, draw
from nnsplice.circuits.masks import EdgeMask
from nnsplice.circuits.members import (
    Edge,
    check_parts,
    checked_edges,
    checked_nodes,
    in_order,
    nodes_of,
    order_of,
    summary,
    text_of,
)
from nnsplice.circuits.origin import check_model, expanded, graph_of, provenance_of
from nnsplice.circuits.scores import By, Scores, count_of, greedy, scores_of
from nnsplice.circuits.shape import Shape
from nnsplice.errors import BadArgument, BadType, named
from nnsplice.files import from_json
from nnsplice.files import text_of as read_text
from nnsplice.metrics import Metrics
from nnsplice.paths import Path, Paths, parse_path
from nnsplice.results import SweepResult

Kind = Literal["nodes", "edges"]


@dataclass(frozen=True, eq=False, repr=False)
class Circuit:
    """A circuit: nodes of a model, or edges between them, as an immutable value.

    Senders are `embed`, `layers[i].heads[j]`, `layers[i].mlp` and `layers[i].experts[e]`, at all tokens or at some
    (`layers[i].heads[j][-1]`); receivers are `layers[i].heads[j].q`,
    `layers[i].groups[g].k`, `layers[i].groups[g].v`, `layers[i].mlp` and `unembed`.

    >>> circuit = ns.Circuit.of(edges=[("embed", "layers[0].mlp"), ("layers[0].mlp", "unembed")])
    >>> len(circuit), ("embed", "layers[0].mlp") in circuit
    (2, True)
    >>> kept = circuit.run(model, "w3 w4 w5", "w3 w6 w5", ns.logit_diff("w7", "w8"))
    >>> kept.shape
    (1,)

    Two circuits are equal when they have the same members of one kind, whatever their scores and origin.

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

        Returns:
            The circuit.

        Raises:
            BadArgument: neither nodes nor edges, or both, or another number of scores.
            BadType: edges that are no pairs.
        """
        if (nodes is None) == (edges is None):
            raise BadArgument("a circuit is made of nodes or of edges", expected="one of nodes= and edges=")
        shape = None if model is None else graph_of(model)
        given = None if scores is None else tuple(scores)
        if nodes is not None:
            listed = engine.listed(nodes)
            found = [path for one in listed for path in ([one] if model is None else expanded(model, one))]
            if given is not None and len(found) != len(given):
                raise BadArgument(f"{len(given)} scores for {len(found)} nodes", expected="one for each")
            made = cls("nodes", tuple(found), (), given, shape)  # type: ignore[arg-type]
        elif isinstance(edges, str | Path):
            raise BadType(f"{edges} is no list of edges", expected="pairs of a sender and a receiver")
        else:
            made = cls("edges", (), tuple(edges or ()), given, shape)  # type: ignore[arg-type]
        return made if model is None else replace(made, provenance=provenance_of(model, made.nodes))

    @classmethod
    def top(cls, result: SweepResult, k: int, by: By = "absolute", *, model: Any = None) -> Circuit:
        """The k edges with the best scores; of a result without edges, the k best nodes and `embed`.

        Scores are averaged over prompts, and ties are in execution order. Nothing is pruned: see `pruned()`. Of an
        ablation (`ns.ablate`, or `ns.sweep` with any operation but `"patch"` and `"add"`) the score is what is lost.

        >>> metric = ns.logit_diff("w7", "w8")
        >>> sites = ["embed", "layers[:].heads[:]", "layers[:].mlp"]
        >>> scored = ns.attribute(model, "w3 w4 w5", "w3 w6 w5", sites, metric, method="eap", progress=False)
        >>> len(ns.Circuit.top(scored, 10))
        10

        Args:
            result: a result with scores, such as that of `ns.attribute` or `ns.ablate`.
            k: the number of members.
            by: `"absolute"`, or `"signed"` for the edges that raise the metric most.
            model: the model, for a result that does not name all edges.

        Returns:
            The circuit.
        """
        scores = scores_of(result)
        chosen = scores.order(by)[: scores.check(k)]
        return cls._chosen(scores, chosen, model, {"chosen": "top", "k": int(k), "by": by})

    @classmethod
    def select(cls, result: SweepResult, share: float, by: By = "absolute", *, model: Any = None) -> Circuit:
        """The best share of all scored edges or nodes, as `top`: `Circuit.select(result, 0.02)`.

        >>> metric = ns.logit_diff("w7", "w8")
        >>> scored = ns.ablate(model, "w3 w4 w5", ["layers[:].heads[:]", "layers[:].mlp"], metric, progress=False)
        >>> ns.Circuit.select(scored, 0.2)
        Circuit of 4 nodes: embed, 1 head, 2 MLPs

        Args:
            result: a result with scores.
            share: the share, from 0 to 1.
            by: `"absolute"` or `"signed"`.
            model: the model, for a result that does not name all edges.

        Returns:
            The circuit.

        Raises:
            BadArgument: a share outside 0 to 1.
        """
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
            raise BadArgument(f"a share of {share!r}", expected="0 to 1", write="Circuit.top(result, k) for a number")
        return cls.top(result, count_of(share, len(scores_of(result).of)), by, model=model)

    @classmethod
    def greedy(cls, result: SweepResult, k: int, by: By = "absolute", *, model: Any = None) -> Circuit:
        """k edges grown backwards from `unembed`: always the best one that leads into the circuit.

        >>> metric = ns.logit_diff("w7", "w8")
        >>> sites = ["embed", "layers[:].heads[:]", "layers[:].mlp"]
        >>> scored = ns.attribute(model, "w3 w4 w5", "w3 w6 w5", sites, metric, method="eap", progress=False)
        >>> circuit = ns.Circuit.greedy(scored, 5)
        >>> any(str(receiver) == "unembed" for _, receiver in circuit.edges)
        True

        Args:
            result: a result with scores of edges.
            k: the number of edges.
            by: `"absolute"` or `"signed"`.
            model: the model, for a result that does not name all edges.

        Returns:
            The circuit.

        Raises:
            BadArgument: a result without edges, or one that does not name all of them.
        """
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
        return cls._chosen(scores, greedy(scores, k, shape, by), model, {"chosen": "greedy", "k": k, "by": by})

    @classmethod
    def _chosen(cls, scores: Scores, chosen: Iterable[int], model: Any, how: Mapping[str, Any]) -> Circuit:
        members = [scores.of[number] for number in chosen]
        values = [float(scores.values[number]) for number in chosen]
        if model is not None:
            check_model(scores.provenance, model, scores.senders)
        shape = scores.shape if model is None else graph_of(model)
        about = {**scores.provenance, **how}
        if scores.kind == "edges":
            return cls("edges", (), tuple(members), tuple(values), shape, about)  # type: ignore[arg-type]
        embed = parse_path("embed")
        if embed not in scores.of:
            # Without it nothing of the prompt enters the circuit, and results of heads have no score for it.
            members, values = [embed, *members], [0.0, *values]
        return cls("nodes", tuple(members), (), tuple(values), shape, about)  # type: ignore[arg-type]

    @classmethod
    def full(cls, model: Any) -> Circuit:
        """The circuit of all edges; its run is the clean run.

        >>> len(ns.Circuit.full(model)), len(ns.Circuit.empty(model))
        (262, 0)

        Args:
            model: a model from `ns.load`.

        Returns:
            The circuit.
        """
        shape = graph_of(model)
        return cls("edges", (), shape.edges(shape.exists), None, shape, provenance_of(model))

    @classmethod
    def empty(cls, model: Any) -> Circuit:
        """The circuit without edges; in its run everything is ablated.

        >>> ns.Circuit.empty(model) | ns.Circuit.full(model) == ns.Circuit.full(model)
        True

        Args:
            model: a model from `ns.load`.

        Returns:
            The circuit.
        """
        return cls("edges", (), (), None, graph_of(model), provenance_of(model))

    # --- algebra

    @property
    def members(self) -> tuple[Any, ...]:
        """The nodes of a circuit of nodes, or the edges of one of edges."""
        return self.nodes if self.kind == "nodes" else self.edges

    def __or__(self, other: Circuit) -> Circuit:
        self._check_alike(other, "|")
        mine = set(self.members)
        return self._with([*self.members, *(one for one in other.members if one not in mine)], other)

    def __and__(self, other: Circuit) -> Circuit:
        self._check_alike(other, "&")
        check_parts(self.members, other.members, "&")
        others = set(other.members)
        return self._with([one for one in self.members if one in others], other)

    def __sub__(self, other: Circuit) -> Circuit:
        self._check_alike(other, "-")
        check_parts(self.members, other.members, "-")
        others = set(other.members)
        return self._with([one for one in self.members if one not in others], other)

    def __invert__(self) -> Circuit:
        shape = self._graph("~circuit is all that is not in it")
        self._check_whole("what is not in it depends on how many tokens and experts there are")
        every = shape.senders if self.kind == "nodes" else shape.edges(shape.exists)
        mine = set(self.members)
        return self._with([one for one in every if one not in mine], self)

    def _with(self, members: list[Any], other: Circuit) -> Circuit:
        parts = (tuple(members), ()) if self.kind == "nodes" else ((), tuple(members))
        made = Circuit(self.kind, *parts, algebra.kept_scores(members, self, other), self.shape or other.shape)
        return replace(made, provenance=algebra.kept_provenance(made.nodes, self, other))

    def _check_alike(self, other: object, sign: str) -> None:
        if not isinstance(other, Circuit):
            raise BadType(f"circuit {sign} {named(other)}", expected="two circuits")
        algebra.check_alike(self, other, sign)

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
        """A short hash of the members.

        >>> ns.Circuit.full(model).digest == ns.Circuit.empty(model).digest
        False
        """
        text = "\n".join([self.kind, *map(text_of, self.members)])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def iou(self, other: Circuit) -> float:
        """Intersection over union of the members; 1 for two empty circuits.

        >>> full = ns.Circuit.full(model)
        >>> full.iou(full), full.iou(ns.Circuit.empty(model))
        (1.0, 0.0)

        Args:
            other: a circuit of the same kind.

        Returns:
            A number from 0 to 1.
        """
        self._check_alike(other, "beside")
        either = len(self._set | other._set)
        return len(self._set & other._set) / either if either else 1.0

    def pruned(self) -> Circuit:
        """The edges that are on a path from `embed` to `unembed`.

        With `ablation="patch"` pruning does not change the run. Where a norm takes the queries or keys of all heads
        together (OLMo 2), each head reads those of all; circuits made with `model=` know that.

        >>> loose = ns.Circuit.of(edges=[("embed", "unembed"), ("layers[0].mlp", "unembed")], model=model)
        >>> [str(sender) for sender, _ in loose.pruned().edges]
        ['embed']

        Returns:
            The smaller circuit.

        Raises:
            BadArgument: a circuit of nodes.
        """
        if self.kind == "nodes":
            raise BadArgument("a circuit of nodes has all edges between them", expected="a circuit of edges")
        shape = self._graph("which heads read which group's keys says the model")
        mask, _ = masks.needed(shape, self.mask(shape), from_embed=True)
        number = shape.sender_number
        kept = [edge for edge in self.edges if mask[shape.receiver_number[edge[1]], number[whole_of(edge[0])]]]
        return replace(self._with(kept, self), provenance=self.provenance)

    # --- what it is like

    @property
    def in_degree(self) -> dict[Path, int]:
        """The number of edges into each receiver.

        >>> circuit = ns.Circuit.of(edges=[("embed", "unembed"), ("layers[0].mlp", "unembed")])
        >>> {str(receiver): n for receiver, n in circuit.in_degree.items()}
        {'unembed': 2}
        """
        found: dict[Path, int] = {}
        for _, receiver in self.edges:
            found[receiver] = found.get(receiver, 0) + 1
        return dict(sorted(found.items(), key=lambda pair: order_of(pair[0])))

    def layers(self) -> dict[int, tuple[Path, ...]]:
        """The nodes by layer."""
        found: dict[int, list[Path]] = {}
        for node in self.nodes:
            if node.steps[0].name == "layers":
                found.setdefault(int(node.steps[0].index), []).append(node)  # type: ignore[arg-type]
        return {layer: tuple(nodes) for layer, nodes in found.items()}

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

        Returns:
            The booleans.

        Raises:
            UnknownPath: a node that the graph does not have.
        """
        checked = self if self.shape == shape else replace(self, shape=shape)
        return masks.mask_of(checked.nodes if self.kind == "nodes" else (), checked.edges, shape)

    def parts(self, shape: Shape) -> EdgeMask:
        """Its edges in the graph of a model, with what each carries where that is a part of its sender.

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
        """Run the circuit with everything outside ablated, and measure the metric: `[prompt]`.

        Of several metrics, `[prompt, metric]`.

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
            max_tokens: how many tokens run at once; chosen for the device if left out.

        Returns:
            The metric of each prompt.

        Raises:
            BadArgument: several metrics, an ablation without the prompts that it needs, or a circuit of nodes without
                `embed`.
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

        Returns:
            The booleans `[receiver, sender]`.

        Raises:
            KeyMismatch: a circuit of another model.
            BadArgument: a circuit of nodes without `embed`, whose run would be the corrupted one.
        """
        check_model(self.provenance, question.model, self.nodes)
        mask = self.parts(question.wiring.shape)
        question.check_parts(self.members if self.kind == "nodes" else [s for s, _ in self.edges])
        if self.kind == "nodes" and self.nodes and not mask.edges[:, 0].any() and question.source.is_run:
            raise BadArgument(
                "this circuit of nodes is without embed, so nothing of the clean prompts enters it and its run is the "
                "corrupted one",
                expected="embed among the nodes",
                write='circuit | Circuit.of(nodes=["embed"])',
            )
        return mask

    def whole_mask(self, question: measuring.Question, who: str) -> np.ndarray:
        """`checked_mask`, of a circuit whose members are all of their senders.

        Args:
            question: the runs that it is for.
            who: what takes whole senders only, for the error.

        Raises:
            BadArgument: one is a part.
        """
        self._check_whole(who)
        return self.checked_mask(question).edges

    def _check_whole(self, why: str) -> None:
        part = next((one for one in self.nodes if part_of(one) is not None), None)
        if part is not None:
            raise BadArgument(f"{part} is a part of a sender, and {why}", expected=f"all of it: {whole_of(part)}")

    def on(self, model: Any) -> Circuit:
        """The same circuit in another model that has all of its nodes.

        >>> circuit = ns.Circuit.of(edges=[("embed", "unembed")])
        >>> circuit.on(model).provenance["model"]
        'GPT2LMHeadModel'

        Args:
            model: a model from `ns.load`.

        Returns:
            The circuit.

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
        members = list(map(str, self.nodes)) if self.kind == "nodes" else [[str(s), str(r)] for s, r in self.edges]
        files.write(path, {
            "format": files.FORMAT, "version": files.VERSION, "kind": self.kind, self.kind: members,
            "scores": None if self.scores is None else list(self.scores),
            "shape": None if self.shape is None else self.shape.as_list(), "provenance": dict(self.provenance),
        })  # fmt: skip

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Circuit:
        """Read a circuit of `to_file`.

        Args:
            path: the file.

        Returns:
            The circuit.

        Raises:
            FileError: the file is no circuit, or damaged.
        """
        record = files.read(path)
        shape = None if record.get("shape") is None else Shape.read(record["shape"])
        about = record.get("provenance")
        scores = None if record.get("scores") is None else tuple(map(float, record["scores"]))
        edges = tuple(tuple(edge) for edge in record.get("edges", ()))
        about = about if isinstance(about, dict) else {}
        return cls(record["kind"], tuple(record.get("nodes", ())), edges, scores, shape, about)  # type: ignore[arg-type]

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write a graph of EAP-IG (`a0.h1->m0`, `m0->a1.h2<q>`), the format of the MIB benchmark.

        That format has keys and values for each query head, so an edge to a group is written for all its heads.

        Args:
            path: the file to write.
        """
        shape = self._graph("that file lists all edges of the model")
        self._check_whole("that file has no names for parts")
        mask = self.mask(shape)
        scores = None
        if self.scores is not None and self.kind == "edges":
            scores = np.zeros(mask.shape)
            for (sender, receiver), score in zip(self.edges, self.scores, strict=True):
                scores[shape.receiver_number[receiver], shape.sender_number[sender]] = score
        files.write(path, files.to_graph(shape, mask, scores, int(self.provenance.get("width") or 1)))

    @classmethod
    def from_json(cls, path: str | os.PathLike[str], *, model: Any = None) -> Circuit:
        """Read a graph of EAP-IG.

        Args:
            path: the file.
            model: the model, needed where heads share keys and values: the file does not have the groups. An edge to
                some heads of a group becomes an edge to the group, and a warning counts these.

        Returns:
            The circuit.

        Raises:
            FileError: the file is no such graph, or of another model.
        """
        graph = from_json(read_text(path), path)
        shape, found, partial = files.from_graph(graph, path, None if model is None else graph_of(model))
        if partial:
            warnings.warn(
                f"{partial} edges lead to the keys or values of some heads of a group, which share them: they are "
                "taken for edges to the whole group",
                stacklevel=2,
            )
        edges = tuple((shape.senders[s], shape.receivers[r]) for r, s, _ in found)
        about = {} if model is None else provenance_of(model)
        return cls("edges", (), edges, tuple(score for _, _, score in found), shape, about)

    # --- shown

    def plot(self, *, ax: plots.Axes | None = None) -> plots.Axes:
        """Draw the circuit: layers upwards, heads in columns, MLPs beside them, edges as wide as their score.

        >>> circuit = ns.Circuit.of(edges=[("embed", "layers[0].mlp"), ("layers[0].mlp", "unembed")])
        >>> len(circuit.plot().lines)
        2

        Args:
            ax: axes to draw on; a new figure if left out.

        Returns:
            The axes; the figure is `axes.figure`.
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

    def _graph(self, why: str) -> Shape:
        if self.shape is None:
            raise BadArgument(
                f"{why}, and this circuit does not know its model's",
                write="circuit.on(model), or Circuit.of(..., model=model)",
            )
        return self.shape
