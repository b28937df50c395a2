"""Shards of a result are put together in any order, and only those of one sweep."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nnsplice as ns
from nnsplice.errors import BadArgument, KeyMismatch
from nnsplice.results import SweepResult
from nnsplice.results.wording import clean_tokens
from results.tables import part, table
from zoo import wrap


@pytest.fixture
def result() -> SweepResult:
    return SweepResult(table())


@settings(max_examples=40, deadline=None)
@given(
    owner=st.lists(st.sets(st.integers(0, 3), min_size=1), min_size=28, max_size=28), order=st.permutations(range(4))
)
def test_any_parts_make_the_whole(owner: list[set[int]], order: list[int]) -> None:
    whole = table()
    owners = np.array([sum(1 << n for n in each) for each in owner]).reshape(2, 14)
    shards = [part(whole, owners >> n & 1 == 1) for n in order]
    merged = SweepResult.merge(iter(shards))
    assert merged == SweepResult(whole) and merged.is_complete
    assert SweepResult.merge([SweepResult.merge(shards[:2]), SweepResult.merge(shards[2:])]) == merged
    assert (merged.run.executor, merged.run.seconds, merged.run.tokens) == ("packed", 6.0, 160)


def test_merging_changes_none_of_the_parts(result: SweepResult) -> None:
    half = np.arange(28).reshape(2, 14) % 2 == 0
    shards = [part(result.table, half), part(result.table, ~half)]
    before = [shard.digest for shard in shards]
    assert SweepResult.merge(shards) == result
    assert [shard.digest for shard in shards] == before
    assert not SweepResult.merge(shards[:1]).is_complete


def test_shards_that_disagree_or_are_foreign_are_refused(result: SweepResult) -> None:
    with pytest.raises(BadArgument, match="nothing to merge"):
        SweepResult.merge([])
    values = result.table.values.copy()
    values[1, 2] += 1
    with pytest.raises(KeyMismatch, match=r"prompt 1 was measured differently[\s\S]*layers\[0\]\.output\[2\]"):
        SweepResult.merge([result, SweepResult(replace(result.table, values=values))])
    values[1, 2] = np.nan
    with pytest.raises(KeyMismatch, match="measured differently"):
        SweepResult.merge([result, SweepResult(replace(result.table, values=values))])
    with pytest.raises(KeyMismatch, match=r"different sweeps: seed differ"):
        SweepResult.merge([result, SweepResult(replace(result.table, asked={**result.asked, "seed": 1}))])
    cells = (replace(result.cells[0], layer=7), *result.cells[1:])
    with pytest.raises(KeyMismatch, match="different cells"):
        SweepResult.merge([result, SweepResult(replace(result.table, cells=cells))])


def test_unedited_runs_may_differ_by_their_rounding(result: SweepResult) -> None:
    half = np.arange(28).reshape(2, 14) % 2 == 0
    first, second = part(result.table, half), part(result.table, ~half).table
    for name in ("clean", "corrupted"):
        near = SweepResult(replace(second, **{name: getattr(second, name) * (1 + 1e-6)}))
        assert SweepResult.merge([first, near]) == result
        far = SweepResult(replace(second, **{name: getattr(second, name) + 1}))
        with pytest.raises(KeyMismatch, match=f"other values of {name}"):
            SweepResult.merge([first, far])


def test_an_infinite_metric_of_one_prompt_hides_no_difference_of_another(result: SweepResult) -> None:
    half = np.arange(28).reshape(2, 14) % 2 == 0
    infinite = replace(result.table, clean=np.array([-np.inf, 4.0]))
    first, second = part(infinite, half), part(infinite, ~half)
    assert SweepResult.merge([first, second]) == SweepResult(infinite)
    with pytest.raises(KeyMismatch, match="other values of clean"):
        SweepResult.merge([first, SweepResult(replace(second.table, clean=np.array([-np.inf, 9.0])))])


def test_parts_in_any_order_show_each_prompt_beside_its_own_partner() -> None:
    model = wrap("gpt2")
    pairs = ["w3 w4 w5", "w6 w4", "w7 w8"], ["w9 w4 w5", "w10 w4", "w11 w8"]
    plan = ns.plan_sweep(model, *pairs, "layers[:].output[0]", ns.logit_diff(["w3", "w4", "w5"], "w6"))
    whole = ns.run(plan, model, progress=False)
    parts = [ns.run(plan.take(rows), model, progress=False) for rows in ([2], [1, 0])]
    merged = SweepResult.merge(parts)
    assert merged.table.labels == whole.table.labels
    assert [clean_tokens(merged.table, n) for n in range(3)] == [("w3", "w4", "w5"), ("w6", "w4"), ("w7", "w8")]
    assert clean_tokens(SweepResult.merge(parts[:1]).table, 0) == ("w7", "w8")
