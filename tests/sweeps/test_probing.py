"""What is tried before packed rows are trusted stands for the job, and an answer holds for nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import nnsplice as ns
from hooked import build, by_hooks, wrapped
from nnsplice.errors import RefusedExecutor
from nnsplice.sweeps import choosing, plan_sweep, probe_cells, probing, rounding, run
from nnsplice.sweeps.executors import Work
from nnsplice.sweeps.unedited import clean_run
from zoo import _MODERN, double, wrap

METRIC = ns.logit_diff(7, 8)
CLEAN, CORRUPTED = [*range(3, 12)], [3, 40, 20, 6, 45, 8, 33, 10, 31]


def _work(model: Any, plan: Any) -> Work:
    logits, source, _ = clean_run(model, plan, 1000)
    return Work(model, plan, source, logits)


def test_cells_of_every_kind_of_site_layer_and_prompt_are_tried() -> None:
    kinds = ["sliding_attention", "full_attention", "full_attention", "full_attention"]
    model = double("gemma3", num_hidden_layers=4, layer_types=kinds)
    clean, corrupted = [CLEAN[:5], CLEAN, CLEAN[:3]], [CORRUPTED[:5], CORRUPTED, CORRUPTED[:3]]
    sites = ["layers[:].output", "layers[:].mlp.output", "layers[:].groups[:].v", "layers[:].attn.q"]
    plan = plan_sweep(model, clean, corrupted, sites, METRIC, operation="zero")
    jobs = probe_cells.probe_cells(_work(model, plan))
    assert len(jobs) <= 8
    cells = [plan.targets[number].cell for _, number in jobs]
    assert {cell.component for cell in cells} == {target.cell.component for target in plan.targets}
    assert {0, 3} < {cell.layer for cell in cells}
    assert {prompt for prompt, _ in jobs} == {1, 2}
    handle = model._module.model.layers[2].mlp.register_forward_hook(lambda *_: None)
    assert 2 in {plan.targets[number].cell.layer for _, number in probe_cells.probe_cells(_work(model, plan))}
    handle.remove()


def test_a_short_prompt_does_not_vouch_for_longer_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    model, probed = double("llama"), []
    compare = choosing.compare
    monkeypatch.setattr(choosing, "compare", lambda *asked: (probed.append(asked[1]), compare(*asked))[1])

    def swept(length: int, **options: Any) -> Any:
        plan = plan_sweep(model, CLEAN[:length], CORRUPTED[:length], "layers[:].output", METRIC, **options)
        return run(plan, model, progress=False)

    for length in (4, 4, 3, 9, 6):
        assert swept(length).run.executor == "packed"
    assert probed == [4, 9]
    swept(9, operation="zero")
    swept(9, window=2)
    model._module.float()
    swept(9)
    model._module.double()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        swept(9)
    assert probed == [4, *[9] * 5]


@pytest.mark.parametrize("length", [9, 3])
def test_positions_that_a_model_counts_by_itself_past_the_first_tokens_are_found_out(length: int) -> None:
    """A model whose attention adds to tokens beyond the fourth, as it counts them."""
    model = double("llama")
    module = model._module
    forward = type(module.model.layers[1].mlp).forward

    def counting(states: torch.Tensor) -> torch.Tensor:
        late = (torch.arange(states.shape[1]) > 4).to(states)[None, :, None]
        return forward(module.model.layers[1].mlp, states) + late * states.flip(-1)

    module.model.layers[1].mlp.forward = counting
    expected_plan = plan_sweep(model, CLEAN[:length], CORRUPTED[:length], "layers[:].output", METRIC)
    result = run(expected_plan, model, progress=False)
    expected = by_hooks(module, expected_plan, CLEAN[:length], CORRUPTED[:length])
    assert np.abs(result.table.values[0] - expected).max() < 1e-12
    if length == 9:
        assert result.run.executor == "batched" and "code of yours in its blocks" in result.run.note


@pytest.mark.parametrize("executor", ["packed", "batched", "reference"])
def test_a_metric_that_mixes_rows_is_given_one_at_a_time(executor: str) -> None:
    model = double("llama")
    mixing = ns.Metric.of(lambda logits: logits[:, 7] - logits[:, 8] + logits[:, 9].mean() - logits.mean())
    clean, corrupted = [CLEAN, CLEAN[2:]], [CORRUPTED, CORRUPTED[2:]]
    plan = plan_sweep(model, clean, corrupted, "layers[:].output", mixing)
    result = run(plan, model, executor=executor, progress=False)
    for prompt in range(2):
        alone = plan_sweep(model, clean[prompt], corrupted[prompt], "layers[:].output", mixing)
        one = run(alone, model, executor="reference", progress=False)
        width = one.table.values.shape[1]
        values = result.table.values[prompt][np.isfinite(result.table.values[prompt])]
        assert len(values) == width and np.abs(values - one.table.values[0]).max() < 1e-12
        assert abs(result.clean[prompt] - one.clean[0]) < 1e-12


@pytest.mark.parametrize("error", [RuntimeError("boom"), TypeError("boom"), AssertionError("boom"), KeyError("boom")])
def test_whatever_a_way_raises_means_the_next_one(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    model = double("llama")
    plan = plan_sweep(model, CLEAN, CORRUPTED, "layers[:].output", METRIC)
    expected = by_hooks(model._module, plan, CLEAN, CORRUPTED)

    def raising(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(probing, "run_rows", raising)
    result = run(plan, model, progress=False)
    assert result.run.executor == "batched" and f"{type(error).__name__}: " in result.run.note
    assert np.abs(result.table.values[0] - expected).max() < 1e-12
    choosing._trusted.clear()
    monkeypatch.setattr(probing, "batched", replace(probing.batched, run=raising))
    result = run(plan, model, progress=False)
    assert result.run.executor == "reference" and "not batched: " in result.run.note and "boom" in result.run.note
    choosing._trusted.clear()
    memory = RuntimeError("not enough memory: you tried to allocate 12 bytes")
    monkeypatch.setattr(probing, "run_rows", lambda *_: (_ for _ in ()).throw(memory))
    with pytest.raises(RuntimeError, match="not enough memory"):
        run(plan, model, progress=False)
    choosing._trusted.clear()


def test_packed_rows_that_give_other_numbers_are_refused_by_name_too() -> None:
    model = double("llama")

    def mixing(_block: Any, _args: Any, out: Any) -> Any:
        return out + 0.7 * torch.cat([out[:, :1] * 0, out[:, :-1]], 1)

    model._module.model.layers[1].register_forward_hook(mixing)
    plan = plan_sweep(model, CLEAN, CORRUPTED, "layers[:].mlp.output", METRIC)
    with pytest.raises(RefusedExecutor, match="code of yours in its blocks"):
        run(plan, model, executor="packed", progress=False)


def _rounding(model: Any) -> None:
    """Let MLPs compute in float32, as routers do."""
    for layer in model._module.model.layers:
        forward = layer.mlp.float().forward
        layer.mlp.forward = lambda states, forward=forward: forward(states.float()).to(states)


def test_a_model_that_rounds_to_less_than_its_dtype_is_packed_within_its_own_noise() -> None:
    model = double("llama", hidden_size=96, intermediate_size=160)
    _rounding(model)
    plan = plan_sweep(model, CLEAN, CORRUPTED, "layers[:].output", METRIC)
    result = run(plan, model, max_tokens=12, progress=False)
    assert result.run.executor == "packed"
    assert "parts of this model round to less than its float64: rounding moves its logits by " in result.run.note
    far = np.abs(result.table.values[0] - by_hooks(model._module, plan, CLEAN, CORRUPTED)).max()
    assert far < 1e-4


def test_noise_is_that_of_the_arithmetic() -> None:
    found = {}
    for family in ("gpt2", "llama"):  # whose norms compute in float64, and in float32
        model = double(family)
        plan = plan_sweep(model, CLEAN, CORRUPTED, "layers[:].output", METRIC)
        work = _work(model, plan)
        found[family], cost = rounding.rounding_noise(work, probe_cells.probe_cells(work))
        assert cost.forwards == 2 and not model._module.get_input_embeddings()._forward_hooks
    assert 0 < found["gpt2"] < 3e-9 and 1e-9 < found["llama"] < 1e-6


def test_a_difference_is_told_with_what_is_allowed() -> None:
    model = double("llama")
    plan = plan_sweep(model, CLEAN, CORRUPTED, "layers[:].output", METRIC)
    probe = probing._Probe(_work(model, plan), [plan.jobs[0]])
    text = probe._first_difference(probe.jobs, [1.00000004], [1.0], "the logits", 1.0)
    assert text.endswith("(4e-08 apart, 1e-09 allowed)")


def test_in_bfloat16_a_result_says_how_small_an_effect_may_be_rounding() -> None:
    model = wrap("llama")
    model._module.bfloat16()
    plan = plan_sweep(model, CLEAN, CORRUPTED, "layers[:].output", METRIC)
    result = run(plan, model, progress=False)
    assert result.run.executor == "packed"
    note = result.run.note
    assert note.startswith("in bfloat16, logit_diff is known to about 0.0") and "may be rounding" in note
    # Cells that agree to the last digit are still rounded to steps of their size.
    assert float(note.split("about ")[1].split(":")[0]) >= 2**-8 * 0.1


def test_layers_that_run_for_the_last_tokens_alone_are_asked_for_all_logits() -> None:
    config = {
        **_MODERN, "num_hidden_layers": 4, "head_dim": 8, "global_head_dim": 8, "num_kv_shared_layers": 2,
        "sliding_window": 4, "hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": 64,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    }  # fmt: skip
    module = build("Gemma4TextConfig", config)
    model = wrapped(module)
    plan = plan_sweep(model, CLEAN, CORRUPTED, "layers[:].output", METRIC)
    expected = by_hooks(module, plan, CLEAN, CORRUPTED)
    for executor in ("batched", "reference", "auto"):
        found = run(plan, model, executor=executor, progress=False).table.values[0]
        assert np.abs(found - expected).max() < 1e-12
    assert len({round(value, 9) for value in expected}) > 8


def test_the_trial_of_a_small_plan_is_the_run_that_gives_its_values() -> None:
    model = double("llama")
    plan = plan_sweep(model, CLEAN, CORRUPTED, "layers[:].output", METRIC)
    first = run(plan, model, progress=False)
    second = run(plan, model, progress=False)
    tried = len(probe_cells.probe_cells(_work(model, plan)))
    assert first == second and first.run.executor == second.run.executor == "packed"
    assert first.run.forwards == second.run.forwards + tried  # and no pack or recorded pass beside the plan's own
    assert first.run.tokens == second.run.tokens + tried * 3 * len(CLEAN)
    assert np.abs(first.table.values[0] - by_hooks(model._module, plan, CLEAN, CORRUPTED)).max() < 1e-12


def test_without_memory_for_all_of_a_plan_the_cells_are_tried_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = double("llama"), []
    plan = plan_sweep(model, CLEAN, CORRUPTED, "layers[:].output", METRIC)
    expected = by_hooks(model._module, plan, CLEAN, CORRUPTED)
    run_rows = probing.run_rows

    def short(work: Work, jobs: Any) -> Any:
        asked.append(len(jobs))
        if len(jobs) > 10:
            raise RuntimeError("not enough memory: you tried to allocate 12 bytes")
        return run_rows(work, jobs)

    monkeypatch.setattr(probing, "run_rows", short)
    result = run(plan, model, progress=False)
    assert asked == [len(plan.jobs), len(probe_cells.probe_cells(_work(model, plan)))]
    assert result.run.executor == "packed" and np.abs(result.table.values[0] - expected).max() < 1e-12


def test_a_journal_is_given_no_values_of_a_trial(tmp_path: Any) -> None:
    model = double("llama")
    plan = plan_sweep(model, CLEAN, CORRUPTED, "layers[:].output", METRIC)
    file = tmp_path / "run.jsonl"
    first = run(plan, model, journal=file, progress=False)
    size = file.stat().st_size
    choosing._trusted.clear()
    assert run(plan, model, journal=file, progress=False) == first and file.stat().st_size == size


def test_values_of_a_trial_that_differ_are_thrown_away(monkeypatch: pytest.MonkeyPatch) -> None:
    model = double("llama")
    plan = plan_sweep(model, CLEAN, CORRUPTED, "layers[:].output", METRIC)
    expected = by_hooks(model._module, plan, CLEAN, CORRUPTED)
    measured_states = probing.measured_states
    # A fault in packed rows alone, in each of their ways.
    monkeypatch.setattr(
        probing,
        "measured_states",
        lambda work, head, states, jobs: measured_states(work, head, states + 1e-3 * states.roll(1, -1), jobs),
    )
    result = run(plan, model, progress=False)
    assert result.run.executor == "batched" and "in a run of its own" in result.run.note
    assert np.abs(result.table.values[0] - expected).max() < 1e-12


@pytest.mark.parametrize("scale", [1, 1e-2])
def test_a_cap_on_logits_is_seen_where_those_of_the_first_sweep_are_small(scale: float) -> None:
    model = double("gemma2")
    with torch.no_grad():
        model._module.lm_head.weight.mul_(scale)
    for clean in ([45, 36, 58, 50, 46, 50], CLEAN, [5, 9, 40], [45, 36, 58, 50, 46, 50]):
        plan = plan_sweep(model, clean, None, "layers[:].mlp.output[-1]", METRIC, operation="zero")
        result, expected = (run(plan, model, executor=how, progress=False) for how in ("auto", "reference"))
        assert result.run.executor == "packed"
        assert np.abs(result.table.values - expected.table.values).max() < 1e-12
