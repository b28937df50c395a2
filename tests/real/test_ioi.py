"""Heads that name the indirect object, as Wang et al. 2022 found them in GPT-2 small, here in SmolLM2-135M."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

import nnsplice as ns
from real.pretrained import pretrained

pytestmark = pytest.mark.real
PAIRS = 20
#: Layers with the heads that the tests are about.
LAYERS = "19,20,23,24,29"
END = f"layers[{LAYERS}].heads[:].output[-1]"


@cache
def task() -> ns.tasks.Task:
    model = pretrained("smollm2")
    return ns.tasks.ioi(model, PAIRS).filter(model)


def by_head(result: ns.SweepResult) -> dict[tuple[int, int], float]:
    """Head -> by how much the logit difference rises, on average."""
    grid = result.grid().mean("prompt").squeeze() - result.table.corrupted.mean()
    layers, heads = grid["layer"].values, grid["head"].values
    return {(int(layer), int(head)): float(grid.sel(layer=layer, head=head)) for layer in layers for head in heads}


def test_the_model_names_the_indirect_object() -> None:
    assert len(task()) == PAIRS
    result = ns.sweep(
        pretrained("smollm2"), task().clean, task().corrupted, "layers[0].output[-1]", task().metric, progress=False
    )
    assert 3.5 < result.table.clean.mean() < 6.5 and -6.5 < result.table.corrupted.mean() < -3.5


def test_few_heads_carry_it_and_some_work_against_it() -> None:
    result = ns.sweep(pretrained("smollm2"), task().clean, task().corrupted, END, task().metric, progress=False)
    total = float((result.table.clean - result.table.corrupted).mean())
    share = {head: value / total for head, value in by_head(result).items()}
    ordered = sorted(share, key=lambda head: share[head])
    assert set(ordered[-3:]) == {(23, 3), (20, 0), (29, 1)}, "two that write the answer, and the one before them"
    assert share[23, 3] > 0.25 and share[20, 0] > 0.2 and share[29, 1] > 0.15
    assert ordered[0] == (24, 4) and share[24, 4] < -0.1, "a negative name mover"


def test_name_movers_write_to_the_logits_and_the_one_before_them_does_not() -> None:
    result = ns.path_patch(
        pretrained("smollm2"), task().clean, task().corrupted, END, "unembed", task().metric, progress=False
    )  # fmt: skip
    direct = by_head(result)
    assert direct[23, 3] == max(direct.values()) and direct[23, 3] > 2.5
    assert direct[29, 1] > 1.5 and direct[23, 0] > 1.0 and direct[23, 2] > 0.5
    assert direct[24, 4] == min(direct.values()) and direct[24, 4] < -1.0
    assert abs(direct[20, 0]) < 0.5, "it acts through the others"


def test_heads_look_where_their_parts_say() -> None:
    model = pretrained("smollm2", attn_implementation="eager")
    places = ["layers[20].heads[0].pattern[-1]", "layers[23].heads[0].pattern[-1]", "layers[24].heads[4].pattern[-1]"]
    seen: dict[str, list[dict[str, float]]] = {place: [] for place in places}
    for example in task()[:12]:
        saved = ns.capture(model, example.clean, places)
        for place in places:
            pattern = saved[place].flatten()
            seen[place].append({name: float(pattern[example.spans[name][0]]) for name in ("io", "s1", "s2")})
    mean = [{name: np.mean([one[name] for one in seen[place]]) for name in ("io", "s1", "s2")} for place in places]
    assert mean[0]["s2"] > 0.5 and mean[0]["s2"] > 3 * mean[0]["io"], "20.0 reads the second mention"
    assert mean[1]["io"] > 0.4 and mean[1]["io"] > 3 * mean[1]["s1"], "23.0 reads the indirect object"
    assert mean[2]["io"] > 0.5, "24.4 reads it too, and works against it"
