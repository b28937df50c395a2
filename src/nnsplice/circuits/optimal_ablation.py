"""`optimal_ablation`: train constants for all senders outside a circuit."""

from __future__ import annotations

from typing import Any

from nnsplice.activations.prompts import PromptsLike
from nnsplice.circuits.circuit import Circuit
from nnsplice.circuits.constants import OptimalAblation
from nnsplice.circuits.measuring import Question, constants_for
from nnsplice.circuits.training import HELD_OUT, RATE, STEPS, TrainingOptions
from nnsplice.errors import BadType, circumstances, named
from nnsplice.metrics import Metric


def optimal_ablation(
    model: Any,
    circuit: Circuit,
    clean: PromptsLike,
    corrupted: PromptsLike | None = None,
    *,
    reference: PromptsLike | None = None,
    position: int = -1,
    steps: int = STEPS,
    lr: float = RATE,
    held_out: float = HELD_OUT,
    seed: int = 0,
    max_tokens: int | None = None,
    progress: bool = True,
) -> OptimalAblation:
    """Train a constant for each sender outside a circuit, so that the circuit answers as the whole model does.

    Zeros and means leave the model with values that it never sees, and that harm it by themselves. The best constants
    (Li and Janson, 2024) leave only what the senders are needed for: minimised is the divergence of the circuit's
    next-token distribution from the model's (KL, in the mean over prompts), by Adam from the means on; the best on the
    way is kept, so on the prompts that it is trained on it is never worse than `ablation="mean"`.

    >>> circuit = ns.Circuit.of(nodes=["embed", "layers[1:].heads[:]", "layers[:].mlp"], model=model)
    >>> prompts = ["w3 w4 w5", "w9 w4 w5", "w9 w62 w5", "w3 w62 w61"]
    >>> constants = ns.optimal_ablation(model, circuit, prompts, steps=20, progress=False)
    >>> constants.senders[:2], constants.training.divergence <= constants.training.mean_divergence
    (('layers[0].heads[0]', 'layers[0].heads[1]'), True)
    >>> circuit.run(model, prompts, None, ns.logit_diff("w7", "w8"), ablation=constants).shape
    (4,)

    Args:
        model: the model.
        circuit: whose outside gets the constants.
        clean: the prompts on which the circuit should answer as the model does.
        corrupted: with `reference`, whose means training begins at, as for `ablation="mean"`.
        reference: as for `Circuit.run`.
        position: the token whose answer is compared; that of the metric.
        steps: the steps of Adam, each over all prompts.
        lr: the learning rate of the first step, in units of a sender's size; it falls linearly to 0.
        held_out: the share of prompts that is not trained on; `training` has the divergence there.
        seed: the seed of that draw.
        max_tokens: how many tokens run at once.
        progress: show a bar.

    Returns:
        The constants, to be given as `ablation=`, with how well they did on prompts that were not trained on.

    Raises:
        BadType: `circuit` is no circuit.
        BadArgument: a member of the circuit is a part of a sender: one token, or one expert.
    """
    with circumstances("ns.optimal_ablation"):
        if not isinstance(circuit, Circuit):
            raise BadType(f"{named(circuit)} is no circuit", expected="an ns.Circuit")
        recipe = TrainingOptions(steps, lr, held_out, seed)
        metric = Metric.of(_unread).at(position)
        question = Question.of(model, clean, corrupted, metric, "optimal", reference)
        about = {"circuit": circuit.digest, "kind": circuit.kind}
        mask = circuit.whole_mask(question, "constants are trained for whole senders")
        found, _ = constants_for(question, mask, recipe, max_tokens=max_tokens, progress=progress, about=about)
        return found


def _unread(logits: Any) -> Any:
    """A metric of which only the position is used."""
    return logits[..., 0]
