"""`completeness` and `minimality`: nodes removed from the circuit and from the model.

Both take parts K out of the circuit and look at what that does. A complete circuit without K does what the model
without K does; in a minimal one every node matters once some others are out.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from nnsplice import closures
from nnsplice.activations.prompts import PromptsLike
from nnsplice.circuits.ablations import Ablation, refuse_training
from nnsplice.circuits.addresses import address
from nnsplice.circuits.circuit import Circuit
from nnsplice.circuits.measuring import Question, measure
from nnsplice.circuits.shape import Shape
from nnsplice.errors import BadArgument, BadType, circumstances, named
from nnsplice.metrics import MetricLike
from nnsplice.packed.cost import Cost
from nnsplice.paths import Path
from nnsplice.results import Run

if TYPE_CHECKING:
    import pandas as pd

Nodes = Iterable[str | Path]


@dataclass(frozen=True, eq=False)
class Completeness:
    """The metric of a circuit and of the model without the same nodes.

    Attributes:
        sets: the sets of removed nodes.
        found_by: how each set was found: `"given"`, `"random"` or `"greedy"`.
        circuit: the metric of the circuit without each set, `[prompt, set]`.
        model: the metric of the model without each set, `[prompt, set]`.
        run: the cost of the run.
    """

    sets: tuple[tuple[Path, ...], ...]
    found_by: tuple[str, ...]
    circuit: np.ndarray
    model: np.ndarray
    run: Run

    @property
    def scores(self) -> np.ndarray:
        """`[set]`: |m(C - K) - m(M - K)| of the mean metric; 0 is complete."""
        return np.abs(self.circuit.mean(0) - self.model.mean(0))

    def frame(self) -> pd.DataFrame:
        """A table with a row for each set, the largest score first."""
        import pandas as pd

        rows = pd.DataFrame(
            {
                "found by": self.found_by,
                "nodes": [" + ".join(map(str, nodes)) for nodes in self.sets],
                "n": [len(nodes) for nodes in self.sets],
                "circuit": self.circuit.mean(0),
                "model": self.model.mean(0),
                "score": self.scores,
            }
        )
        return rows.sort_values("score", ascending=False, kind="stable", ignore_index=True)


@dataclass(frozen=True, eq=False)
class Minimality:
    """The largest effect of each node of a circuit when others are removed.

    Attributes:
        nodes: the nodes of the circuit.
        scores: the largest |m(C - K - v) - m(C - K)| of the mean metric, `[node]`, over the sets K.
        sets: the set K of each score.
        run: the cost of the run.
    """

    nodes: tuple[Path, ...]
    scores: np.ndarray
    sets: tuple[tuple[Path, ...], ...]
    run: Run

    def frame(self) -> pd.DataFrame:
        """A table with a row for each node, the smallest score first."""
        import pandas as pd

        rows = pd.DataFrame(
            {
                "node": list(map(str, self.nodes)),
                "score": self.scores,
                "without": [" + ".join(map(str, nodes)) for nodes in self.sets],
            }
        )
        return rows.sort_values("score", kind="stable", ignore_index=True)


def completeness(
    model: Any,
    circuit: Circuit,
    clean: PromptsLike,
    corrupted: PromptsLike | None,
    metric: MetricLike,
    *,
    sets: Sequence[Nodes] = (),
    random: int = 10,
    greedy: int = 0,
    ablation: Ablation = "patch",
    reference: PromptsLike | None = None,
    max_tokens: int | None = None,
    progress: bool = True,
    seed: int = 0,
) -> Completeness:
    """Completeness of a circuit: |m(C - K) - m(M - K)| of circuit C and model M without sets K of the circuit's nodes.

    >>> circuit = ns.Circuit.of(nodes=["embed", "layers[:].mlp"], model=model)
    >>> pair = "w3 w4 w5", "w3 w4 w3"
    >>> report = ns.completeness(model, circuit, *pair, ns.logit_diff("w7", "w8"), random=2, greedy=1, progress=False)
    >>> sorted(report.frame()["found by"])
    ['greedy', 'random', 'random']

    Args:
        model: a model from `ns.load`, in eval mode.
        circuit: the circuit.
        clean: the prompts on which the circuit runs.
        corrupted: the prompts that ablated values are taken from; None for an ablation that needs none.
        metric: one metric of single tokens, such as `ns.logit_diff(answer, wrong)`.
        sets: sets of nodes to remove.
        random: the number of random sets; each node of the circuit is in a set with probability 1/2.
        greedy: the number of nodes removed one after the other, each time the one with the largest difference; every
            step measures all nodes of the circuit.
        ablation: `"patch"`, `"zero"`, `"mean"` or a `SavedActivation`, as for `Circuit.run`.
        reference: the prompts of `"mean"`, if not the corrupted ones.
        max_tokens: the number of tokens that run at once; chosen for the device if left out.
        progress: show a progress bar.
        seed: the seed of the random sets.

    Returns:
        The metric of circuit and model without each set.

    Raises:
        BadType: something other than a circuit, or than a list of nodes.
        BadArgument: an empty circuit, no sets, a node outside the circuit, or several metrics.
        ShapeError: prompts that are no pairs of one length, with `ablation="patch"`.
        RefusedPlace: a model in which the circuit of all edges is not the clean run.
        KeyMismatch: a circuit of another model.
    """
    start = time.perf_counter()
    with circumstances("ns.completeness"):
        one = _NodeRemoval.of(model, circuit, clean, corrupted, metric, ablation, reference, max_tokens, progress)
        chosen = [("given", one.checked(nodes)) for nodes in sets]
        chosen += [("random", nodes) for nodes in one.drawn(random, seed)]
        chosen += [("greedy", nodes) for nodes in _greedy(one, greedy)]
        if not chosen:
            raise BadArgument("no sets of nodes to take out", expected="sets=, random= or greedy=")
        here, there = one.without([nodes for _, nodes in chosen])
        about = Run("circuits", time.perf_counter() - start, **one.cost.as_dict(), gate=closures.passes_spent(model))
        found = tuple(tuple(one.shape.senders[n] for n in nodes) for _, nodes in chosen)
        return Completeness(found, tuple(by for by, _ in chosen), here, there, about)


def minimality(
    model: Any,
    circuit: Circuit,
    clean: PromptsLike,
    corrupted: PromptsLike | None,
    metric: MetricLike,
    *,
    sets: Sequence[Nodes] = (),
    random: int = 10,
    ablation: Ablation = "patch",
    reference: PromptsLike | None = None,
    max_tokens: int | None = None,
    progress: bool = True,
    seed: int = 0,
) -> Minimality:
    """Minimality of a circuit: for each node v, the largest |m(C - K - v) - m(C - K)| over sets K of other nodes.

    >>> circuit = ns.Circuit.of(nodes=["embed", "layers[:].mlp"], model=model)
    >>> pair = "w3 w4 w5", "w3 w4 w3"
    >>> report = ns.minimality(model, circuit, *pair, ns.logit_diff("w7", "w8"), random=2, progress=False)
    >>> sorted(report.frame()["node"])
    ['embed', 'layers[0].mlp', 'layers[1].mlp', 'layers[2].mlp']

    Args:
        model: a model from `ns.load`, in eval mode.
        circuit: the circuit.
        clean: the prompts on which the circuit runs.
        corrupted: the prompts that ablated values are taken from; None for an ablation that needs none.
        metric: one metric of single tokens, such as `ns.logit_diff(answer, wrong)`.
        sets: sets K to try with every node; the empty set is always tried.
        random: the number of random sets.
        ablation: `"patch"`, `"zero"`, `"mean"` or a `SavedActivation`, as for `Circuit.run`.
        reference: the prompts of `"mean"`, if not the corrupted ones.
        max_tokens: the number of tokens that run at once; chosen for the device if left out.
        progress: show a progress bar.
        seed: the seed of the random sets.

    Returns:
        The largest change of each node, with the set that gave it.

    Raises:
        BadType: something other than a circuit, or than a list of nodes.
        BadArgument: an empty circuit, a node outside the circuit, or several metrics.
        ShapeError: prompts that are no pairs of one length, with `ablation="patch"`.
        RefusedPlace: a model in which the circuit of all edges is not the clean run.
        KeyMismatch: a circuit of another model.
    """
    start = time.perf_counter()
    with circumstances("ns.minimality"):
        one = _NodeRemoval.of(model, circuit, clean, corrupted, metric, ablation, reference, max_tokens, progress)
        tried = [frozenset[int](), *map(frozenset, [*map(one.checked, sets), *one.drawn(random, seed)])]
        wanted: dict[frozenset[int], int] = {}
        for nodes in tried:
            for node in one.nodes:
                wanted.setdefault(nodes - {node}, len(wanted))
                wanted.setdefault(nodes | {node}, len(wanted))
        means = one.measured(one.mask, [sorted(nodes) for nodes in wanted]).mean(0)
        best = np.zeros(len(one.nodes))
        best_with: list[frozenset[int]] = [frozenset()] * len(one.nodes)
        for number, node in enumerate(one.nodes):
            for nodes in tried:
                moved = abs(means[wanted[nodes | {node}]] - means[wanted[nodes - {node}]])
                if moved > best[number]:
                    best[number], best_with[number] = moved, nodes - {node}
        about = Run("circuits", time.perf_counter() - start, **one.cost.as_dict(), gate=closures.passes_spent(model))
        paths = one.shape.senders
        found = tuple(tuple(paths[n] for n in sorted(nodes)) for nodes in best_with)
        return Minimality(tuple(paths[n] for n in one.nodes), best, found, about)


@dataclass
class _NodeRemoval:
    """A circuit from which nodes are removed."""

    question: Question
    mask: np.ndarray
    #: The circuit's nodes, by their numbers among the senders.
    nodes: tuple[int, ...]
    max_tokens: int | None
    progress: bool
    cost: Cost = field(default_factory=Cost)

    @classmethod
    def of(
        cls,
        model: Any,
        circuit: Circuit,
        clean: PromptsLike,
        corrupted: PromptsLike | None,
        metric: MetricLike,
        ablation: Ablation,
        reference: PromptsLike | None,
        max_tokens: int | None,
        progress: bool,
    ) -> _NodeRemoval:
        if not isinstance(circuit, Circuit):
            raise BadType(f"{named(circuit)} is no circuit", expected="an ns.Circuit")
        refuse_training(ablation, "taking parts out of a circuit")
        question = Question.of(model, clean, corrupted, metric, ablation, reference)
        mask = circuit.whole_mask(question, "nodes are taken out whole")
        numbers = question.wiring.shape.sender_number
        nodes = tuple(sorted(numbers[node] for node in circuit.nodes))
        if not nodes:
            raise BadArgument("an empty circuit has no nodes to take out", expected="a circuit with nodes")
        return cls(question, mask, nodes, max_tokens, progress)

    @property
    def shape(self) -> Shape:
        """The graph of the model."""
        return self.question.wiring.shape

    def checked(self, nodes: Nodes) -> tuple[int, ...]:
        """A set of the user's."""
        if isinstance(nodes, str | Path):
            raise BadType(f"{nodes} is no set of nodes", expected="a list of them", write=f'sets=[["{nodes}"]]')
        numbers: set[int] = set()
        for node in nodes:
            number = self.shape.sender_number.get(address(node, "sender"))
            if number is None or number not in self.nodes:
                raise BadArgument(f"{node} is no node of the circuit", expected="nodes that can be taken out of it")
            numbers.add(number)
        return tuple(sorted(numbers))

    def drawn(self, count: int, seed: int) -> list[tuple[int, ...]]:
        """Sets of nodes drawn at random, `embed` left in."""
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise BadArgument(f"random={count!r}", expected="how many sets are drawn, or 0")
        rng = np.random.default_rng(seed)
        some = [node for node in self.nodes if node != 0]
        return [tuple(node for node in some if rng.random() < 0.5) for _ in range(count)]

    def measured(self, mask: np.ndarray, sets: Sequence[Iterable[int]]) -> np.ndarray:
        """`[prompt, set]`: the metric of a circuit without each of these sets."""
        masks: list[np.ndarray] = []
        for nodes in sets:
            left = mask.copy()
            left[:, list(nodes)] = False
            masks.append(left)
        found = measure(self.question, masks, max_tokens=self.max_tokens, progress=self.progress)
        self.cost += found.cost
        return found.values

    def without(self, sets: Sequence[Iterable[int]]) -> tuple[np.ndarray, np.ndarray]:
        """The circuit without each of these sets, and the model without them."""
        return self.measured(self.mask, sets), self.measured(self.shape.exists, sets)


def _greedy(one: _NodeRemoval, steps: int) -> list[tuple[int, ...]]:
    """The sets on the way of taking out always the node that makes the difference largest."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise BadArgument(f"greedy={steps!r}", expected="how many nodes are taken out one after the other, or 0")
    out: tuple[int, ...] = ()
    found: list[tuple[int, ...]] = []
    for _ in range(steps):
        tried = [(*out, node) for node in one.nodes if node not in (*out, 0)]
        if not tried:
            break
        here, there = one.without(tried)
        out = tuple(sorted(tried[int(np.argmax(np.abs(here.mean(0) - there.mean(0))))]))
        found.append(out)
    return found
