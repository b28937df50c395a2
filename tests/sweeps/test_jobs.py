"""Cells as ranges, against lists of pairs; and that planning asks once for each kind of prompt and of token."""

from __future__ import annotations

import random
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import nnsplice as ns
from nnsplice.activations.prompts import Prompts
from nnsplice.sweeps.jobs import Jobs
from nnsplice.sweeps.plan import Plan
from zoo import wrap

PAIRS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9)), max_size=40)


@given(pairs=PAIRS, others=PAIRS, rows=st.permutations(range(6)), step=st.integers(1, 4))
def test_ranges_hold_what_lists_of_pairs_hold(pairs: Any, others: Any, rows: list[int], step: int) -> None:
    jobs, plain = Jobs.of(pairs), sorted({*pairs})
    assert list(jobs) == plain
    assert len(jobs) == len(plain)
    assert [jobs[n] for n in range(-len(plain), len(plain))] == [*plain, *plain]
    assert list(jobs[1::step]) == plain[1::step]
    assert all((job in jobs) == (job in plain) for job in np.ndindex(6, 10))
    assert jobs == plain
    assert Jobs.of_ranges(jobs.ranges) == jobs
    assert hash(Jobs.of_ranges(jobs.ranges)) == hash(jobs)
    assert list(jobs + others) == sorted({*pairs, *others})
    assert list(jobs.of_targets([2, 7])) == [job for job in plain if job[1] in (2, 7)]
    kept = rows[:3]
    assert list(jobs.take(kept)) == sorted((kept.index(p), t) for p, t in plain if p in kept)
    assert jobs.prompts == sorted({prompt for prompt, _ in plain})
    mask = np.zeros((6, 10), dtype=bool)
    for job in plain:
        mask[job] = True
    assert Jobs.of_mask(mask) == jobs


def test_an_index_past_the_end_is_an_error() -> None:
    with pytest.raises(IndexError):
        Jobs.of([(0, 1)])[1]


def _slow(plan: Plan) -> np.ndarray:
    return np.array([[plan.has(target, prompt) for target in plan.targets] for prompt in range(len(plan.corrupted))])


@pytest.mark.parametrize("align", ["position", "end", "role"])
@pytest.mark.parametrize("operation", ["patch", "zero"])
def test_groups_say_what_each_prompt_would(align: str, operation: str) -> None:
    """Prompts of all lengths, spans and first differences, with each prompt planned by itself as the oracle."""
    model, chosen = wrap("gpt2"), random.Random(0)
    clean, corrupted, spans = [], [], []
    for _ in range(24):
        length = chosen.randrange(4, 9)
        a = [chosen.randrange(3, 60) for _ in range(length)]
        b = [chosen.randrange(3, 60) if n >= chosen.randrange(3) else t for n, t in enumerate(a)]
        start = chosen.randrange(length - 2)
        clean.append(a if align == "position" else a[chosen.randrange(2) :] if start > 1 else a)
        corrupted.append(b)
        spans.append((start, start + 2))
    starts = [max(0, start - len(b) + len(a)) for a, b, (start, _) in zip(clean, corrupted, spans, strict=True)]
    named: Any = {"clean": {"subject": [(n, n + 2) for n in starts]}, "corrupted": {"subject": spans}}
    joint = ["layers[0].heads[1][0]", "layers[2].output[-1]"]
    sites = ["layers[:].output[:]", 'layers[1].mlp.output["subject"]', joint]
    metric = ns.logit_diff(1, 2)
    if operation == "zero":
        metric = metric.at(-2)
    warns = pytest.warns(UserWarning, match="after the position") if operation == "zero" else nullcontext()
    with warns:
        plan = ns.plan_sweep(model, clean, corrupted, sites, metric, operation=operation, align=align, spans=named)
    assert (plan.exists() == _slow(plan)).all()
    for prompt in range(len(clean)):
        one: Any = {key: {"subject": [bounds["subject"][prompt]]} for key, bounds in named.items()}
        with warns if operation == "zero" else nullcontext():
            alone = ns.plan_sweep(
                model, clean[prompt], corrupted[prompt], sites, metric, operation=operation, align=align, spans=one
            )
        of = {target.cell.path: number for number, target in enumerate(plan.targets)}
        for ours, theirs in ((plan.jobs, alone.jobs), (plan.known, alone.known)):
            found = {number for p, number in ours if p == prompt}
            assert found == {of[alone.targets[number].cell.path] for _, number in theirs}


def test_planning_asks_once_for_a_kind_of_prompt_and_a_kind_of_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """The work of planning does not grow with the number of cells."""
    model, asked = wrap("gpt2"), {"has": 0, "positions": 0, "lengths": 0}

    def counting(of: type, name: str) -> None:
        inner = getattr(of, name)

        def counted(self: Any, *args: Any, **options: Any) -> Any:
            asked[name] += 1
            return inner(self, *args, **options)

        monkeypatch.setattr(of, name, counted)

    counting(Plan, "has")
    counting(Plan, "positions")
    counting(Prompts, "lengths")

    def planned(prompts: int, sites: str) -> dict[str, int]:
        asked.update(dict.fromkeys(asked, 0))
        clean, corrupted = [[3, 4, 5, 6]] * prompts, [[3, 7, 5, 6]] * prompts
        plan = ns.plan_sweep(model, clean, corrupted, sites, ns.logit_diff(1, 2))
        assert plan.exists().all()
        return dict(asked)

    few = planned(2, "layers[0].output[:]")
    assert planned(60, "layers[0].output[:]") == few
    many = planned(60, "layers[:].heads[:].output[:]")
    assert max(few["has"], many["has"]) <= 3 * 4  # tokens: which exist, and which are reached in two kinds of layer
    assert many["lengths"] <= few["lengths"] + 3 * 12  # a few times for a site


def test_a_plan_takes_cells_in_any_order() -> None:
    model = wrap("gpt2")
    plan = ns.plan_sweep(model, "w3 w4 w5", "w6 w4 w5", "layers[:].output[:]", ns.logit_diff(1, 2))
    every = replace(plan, jobs=[*plan.known, *plan.jobs], known=())
    assert list(every.jobs) == sorted({*plan.jobs, *plan.known})
    assert len(every.known) == 0
