"""Parts of a plan by prompts, and units of work: together every cell once, with the numbers of the whole."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

import nnsplice as ns
from nnsplice.errors import BadArgument, KeyMismatch
from nnsplice.sweeps.plan import Plan
from zoo import wrap


@pytest.fixture(scope="module")
def model() -> Any:
    model = wrap("gpt2")
    model.double()
    return model


def _pairs(count: int, seed: int = 0) -> tuple[list[list[int]], list[list[int]]]:
    chosen = random.Random(seed)
    clean = [[chosen.randrange(3, 60) for _ in range(chosen.randrange(3, 8))] for _ in range(count)]
    corrupted = [[t if n != 1 else (t + 5) % 60 + 3 for n, t in enumerate(row)] for row in clean]
    return clean, corrupted


def _plan(model: Any, operation: str = "patch", **options: Any) -> Plan:
    clean, corrupted = _pairs(6)
    answers = [3 + n for n in range(6)]
    if operation in ("add", "resample"):
        one = [row[:3] for row in corrupted]
        options["reference"] = ns.capture(model, one, ["layers[1].output[0]", "layers[2].heads[1].output[1]"])
    sites, metric = ["layers[1].output[0]", "layers[2].heads[1].output[1]"], ns.logit_diff(answers, [9] * 6)
    return ns.plan_sweep(model, clean, corrupted, sites, metric, operation=operation, **options)


def _run(plan: Plan, model: Any, **options: Any) -> ns.SweepResult:
    return ns.run(plan, model, progress=False, **options)


@pytest.mark.parametrize("operation", ["patch", "zero", "noise", "add", "resample"])
def test_a_part_has_the_numbers_of_the_whole(model: Any, operation: str) -> None:
    """Also what is drawn for a prompt, and the row of a reference that is its own."""
    plan = _plan(model, operation)
    whole = _run(plan, model)
    parts = [_run(plan.take(rows), model) for rows in ([4, 1], [0, 2, 5], [3])]
    for rows, part in zip(([4, 1], [0, 2, 5], [3]), parts, strict=True):
        assert part.grid("layers[:].output").prompt.values.tolist() == rows
        np.testing.assert_allclose(part.table.values, whole.table.values[rows], atol=1e-12)
        assert part.frame()["prompt"].unique().tolist() == rows
    merged = ns.SweepResult.merge(parts)
    assert merged.asked == whole.asked
    assert merged.tokens == whole.tokens
    assert merged.is_complete
    np.testing.assert_allclose(merged.table.values, whole.table.values, atol=1e-12)
    np.testing.assert_allclose(merged.clean, whole.clean, atol=1e-12)


def test_a_part_of_a_part_keeps_the_numbers(model: Any) -> None:
    plan = _plan(model, "noise")
    inner = plan.take([5, 3, 1]).take([2, 0])
    assert inner.asked["part"] == {"prompts": [1, 5], "of": 6}
    np.testing.assert_allclose(_run(inner, model).table.values, _run(plan, model).table.values[[1, 5]], atol=1e-12)


def test_without_the_number_the_noise_would_be_another(model: Any) -> None:
    """The negative control: a plan of the same prompt alone draws for prompt 0."""
    plan = _plan(model, "noise")
    clean, corrupted = _pairs(6)
    alone = ns.plan_sweep(model, clean[3], corrupted[3], "layers[1].output[0]", ns.logit_diff(6, 9), operation="noise")
    assert abs(_run(alone, model).table.values[0, 0] - _run(plan, model).table.values[3, 0]) > 1e-6


def test_a_part_runs_its_own_prompts_alone(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from nnsplice import engine

    plan, seen = _plan(model), set()
    ran = engine.run

    def watched(model: Any, inputs: Any, *args: Any, **options: Any) -> Any:
        seen.update(tuple(row) for row in inputs["input_ids"].tolist())
        return ran(model, inputs, *args, **options)

    monkeypatch.setattr(engine, "run", watched)
    _run(plan.take([2]), model, executor="batched")
    assert seen == {plan.corrupted.ids[2], plan.clean.ids[2]}  # type: ignore[union-attr]


@pytest.mark.parametrize("size", [None, 1, 12, 60])
@pytest.mark.parametrize("shard", [None, (1, 3)])
def test_units_have_every_cell_once(model: Any, size: float | None, shard: tuple[int, int] | None) -> None:
    clean, corrupted = _pairs(9, 1)
    plan = ns.plan_sweep(model, clean, corrupted, "layers[:].output[:]", ns.logit_diff(1, 2))
    plan = plan if shard is None else plan.shard(*shard)
    units = plan.units(size)
    for name in ("jobs", "known"):
        found = [(unit.prompts[run], t) for unit in units for run, t in getattr(unit.plan, name)]
        assert sorted(found) == sorted(getattr(plan, name))
    assert {prompt for unit in units for prompt in unit.prompts} == set(range(9))
    again = ns.plan_sweep(model, clean, corrupted, "layers[:].output[:]", ns.logit_diff(1, 2))
    again = again if shard is None else again.shard(*shard)
    assert [unit.piece for unit in again.units(size)] == [unit.piece for unit in units]
    assert (len(units) == 1) == (size is None)
    if size == 1:
        assert max(len(unit.plan) for unit in units) <= 2


def test_units_run_to_the_result_of_the_whole(model: Any) -> None:
    clean, corrupted = _pairs(5, 2)
    metrics = {"a": ns.logit_diff(1, 2), "b": ns.log_probability(4)}
    plan = ns.plan_sweep(model, clean, corrupted, ["layers[:].output[:]", "layers[:].mlp[:]"], metrics)
    whole = _run(plan, model)
    found = [_run(unit.plan, model, max_tokens=unit.max_tokens) for unit in plan.units(20)]
    random.Random(0).shuffle(found)
    merged = ns.SweepResult.merge(found)
    assert len(found) > 8
    assert merged.asked == whole.asked
    np.testing.assert_allclose(merged.table.values, whole.table.values, atol=1e-12)
    assert (merged.table.done == whole.table.done).all()
    assert (merged.table.exists == whole.table.exists).all()


def test_answers_of_several_tokens_stay_together(model: Any) -> None:
    clean, corrupted = _pairs(4, 3)
    metric = ns.sequence_log_probability([[5, 6], [7], [8, 9, 10], [11, 3]])
    plan = ns.plan_sweep(model, clean, corrupted, "layers[:].output[:]", metric)
    whole = _run(plan, model)
    merged = ns.SweepResult.merge([_run(unit.plan, model) for unit in plan.units(30)])
    assert merged.asked == whole.asked
    np.testing.assert_allclose(merged.table.values, whole.table.values, atol=1e-12)


def test_what_is_missing_is_marked_and_left_out(model: Any) -> None:
    plan = _plan(model)
    some = ns.SweepResult.merge([_run(plan.take([4, 1]), model), _run(plan.take([3]).shard(0, 2), model)])
    assert some.grid("layers[:].output").prompt.values.tolist() == [1, 3, 4]
    assert not some.is_complete
    assert some.table.done.sum() == 5
    assert some.best(1, prompt=4)["path"].tolist()
    with pytest.raises(BadArgument, match=r"one of the prompts of this part: \[1, 3, 4\]"):
        some.best(1, prompt=0)


def test_parts_survive_their_files(model: Any, tmp_path: Any) -> None:
    plan = _plan(model)
    for n, rows in enumerate(([0, 1, 2], [3, 4, 5])):
        _run(plan.take(rows), model).to_file(tmp_path / f"{n}.safetensors")
    merged = ns.SweepResult.merge([ns.SweepResult.from_file(tmp_path / f"{n}.safetensors") for n in range(2)])
    np.testing.assert_allclose(merged.table.values, _run(plan, model).table.values, atol=1e-12)


def test_parts_of_two_sweeps_are_refused(model: Any) -> None:
    one, other = _run(_plan(model).take([0]), model), _run(_plan(model, "zero").take([1]), model)
    with pytest.raises(KeyMismatch, match="no parts of one sweep"):
        ns.SweepResult.merge([one, other])
    with pytest.raises(KeyMismatch, match="no parts of one sweep"):
        ns.SweepResult.merge([one, _run(_plan(model), model)])


@pytest.mark.parametrize("rows", [[], [6], [-1], [1, 1], [True]])
def test_prompts_that_are_not_there_are_refused(model: Any, rows: list[int]) -> None:
    with pytest.raises(BadArgument, match="each once"):
        _plan(model).take(rows)


def test_a_size_below_nothing_is_refused(model: Any) -> None:
    with pytest.raises(BadArgument, match="above 0"):
        _plan(model).units(0)


def test_all_prompts_in_order_are_the_plan_itself(model: Any) -> None:
    plan = _plan(model)
    assert plan.take(range(6)) is plan


def test_a_corruption_goes_with_its_prompts(model: Any) -> None:
    from nnsplice.engine import expand
    from nnsplice.sweeps.corruption import Corruption

    _, corrupted = _pairs(4)
    (place,) = expand(model, "embed.output")
    noise = tuple(torch.randn(1, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n in range(4))
    change = Corruption(place, ((0,),) * 4, noise)
    plan = ns.plan_sweep(model, corrupted, None, "layers[:].output[:]", ns.logit_diff(1, 2), corruption=change)
    whole, part = _run(plan, model), _run(plan.take([3, 0]), model)
    np.testing.assert_allclose(part.table.values, whole.table.values[[3, 0]], atol=1e-12)
    assert len(np.unique(whole.corrupted)) == 4


def test_an_estimate_counts_what_packed_rows_run(model: Any) -> None:
    """One pair of four tokens that differ at the second, three layers: counted by hand."""
    plan = ns.plan_sweep(model, "w3 w4 w5 w6", "w3 w9 w5 w6", "layers[:].output[:]", ns.logit_diff(1, 2))
    found = plan.estimate()
    # Tokens 1 to 3 of layers 0 and 1, and the last token of layer 2; beside them two runs of the whole prompt.
    cells = (3 + 2 + 1) * 3 + (3 + 2 + 1) * 2 + 1 * 1
    assert (found.cells, found.known, found.units) == (7, 5, 1)
    assert found.work == cells + 2 * 4 * 3
    assert found.naive == 7 * 4 * 3 + 2 * 4 * 3
