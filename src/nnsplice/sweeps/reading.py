"""The token whose logits a metric reads; computing its logits only."""

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
    """The position that the metric reads, counted from the prompt's end, in the edited run or in the clean one."""
    edited = plan.corrupted.length("decoder", prompt)
    position = plan.metric.metric.position
    length = plan.clean.length("decoder", prompt) if clean and plan.clean is not None else edited
    if clean and plan.clean is not None and plan.align == "role":
        found = partner(plan.corrupted, plan.clean, prompt, position % edited)
        assert found is not None
        return found - length
    # The position is the edited prompt's; in a pair aligned at the end the clean one counts from there.
    return (position % edited - edited if plan.align == "end" else position) % length - length


def only_read(model: engine.Model, at: int, places: Iterable[Path]) -> dict[str, Any]:
    """Arguments of a call that computes only the logits that the metric reads, if the model supports that.

    Args:
        at: the position that it reads, counted from the end.
        places: the sites that are read or written; if one is the logits, all logits are computed.
    """
    head = Atlas.of(model).towers.get("decoder")
    if not engine.keeps_logits(model) or any(head is None or site_of(p).module == head.unembed for p in places):
        return {}
    return {"logits_to_keep": -at}
