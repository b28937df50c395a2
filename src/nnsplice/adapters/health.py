"""How training went, layer by layer, from an optimizer's state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from nnsplice import plots
from nnsplice.adapters.grouping import LIVE, LayerGrouping
from nnsplice.adapters.orders import fitting_orders
from nnsplice.adapters.states import OptimizerState, as_optimizer_state
from nnsplice.errors import BadArgument, ParamMappingError

if TYPE_CHECKING:
    import pandas as pd


#: Adam's default decay rates, for a state without them.
BETAS = (0.9, 0.999)


@dataclass(frozen=True, slots=True)
class LayerHealth:
    """The optimizer state of one layer's parameters; means are over all their numbers.

    >>> weight, frozen = torch.nn.Parameter(torch.zeros(4)), torch.nn.Parameter(torch.zeros(4))
    >>> optimizer = torch.optim.Adam([weight, frozen])
    >>> for gradient in (1.0, 1.0, -1.0):
    ...     weight.grad = torch.tensor([gradient, gradient, 2.0, 0.0])   # one number has no gradient
    ...     optimizer.step()
    >>> grouping = ns.adapters.LayerGrouping((7,), 2, {0: 7, 1: 7}, how="names")
    >>> health = ns.adapters.layer_health(optimizer.state_dict(), grouping)[7]
    >>> health.dead_fraction, health.untouched, round(health.agreement, 2)
    (0.25, 1, 0.51)

    Attributes:
        exp_avg_sq: mean of Adam's second moment.
        exp_avg: mean of Adam's first moment, with its sign.
        step: mean number of steps.
        dead_fraction: the share of numbers that have had no gradient.
        gradient: root mean square of the gradient, from the bias-corrected second moment.
        agreement: mean of |first moment| / sqrt(second moment), both bias-corrected: near 1 where gradients agree from
            step to step, near 0 where they cancel.
        params: the number of parameters.
        numbers: the number of their numbers.
        untouched: the number of parameters without a state, which never had a gradient.
    """

    exp_avg_sq: float
    exp_avg: float
    step: float
    dead_fraction: float
    gradient: float
    agreement: float
    params: int
    numbers: int
    untouched: int


class Health(Mapping[int, LayerHealth]):
    """`LayerHealth` by layer, in numeric order.

    >>> from copy import deepcopy
    >>> tuned, ids = deepcopy(ns.models.unwrap(ns.load("toy"))), torch.tensor([[5, 6, 7, 8]])
    >>> optimizer = torch.optim.Adam(tuned.parameters(), lr=0.001)
    >>> for _ in range(3):
    ...     optimizer.zero_grad()
    ...     tuned(ids, labels=ids).loss.backward()
    ...     optimizer.step()
    >>> health = ns.adapters.layer_health(
    ...     optimizer.state_dict(), ns.adapters.map_optimizer_to_layers(optimizer, tuned)
    ... )
    >>> max(health, key=lambda layer: health[layer].gradient), health[0].params
    (0, 12)
    >>> health.frame()[["gradient", "agreement", "step"]].round(2)
           gradient  agreement  step
    layer
    0          0.07       0.60   3.0
    1          0.04       0.57   3.0
    2          0.02       0.58   3.0
    3          0.02       0.58   3.0
    4          0.02       0.60   3.0
    5          0.02       0.59   3.0
    """

    def __init__(self, layers: Mapping[int, LayerHealth]) -> None:
        self._layers = dict(layers)

    def __getitem__(self, layer: int) -> LayerHealth:
        return self._layers[layer]

    def __iter__(self) -> Iterator[int]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def frame(self) -> pd.DataFrame:
        """A pandas table with a row for each layer."""
        import pandas as pd

        return pd.DataFrame([asdict(one) for one in self.values()], index=pd.Index(list(self), name="layer"))

    def plot(self, *, ax: plots.Axes | None = None) -> plots.Axes:
        """Draw the root mean square of each layer's gradients.

        Args:
            ax: axes to draw on; a new figure if left out.

        Returns:
            The axes; the figure is `axes.figure`.
        """
        return plots.bars(
            [one.gradient for one in self.values()],
            names=list(self),
            label="layer",
            value_label="root mean square of the gradient",
            ax=ax,
        )

    def __repr__(self) -> str:
        lines = [f"Health: {len(self)} layers"]
        for layer, one in self.items():
            lines.append(
                f"  {layer:>3}  gradient {one.gradient:.2e}  agreement {one.agreement:.2f}  "
                f"step {one.step:g}  dead {one.dead_fraction:.1%}"
            )
        return "\n".join(lines)


def layer_health(optimizer_state: Mapping[Any, Any], grouping: LayerGrouping, *, dead_below: float = 0.0) -> Health:
    """Gradient size, agreement and dead parameters of each layer, from the moments of Adam.

    >>> from copy import deepcopy
    >>> tuned, ids = deepcopy(ns.models.unwrap(ns.load("toy"))), torch.tensor([[5, 6, 7, 8]])
    >>> optimizer = torch.optim.Adam(tuned.parameters(), lr=0.001)
    >>> for _ in range(3):
    ...     optimizer.zero_grad()
    ...     tuned(ids, labels=ids).loss.backward()
    ...     optimizer.step()
    >>> grouping = ns.adapters.map_optimizer_to_layers(optimizer, tuned)
    >>> ns.adapters.layer_health(optimizer.state_dict(), grouping)
    Health: 6 layers
        0  gradient 7.36e-02  agreement 0.60  step 3  dead 0.0%
        1  gradient 3.50e-02  agreement 0.57  step 3  dead 0.0%
        2  gradient 2.34e-02  agreement 0.58  step 3  dead 0.0%
        3  gradient 1.71e-02  agreement 0.58  step 3  dead 0.0%
        4  gradient 1.56e-02  agreement 0.60  step 3  dead 0.0%
        5  gradient 1.66e-02  agreement 0.59  step 3  dead 0.0%

    Args:
        optimizer_state: `optimizer.state_dict()`, or its `"state"` alone.
        grouping: the layer of each parameter id, from `map_optimizer_to_layers` or `map_param_ids_to_layers`.
        dead_below: a second moment up to this counts as no gradient.

    Returns:
        The numbers by layer.

    Raises:
        ParamMappingError: the state does not belong to the grouping.
        BadArgument: an optimizer without the moments of Adam.
    """
    optimizer = as_optimizer_state(optimizer_state)
    ids: dict[int, list[int]] = {layer: [] for layer in grouping.layer_indices}
    for number, layer in grouping.layer_of.items():
        ids[layer].append(number)
    known = {number for group in optimizer.groups for number in group}
    guessed = grouping.how == "order"
    missing = [n for n in grouping.layer_of if n not in optimizer.states and (guessed or n not in known)]
    if missing:
        raise ParamMappingError(
            f"the grouping counts parameter {missing[0]} among the layers, and the state has nothing for it; its ids "
            f"are {_ids(optimizer.states)}",
            expected="the optimizer that the grouping is of; ids with gaps are of one that was given frozen parameters",
            write=_remade(fitting_orders(grouping.header, optimizer) if grouping.header else []),
        )
    if guessed and grouping.header:
        readings = [
            {number: layer.number for number, layer in reading.items()}
            for reading in fitting_orders(grouping.header, optimizer)
        ]
        if readings != [grouping.layer_of]:
            raise ParamMappingError(
                "the grouping takes the parameters to come layer after layer, and the shapes in this state "
                + ("leave room for another order" if grouping.layer_of in readings else "are in another order"),
                expected="a grouping that was made with this state, or with the names of the parameters",
                write=_remade(readings),
            )
    return Health({layer: _health(optimizer, numbers, dead_below) for layer, numbers in ids.items()})


def _remade(readings: Sequence[object]) -> str:
    """The call that makes a grouping for this state; without names if exactly one order fits."""
    if len(readings) == 1:
        return "map_param_ids_to_layers(adapter_dir, num_params, state=optimizer_state)"
    return (
        f"{LIVE}\n     or: map_param_ids_to_layers(adapter_dir, num_params, names={{id: name, ...}}), by the order in "
        "which the optimizer was given its parameters"
    )


def _health(optimizer: OptimizerState, ids: list[int], dead_below: float) -> LayerHealth:
    numbers, first, second, squares, agreeing, alive, steps = 0, 0.0, 0.0, 0.0, 0.0, 0, []
    touched = [number for number in ids if number in optimizer.states]
    for state, betas in ((optimizer.states[n], optimizer.betas.get(n, BETAS)) for n in touched):
        if not isinstance(state.get("exp_avg"), torch.Tensor) or not isinstance(state.get("exp_avg_sq"), torch.Tensor):
            raise BadArgument(
                f"this state has {', '.join(map(str, state)) or 'nothing'}",
                expected="exp_avg and exp_avg_sq, which Adam and AdamW keep",
            )
        m, v = state["exp_avg"].detach().double(), state["exp_avg_sq"].detach().double()
        living = v > dead_below
        step = float(state.get("step", 0))
        unbiased, unbiased_sq = ((1 - beta**step) if step > 0 and beta < 1 else 1.0 for beta in betas)
        numbers += v.numel()
        first += float(m.sum())
        second += float(v.sum())
        alive += int(living.sum())
        squares += float(v.sum()) / unbiased_sq
        agreeing += float((m[living].abs() / v[living].sqrt()).sum()) / unbiased * unbiased_sq**0.5
        steps.append(step)
    return LayerHealth(
        exp_avg_sq=second / numbers if numbers else 0.0,
        exp_avg=first / numbers if numbers else 0.0,
        step=sum(steps) / len(steps) if steps else 0.0,
        dead_fraction=1 - alive / numbers if numbers else 1.0,
        gradient=(squares / numbers) ** 0.5 if numbers else 0.0,
        agreement=agreeing / alive if alive else 0.0,
        params=len(ids),
        numbers=numbers,
        untouched=len(ids) - len(touched),
    )


def _ids(states: Mapping[int, Any]) -> str:
    numbers = sorted(states)
    shown = ", ".join(map(str, numbers[:5]))
    return f"{shown}, ... {numbers[-1]} ({len(numbers)})" if len(numbers) > 5 else shown or "none"
