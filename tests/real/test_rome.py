"""Where facts pass, averaged over many of them: early at the subject's last token, late at the last token of all.

Meng et al. 2022 found both sites in GPT-2 XL; here they are asked of a model of 135M parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import pytest
import xarray as xr

import nnsplice as ns
from nnsplice.results.roles import Roles
from real.pretrained import pretrained

pytestmark = pytest.mark.real
TRIED, FACTS = 150, 30
#: Role -> the tokens of a path; and the same for the result.
ROLES = {"subject last": '["subject"][-1]', "last": "[-1]"}
GROUPS: Roles = {"subject last": "subject[-1]", "last": -1}


@cache
def known() -> ns.tasks.Task:
    """Facts that the model puts first: few, so `filter` says that they say little of what it knows."""
    model = pretrained("smollm2")
    task = ns.tasks.facts(model, TRIED)
    with pytest.warns(UserWarning, match=f"of {TRIED} pairs"):
        return task.filter(model, by="top")


def traced(place: str, layers: str, roles: Mapping[str, str], window: int = 1) -> tuple[float, xr.DataArray]:
    """The total effect, and the averaged indirect effect by layer and role."""
    task = known()[:FACTS]
    sites = [f"layers[{layers}].{place}{token}" for token in roles.values()]
    result = ns.causal_trace(
        pretrained("smollm2"), task.clean, task.spans["clean"]["subject"], sites=sites, window=window, samples=2,
        answer=task.answers, progress=False,
    )  # fmt: skip
    ends = result.table
    effect = result.by_role(GROUPS).grid().mean("prompt") - ends.corrupted.mean()
    return float(ends.clean.mean() - ends.corrupted.mean()), effect


def test_the_model_knows_a_share_of_the_facts() -> None:
    assert len(known()) >= FACTS
    assert 0.15 < len(known()) / TRIED < 0.5


def test_the_stream_carries_a_fact_early_at_the_subject_and_late_at_the_last_token() -> None:
    total, effect = traced("output", "4,8,20,22,23,26", ROLES)
    early, late = effect.sel(role="subject last"), effect.sel(role="last")
    assert 0.15 < total < 0.6
    # Early site: a quarter of the total or more at the subject's last token, nothing at the last.
    assert early.sel(layer=[4, 8]).min() > 0.2 * total and abs(late.sel(layer=[4, 8])).max() < 0.1 * total
    # Late site: it comes abruptly, with layer 23, and then all of it; what was at the subject is read by then.
    assert late.sel(layer=22) < 0.4 * total < 0.7 * total < late.sel(layer=23)
    assert abs(early.sel(layer=[23, 26])).max() < 0.1 * total < early.sel(layer=20)


def test_early_mlps_restore_a_fact_at_the_subject() -> None:
    total, effect = traced("mlp.output", "0:17", {"subject last": ROLES["subject last"]}, window=9)
    early = effect.sel(role="subject last")
    assert early.sel(layer=4) > 0.15 * total
    assert early.sel(layer=4) > 3 * early.sel(layer=12), "a negative control: not in the middle"
