"""Training of optimal ablation constants (Li and Janson, 2024).

What is minimised is the mean over prompts of the Kullback-Leibler divergence, at the position of the metric, from the
full model's distribution of the next token to the circuit's. Training begins at the means, and the best is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nnsplice import engine
from nnsplice.activations.prompts import Prompts
from nnsplice.activations.saved_activation import SavedActivation
from nnsplice.atlas import unwrap
from nnsplice.attribution.gradients import differentiable
from nnsplice.circuits.ablations import at_every_token, mean_of
from nnsplice.circuits.constants import OptimalAblation, Training
from nnsplice.circuits.masks import ablated, needed
from nnsplice.circuits.recording import SenderRun, SenderValues, record, run_plainly
from nnsplice.circuits.running import CircuitPass
from nnsplice.circuits.streams import AblatedStreams, whole_slots
from nnsplice.circuits.wiring import Wiring
from nnsplice.errors import BadArgument
from nnsplice.packed.cost import Cost, CostModel
from nnsplice.progress import bar

STEPS, RATE, HELD_OUT = 200, 0.05, 0.25


@dataclass(frozen=True)
class TrainingOptions:
    """The options of training constants."""

    steps: int = STEPS
    #: Of the first step, in units of a sender's own size; it falls to nothing on a straight line.
    lr: float = RATE
    #: Which share of the prompts is held out.
    held_out: float = HELD_OUT
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise BadArgument(f"steps={self.steps!r}", expected="at least 1")
        if not self.lr > 0:
            raise BadArgument(f"lr={self.lr!r}", expected="above 0, in units of a sender's own size")
        if not 0 <= self.held_out < 1:
            raise BadArgument(f"held_out={self.held_out!r}", expected="the share of prompts, from 0 to below 1")

    def split(self, prompts: int) -> tuple[list[int], list[int]]:
        """The prompts that are trained on, and those held out."""
        order = np.random.default_rng(self.seed).permutation(prompts)
        out = int(prompts * self.held_out)
        return sorted(order[out:].tolist()), sorted(order[:out].tolist())


@dataclass(frozen=True)
class _Group:
    """Prompts of one length, and the whole model's logits."""

    rows: list[int]
    run: SenderRun
    #: The metric's position, counted from the end.
    at: int


def train(
    model: engine.Model,
    wiring: Wiring,
    mask: np.ndarray,
    prompts: Prompts,
    reference: Prompts,
    position: int,
    recipe: TrainingOptions,
    *,
    room: int,
    progress: bool,
    provenance: dict[str, object],
) -> tuple[OptimalAblation, Cost]:
    """Train the constants of one circuit.

    Args:
        mask: its edges, `[receiver, sender]`.
        reference: the prompts of the means that training begins at.
        position: the position that the metric reads.
        room: how many tokens run at once.
    """
    root, cost_model = unwrap(model), CostModel.of(model)
    small, _ = needed(wiring.shape, mask, from_embed=False)
    slots, reads = whole_slots(small[None])
    free = ablated(wiring.shape, mask)
    mean, cost = mean_of(model, wiring, reference)
    # A site without an address is refused before anything is trained.
    engine.expand(model, ["embed.output", "layers[:].heads[:].output", "layers[:].mlp.output"])
    trained, held = recipe.split(len(prompts))
    groups = list(_groups(model, wiring, prompts, position, room))
    cost += Cost(forwards=len(groups))
    start = _flat(mean)
    scale, taken = _sizes(wiring, groups), _trained_columns(wiring, start, free)
    shift = [torch.zeros_like(value) for value in start]

    def values(moves: Sequence[Tensor]) -> SenderValues:
        return _recorded([a + b * s for a, b, s in zip(start, moves, scale, strict=True)])

    def divergence(moves: Sequence[Tensor], rows: Sequence[int], *, tied: bool) -> float:
        """The mean over these prompts; where it is tied, with gradients of the moves."""
        nonlocal cost
        total = 0.0
        for group in groups:
            chosen = [number for number, row in enumerate(group.rows) if row in rows]
            if not chosen:
                continue
            clean = [group.rows[number] for number in chosen]
            own = group.run.values.map(lambda t, chosen=chosen: t[chosen])
            with torch.set_grad_enabled(tied):
                streams = AblatedStreams.of(root, wiring, at_every_token(values(moves), own))
                made = CircuitPass(root, wiring, group.run.frame, streams, cost_model, slots, reads, keep_graph=tied)
                logits = made.run(lambda clean=clean, group=group: run_plainly(root, model, prompts, clean, group.at))
                apart = kl(group.run.logits[chosen], logits).sum() / len(rows)
            if tied:
                apart.backward()
            cost += made.cost + Cost(forwards=1, flops=made.cost.flops * tied)
            total += float(apart.detach())
        return total

    best, history = (float("inf"), [move.clone() for move in shift]), []
    with differentiable(model), bar("optimal ablation", recipe.steps, "step", progress) as shown:
        for move in shift:
            move.requires_grad_()
        optimiser = torch.optim.Adam(shift, lr=recipe.lr)
        for step in range(recipe.steps):
            optimiser.param_groups[0]["lr"] = recipe.lr * (1 - step / recipe.steps)
            optimiser.zero_grad(set_to_none=False)
            apart = divergence(shift, trained, tied=True)
            history.append(apart)
            if apart < best[0]:
                best = apart, [move.detach().clone() for move in shift]
            for move, columns in zip(shift, taken, strict=True):
                if move.grad is not None:
                    move.grad *= columns
            optimiser.step()
            shown.update(1)
        apart = divergence(shift, trained, tied=False)
        if apart < best[0]:
            best = apart, [move.detach().clone() for move in shift]
        begin = [torch.zeros_like(move) for move in best[1]]
        outside = [divergence(moves, held, tied=False) if held else None for moves in (begin, best[1])]
    if not np.isfinite(history[0]):
        raise BadArgument(
            f"with means in the place of everything outside, the divergence is {history[0]}", expected="a number"
        )
    training = Training(
        recipe.steps, recipe.lr, recipe.seed, tuple(trained), tuple(held), history[0], best[0], outside[0], outside[1],
        tuple(history),
    )  # fmt: skip
    senders = tuple(str(path) for path, is_free in zip(wiring.shape.senders, free, strict=True) if is_free)
    saved = _saved(model, wiring, values(best[1]))
    return OptimalAblation(saved, senders, training, provenance), cost


def kl(full: Tensor, ablated: Tensor) -> Tensor:
    """`[prompt]`: from the full model's distribution to the ablated one's, of logits `[prompt, vocab]`."""
    wider = torch.float64 if full.dtype == torch.float64 else torch.float32
    p, q = (logits.to(wider).log_softmax(-1) for logits in (full, ablated))
    return (p.exp() * (p - q)).sum(-1)


def _groups(model: engine.Model, wiring: Wiring, prompts: Prompts, position: int, room: int) -> Iterator[_Group]:
    for batch in prompts.batches(model):
        length = prompts.lengths("decoder")[batch[0]]
        at = position % length - length
        # Training keeps the activations of every block, and of a pass for each different stream.
        step = max(room // (length * 4), 1)
        for rows in (batch[start : start + step] for start in range(0, len(batch), step)):
            yield _Group(rows, record(unwrap(model), model, wiring, prompts, rows, at), at)


# --- vectors ----------------------------------------------------------------------------------------------------------


def _flat(values: SenderValues) -> list[Tensor]:
    """The embeddings' vector, those that heads bring, those that MLPs add."""
    return [values.embed, *values.z, *values.mlp]


def _recorded(flat: Sequence[Tensor]) -> SenderValues:
    layers = (len(flat) - 1) // 2
    return SenderValues(flat[0], tuple(flat[1 : 1 + layers]), tuple(flat[1 + layers :]))


def _sizes(wiring: Wiring, groups: Sequence[_Group]) -> list[Tensor]:
    """For each vector the root mean square of the sender's values, of each head on its own."""
    squares: list[Tensor] = []
    for group in groups:
        own = [value.double().pow(2).mean((0, 1)) * len(group.rows) for value in _flat(group.run.values)]
        squares = own if not squares else [a + b for a, b in zip(squares, own, strict=True)]
    prompts = sum(len(group.rows) for group in groups)
    found = [square / prompts for square in squares]
    layers = len(wiring.layers)
    for number, layer in enumerate(wiring.layers):
        for site in layer.z:
            columns = slice(*(site.columns or (0, None)))
            found[1 + number][columns] = found[1 + number][columns].mean()
    sizes = [value if 1 <= number <= layers else value.mean().expand_as(value) for number, value in enumerate(found)]
    return [
        size.sqrt().clamp_min(1e-6).to(value)
        for size, value in zip(sizes, _flat(groups[0].run.values.map(lambda value: value[0, 0])), strict=True)
    ]


def _trained_columns(wiring: Wiring, flat: Sequence[Tensor], free: np.ndarray) -> list[Tensor]:
    """1 for the numbers that are trained: of senders whose ablated value is read somewhere."""
    found = [torch.zeros_like(value) for value in flat]
    layers = len(wiring.layers)
    found[0] += float(free[0])
    for number, (layer, (sender, _)) in enumerate(zip(wiring.layers, wiring.shape.starts, strict=True)):
        for head, site in enumerate(layer.z):
            found[1 + number][slice(*(site.columns or (0, None)))] = float(free[sender + head])
        found[1 + layers + number] += float(free[sender + len(layer.z)])
    return found


def _saved(model: engine.Model, wiring: Wiring, values: SenderValues) -> SavedActivation:
    """Vectors by the addresses of their senders."""

    def entry(place: str, value: Tensor) -> tuple[str, Tensor]:
        return f'{place}["{CONSTANT}"]', value.detach().clone()[None]

    pairs = [entry("embed.output", values.embed)]
    for number, (layer, z, mlp) in enumerate(zip(wiring.layers, values.z, values.mlp, strict=True)):
        for head, site in enumerate(layer.z):
            pairs.append(entry(f"layers[{number}].heads[{head}].output", z[slice(*(site.columns or (0, None)))]))
        pairs.append(entry(f"layers[{number}].mlp.output", mlp))
    return SavedActivation.from_pairs(*pairs)._located(model)


#: The name of the position of constants: the same at every token.
CONSTANT = "constant"
