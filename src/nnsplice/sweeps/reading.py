"""The position whose logits a metric reads, and arguments that compute only those logits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from nnsplice import engine
from nnsplice.activations.access import site_of
from nnsplice.atlas import Atlas
from nnsplice.paths import Path
from nnsplice.sweeps.plan import Plan
from nnsplice.sweeps.role_alignment import partner


def read_at(plan: Plan, prompt: int, *, clean: bool = False) -> int:
    """The position that the metric reads, counted from the end of the edited or the clean prompt: a negative number."""
    edited = plan.corrupted.length("decoder", prompt)
    position = plan.metric.metric.position
    length = plan.clean.length("decoder", prompt) if clean and plan.clean is not None else edited
    if clean and plan.clean is not None and plan.align == "role":
        found = partner(plan.corrupted, plan.clean, prompt, position % edited)
        assert found is not None
        return found - length
    # The position is given for the edited prompt; in pairs aligned at the end, the clean one counts it from the end.
    return (position % edited - edited if plan.align == "end" else position) % length - length


def only_read(model: engine.Model, at: int, places: Iterable[Path]) -> dict[str, Any]:
    """Arguments of a forward pass that computes only the logits that the metric reads; empty if not supported.

    Args:
        at: that position, counted from the end.
        places: the sites that are read or written; if one of them is the unembedding, all logits are computed.
    """
    head = Atlas.of(model).towers.get("decoder")
    if not engine.keeps_logits(model) or any(head is None or site_of(p).module == head.unembed for p in places):
        return {}
    return {"logits_to_keep": -at}
