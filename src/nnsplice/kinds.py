"""`plan`: questions of all rooms in units, for `ns.run`. A row for each; what a row needs is a file of its room."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from nnsplice.errors import BadArgument, named
from nnsplice.sweeps import sweep
from nnsplice.units import UnitPlan
from nnsplice.work import imported

R = TypeVar("R")

#: What asks in one call -> where it is found, and where its plan is made, with the same arguments.
KINDS = {
    "ns.attribute": ("nnsplice.attribution:attribute", "nnsplice.attribution.units:plan_attribute"),
    "ns.path_patch": ("nnsplice.attribution:path_patch", "nnsplice.attribution.units:plan_paths"),
    "ns.sweep_weights": ("nnsplice.sweeps:sweep_weights", "nnsplice.sweeps.weight_units:plan"),
    "ns.capture": ("nnsplice.activations:capture", "nnsplice.units.capturing:plan"),
    "ns.faithfulness": ("nnsplice.circuits:faithfulness", "nnsplice.circuits.units:plan"),
    "ns.steering.sweep": ("nnsplice.steering:sweep", "nnsplice.steering.units:plan"),
}
#: Options of the functions that `ns.run` is given.
_OF_RUN = ("executor", "max_tokens", "journal", "progress")


def plan(question: Callable[..., R], *args: Any, **options: Any) -> UnitPlan[R]:
    """Plan a question without running it, so that `ns.run` runs it in units, here or in other processes.

    A unit is some whole prompts. All processes, in any order, give the same bits, whatever dies on the way.

    >>> pairs = ["w3 w4 w5", "w3 w4"], ["w3 w6 w5", "w3 w6"]
    >>> plan = ns.plan(ns.attribute, model, *pairs, "layers[:].heads[:]", ns.logit_diff("w7", "w8"), method="ig")
    >>> plan
    UnitPlan: ns.attribute, 2 prompts, 1 unit
    >>> ns.run(plan, model, progress=False).method
    'ig'

    Args:
        question: `ns.attribute`, `ns.path_patch`, `ns.sweep_weights`, `ns.faithfulness`, `ns.capture` or
            `ns.steering.sweep`. For `ns.sweep` there is `ns.plan_sweep`.
        *args: its arguments.
        **options: its options, without those of `ns.run`: `executor`, `max_tokens`, `journal`, `progress`.

    Returns:
        A plan for `ns.run(plan, model)`, or for other processes `ns.run(plan, "gpt2", on="local:8", out="run")`.

    Raises:
        BadArgument: a question that cannot be cut into units, or an option of `ns.run`; and what the question raises.
    """
    for asks, plans in KINDS.values():
        if imported(asks) is question:
            given = [name for name in _OF_RUN if name in options]
            if given:
                raise BadArgument(
                    f"{', '.join(given)} says how a plan is run, and this makes one",
                    write=f"ns.run(plan, model, {given[0]}=...)",
                )
            return imported(plans)(*args, **options)
    raise BadArgument(
        f"{getattr(question, '__name__', named(question))} is not run in units",
        expected=f"one of {', '.join(KINDS)}",
        write="ns.plan_sweep(...)" if question is sweep else None,
    )
