"""The packed executor: exact, what the cost model says, and careful about models that it does not cover."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import nnsplice as ns
from nnsplice import engine
from nnsplice.atlas import families
from nnsplice.packed import CostModel, attention, heads, recording
from nnsplice.packed import passes as packed_passes
from nnsplice.packed import running as packed_running
from nnsplice.sweeps import choosing, chunking, packing, plan_sweep, run, unedited
from nnsplice.sweeps.executors import Work
from zoo import FAMILIES, double, having, wrap

CLEAN = ["w3 w4 w5 w6 w7", "w13 w14 w15", "w3 w4 w5 w6 w17"]
CORRUPTED = ["w3 w9 w5 w6 w7", "w13 w24 w15", "w3 w4 w5 w26 w17"]
SITES = (
    "embed.output", "layers[:].input", "layers[:].output", "layers[:].mid", "layers[:].attn.output",
    "layers[:].mlp.output", "layers[:].heads[:].output", "layers[:].heads[:].q", "layers[:].groups[:].k",
    "layers[:].groups[:].v", "layers[:].neurons[3]", "layers[:].mlp.up", "layers[:].attn.q", "layers[:].attn.o",
)  # fmt: skip
METRIC = ns.logit_diff("w7", "w8")

#: No causal decoders.
NOT_COVERED = ("t5", "bart", "bert")
#: gpt_oss has sinks, mpt and bloom ALiBi; gptj, gpt_neo, bloom, falcon, codegen, mpt have attention code of their own.
COVERED = [family for family in (*FAMILIES, "gpt_oss", "mpt") if family not in NOT_COVERED]


def _values(plan: Any, model: Any, how: str) -> np.ndarray:
    return run(plan, model, executor=how, progress=False).table.values


@pytest.mark.parametrize("options", [{}, {"window": 2}, {"operation": "zero"}, {"operation": "noise"}], ids=str)
@pytest.mark.parametrize("family", COVERED)
def test_packed_equals_batched_at_every_site(family: str, options: dict[str, Any]) -> None:
    model = double(family)
    sites = [site for site in having(model, SITES) if "window" not in options or not site.startswith("embed")]
    assert len(sites) >= 10
    plan = plan_sweep(model, CLEAN, CORRUPTED, sites, METRIC, **options)
    packed, batched = _values(plan, model, "packed"), _values(plan, model, "batched")
    assert np.nanmax(np.abs(packed - batched)) < 1e-12
    assert len({round(v, 9) for v in packed[0][np.isfinite(packed[0])]}) > 50


@pytest.mark.parametrize("family", sorted(NOT_COVERED))
def test_what_is_not_covered_is_run_another_way_and_says_why(family: str) -> None:
    model = double(family)
    plan = plan_sweep(model, CLEAN, CORRUPTED, "layers[:].output", METRIC)
    with pytest.raises(NotImplementedError):
        run(plan, model, executor="packed", progress=False)
    result = run(plan, model, progress=False)
    assert result.run.executor == "batched"
    assert result.run.note.startswith("not packed: ")
    assert np.nanmax(np.abs(result.table.values - _values(plan, model, "reference"))) < 1e-12


def _mixing(_block: Any, _args: Any, out: Any) -> Any:
    """A hook by which a token hears of the one before it."""
    held = out[0] if isinstance(out, tuple) else out
    new = held + 0.7 * torch.cat([held[:, :1] * 0, held[:, :-1]], 1)
    return (new, *out[1:]) if isinstance(out, tuple) else new


@pytest.mark.parametrize("metric", [METRIC, ns.probability("w9")], ids=lambda metric: metric.name)
def test_a_hook_that_packed_rows_do_not_bear_is_found_out_whatever_the_metric(metric: ns.Metric) -> None:
    model = wrap("llama")
    with torch.no_grad():
        model._module.lm_head.weight.mul_(8)  # every probability but one is far below the tolerance
    plan = plan_sweep(model, CLEAN[0], CORRUPTED[0], "layers[:].output", metric)
    assert run(plan, model, progress=False).run.executor == "packed"
    handle = model._module.model.layers[1].register_forward_hook(_mixing)
    result = run(plan, model, progress=False)
    assert (result.run.executor, "code of yours in its blocks" in result.run.note) == ("batched", True)
    np.testing.assert_allclose(result.table.values, _values(plan, model, "reference"), rtol=1e-3)
    handle.remove()
    assert run(plan, model, progress=False).run.executor == "packed"


@pytest.mark.parametrize("before", [False, True])
def test_a_sweep_of_a_model_with_edits_goes_through_them(before: bool) -> None:
    model = double("llama")
    plan = plan_sweep(model, CLEAN, CORRUPTED, "layers[:].output", METRIC)
    plain = run(plan, model, progress=False) if before else None
    direction = ns.capture(model, "w3 w4", "layers[1].output[-1]")
    with model.edit() as (_, edited):
        direction.add_to(edited, 3.0)
    result = run(plan, edited, progress=False)
    assert (result.run.executor, "has edits" in result.run.note) == ("batched", True)
    assert np.nanmax(np.abs(result.table.values - _values(plan, edited, "reference"))) < 1e-12
    assert plain is None or np.abs(result.corrupted - plain.corrupted).min() > 1e-3
    assert before is False or run(plan, model, progress=False) == plain


@pytest.mark.parametrize("before", [False, True])
def test_a_sweep_inside_a_steering_block_is_steered(before: bool) -> None:
    model = double("llama")
    plan = plan_sweep(model, CLEAN, CORRUPTED, "layers[:].output", METRIC)
    plain = run(plan, model, progress=False) if before else None
    with ns.steering.steer(model, ns.capture(model, "w3 w4", "layers[1].output[-1]"), 2.0, where="prompt"):
        result = run(plan, model, progress=False)
        alone = _values(plan, model, "reference")
    assert result.run.executor == "batched" and "outside a run of the model" in result.run.note
    assert np.nanmax(np.abs(result.table.values - alone)) < 1e-12
    assert plain is None or np.abs(result.corrupted - plain.corrupted).min() > 1e-3


@pytest.mark.parametrize("family", ["qwen3", "gpt_neo", "bloom", "gpt_oss"])
def test_metrics_at_another_position_spans_and_single_positions(family: str) -> None:
    model = double(family)
    spans = {"s": [(1, 3), (0, 2), (3, 5)]}
    for sites, metric in (
        ("layers[:].output[0:3]", METRIC.at(2)),
        ('layers[:].output["s"]', METRIC),
        (["layers[:].heads[:].output[-1]", "layers[1].mlp.output[1]"], METRIC),
        ('layers[:].mlp.output["s"]', ns.probability("w7")),
    ):
        plan = plan_sweep(model, CLEAN, CORRUPTED, sites, metric, spans=spans, operation="zero")
        assert np.nanmax(np.abs(_values(plan, model, "packed") - _values(plan, model, "reference"))) < 1e-12


def test_one_cached_value_off_by_a_hundredth_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = double("llama")
    plan = plan_sweep(model, CLEAN, CORRUPTED, "layers[:].output", METRIC)
    right = _values(plan, model, "packed")
    record = recording.record

    def wrong(*args: Any) -> Any:
        made = record(*args)
        _, value = list(made.attended.values())[1]
        value[:, :, 0] *= 1.01
        return made

    monkeypatch.setattr(packed_running, "record", wrong)
    assert np.nanmax(np.abs(_values(plan, model, "packed") - right)) > 1e-6
    choosing._trusted.clear()
    result = run(plan, model, progress=False)
    assert (result.run.executor, "in a run of its own" in result.run.note) == ("batched", True)
    assert np.nanmax(np.abs(result.table.values - right)) < 1e-12


def test_a_model_is_probed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    probed: list[int] = []
    compare = choosing.compare
    monkeypatch.setattr(choosing, "compare", lambda *asked: (probed.append(1), compare(*asked))[1])
    model = double("llama")
    for _ in range(2):
        assert ns.sweep(model, CLEAN, CORRUPTED, "layers[:].output", METRIC, progress=False).run.executor == "packed"
    assert len(probed) == 1


def test_threads_take_turns_with_a_model() -> None:
    model = double("llama")
    plan = plan_sweep(model, CLEAN, CORRUPTED, "layers[:].output", METRIC)
    alone, config = run(plan, model, progress=False), model._module.config
    before = config._attn_implementation
    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(lambda _: run(plan, model, progress=False), range(9)))
    assert all(np.nanmax(np.abs(one.table.values - alone.table.values)) < 1e-12 for one in results)
    assert config._attn_implementation == before


def test_the_models_own_attention_is_back_afterwards_also_after_an_error() -> None:
    model = double("gemma2")
    config = model._module.config
    before = config._attn_implementation
    plan = plan_sweep(model, CLEAN, CORRUPTED, "layers[:].output", METRIC)
    _values(plan, model, "packed")
    assert config._attn_implementation == before
    with pytest.raises(ZeroDivisionError):
        with attention.attention(model._module, lambda *_: (_ for _ in ()).throw(AssertionError)):
            raise ZeroDivisionError
    assert config._attn_implementation == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model._module.modules())
    logits = ns.patched_logits(model, CLEAN[0], ns.capture(model, CLEAN[0], "layers[0].output[:]"))
    fresh = double("gemma2")
    assert torch.equal(logits, ns.patched_logits(fresh, CLEAN[0], ns.capture(fresh, CLEAN[0], "layers[0].output[:]")))


def test_attention_can_be_exchanged_inside_an_exchange() -> None:
    model = double("llama")
    outer: list[Any] = []
    inner: list[Any] = []

    def noting(calls: list[Any]) -> attention.Attend:
        return lambda call: (calls.append(call), call.attended(call.query, call.key, call.value, call.mask))[1]

    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad(), attention.attention(model._module, noting(outer)):
        with attention.attention(model._module, noting(inner)):
            a = model._module(ids, use_cache=False).logits
        b = model._module(ids, use_cache=False).logits
    assert len(outer) == len(inner) == 3 and {call.own for call in (*outer, *inner)} == {"sdpa"}
    assert torch.equal(a, b)


def test_the_tokens_that_run_are_those_of_the_cost_law() -> None:
    model = double("llama")
    length, layers = 12, 3
    clean, corrupted = list(range(3, 3 + length)), list(range(30, 30 + length))
    plan = plan_sweep(model, clean, corrupted, "layers[:].output", METRIC)
    run(plan, model, executor="packed", progress=False)  # a model is probed only once
    result = run(plan, model, executor="packed", progress=False)
    suffixes = length * (length + 1) // 2
    # Blocks 1 and 2 see the suffix of every site patched below; the last then runs one token of each.
    inner = sum(layer * suffixes for layer in range(1, layers))
    unedited = 2 * layers * length  # the clean run, and the corrupted one
    assert result.run.tokens == unedited + inner + (layers - 1) * length
    # One for each block that runs, and the thin pass of the last.
    assert result.run.block_calls == 2 * layers + layers
    prefixed = plan_sweep(model, clean, [*clean[:6], *corrupted[6:]], "layers[:].output", METRIC)
    again = run(prefixed, model, executor="packed", progress=False)
    assert again.run.tokens - unedited < 0.35 * (result.run.tokens - unedited)


class _Products(TorchDispatchMode):
    """Counts operations as torch does, without its hooks on all modules: packed rows run through blocks with hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._schema.name.removeprefix("aten::") in ("mm", "addmm", "_grouped_mm"):
            self.operations += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def _multiplied(run_it: Callable[[], Any]) -> tuple[Any, int]:
    """What a call returns, and the operations that torch counts in products with a matrix of weights."""
    with _Products() as counter:
        result = run_it()
    return result, counter.operations


def test_operations_are_those_that_torch_counts_and_the_cost_law_foretells() -> None:
    layers, length = 6, 20
    model = wrap("llama", num_hidden_layers=layers, hidden_size=64, intermediate_size=128, head_dim=16)
    block = model._module.model.layers[0]
    clean, corrupted = list(range(3, 3 + length)), list(range(30, 30 + length))
    plan = plan_sweep(model, clean, corrupted, "layers[:].output", METRIC)
    run(plan, model, executor="packed", progress=False)  # a model is probed only once
    result, counted = _multiplied(lambda: run(plan, model, executor="packed", progress=False))

    def per_token(module: Any) -> int:
        return 2 * sum(p.numel() for p in module.parameters() if p.dim() == 2)

    inputs = per_token(block.self_attn) - per_token(block.self_attn.o_proj)
    suffixes, below = length * (length + 1) // 2, layers - 1
    inner = per_token(block) * suffixes * sum(range(1, below))
    last = inputs * suffixes * below + per_token(block) * length * below
    before = 2 * per_token(block) * layers * length  # the clean run, and the corrupted one, which is recorded
    head = per_token(model._module.lm_head)
    # What comes on top are a few logits.
    assert inner + last + before < counted < inner + last + before + 8 * head
    assert abs(result.run.flops - counted) < 0.005 * counted
    naive = per_token(block) * (layers * length) ** 2
    assert inner + last < naive * (layers - 1) * (length + 1) / 4 / (layers * length)
    assert result.run.block_calls == layers + 2 * layers and result.run.forwards == 2


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in NOT_COVERED])
def test_the_operations_that_a_result_tells_are_those_that_torch_counts(family: str) -> None:
    model = wrap(family)
    plan = plan_sweep(model, CLEAN, CORRUPTED, "layers[:].output[1:]", ns.rank("w7"))
    run(plan, model, executor="packed", progress=False)  # a model is probed only once
    rows, counted = _multiplied(lambda: run(plan, model, executor="batched", progress=False))
    assert rows.run.flops == counted > 0
    packed, counted = _multiplied(lambda: run(plan, model, executor="packed", progress=False))
    assert 0.97 * counted < packed.run.flops <= counted
    assert packed.run.flops < 0.8 * rows.run.flops


@pytest.mark.parametrize("lengths", [(9,), (9, 6)])
def test_logits_that_a_hook_has_computed_of_all_tokens_are_counted(lengths: tuple[int, ...]) -> None:
    model = wrap("llama")
    # Code around the head may mix tokens, so the model is not asked for the logits of single ones.
    model._module.lm_head.register_forward_hook(lambda *_: None)
    clean, corrupted = [[*range(3, 3 + n)] for n in lengths], [[*range(30, 30 + n)] for n in lengths]
    plan = plan_sweep(model, clean, corrupted, "layers[:].output[1]", ns.rank("w7"))
    run(plan, model, executor="packed", progress=False)  # a model is probed only once
    packed, counted = _multiplied(lambda: run(plan, model, executor="packed", progress=False))
    # Left out are the short runs that look for hooks with another effect each time, and three rows that the head is
    # checked on.
    _, checks = _multiplied(lambda: engine.refuse_changed_logits(model))
    assert counted - checks - packed.run.flops == 3 * 2 * model._module.lm_head.weight.numel()


def test_a_pack_holds_no_more_tokens_than_allowed_and_the_numbers_do_not_depend_on_it() -> None:
    model = double("gemma3")
    plan = plan_sweep(model, CLEAN, CORRUPTED, ["layers[:].output", "layers[:].mlp.output"], METRIC)
    once = _values(plan, model, "packed")
    work = _work(model, plan)
    _, cost = choosing.EXECUTORS["packed"](work, plan.jobs)
    calls = cost.block_calls
    assert cost.peak > 30
    for allowed, way in ((5, "padded"), (11, "padded"), (30, "exchanged"), (30, "padded")):
        work.memo.pop("recording", None)
        work.memo["way"] = way
        chunks = list(chunking.chunks(work, choosing.EXECUTORS["packed"], plan.jobs, allowed))
        assert all(spent.peak <= allowed for _, _, spent in chunks)
        assert all(spent.block_calls <= calls for _, _, spent in chunks)
        found = {job: value for jobs, values, _ in chunks for job, value in zip(jobs, values, strict=True)}
        assert max(abs(found[job] - once[job]) for job in plan.jobs) < 1e-12


def test_chunks_about_the_same_prompts_share_one_recorded_pass() -> None:
    model = double("llama")
    lengths = (5, 9, 4, 7)
    clean, corrupted = [[*range(3, 3 + n)] for n in lengths], [[*range(30, 30 + n)] for n in lengths]
    plan = plan_sweep(model, clean, corrupted, "layers[:].output", METRIC)
    once = run(plan, model, executor="packed", progress=False)
    for room, passes in ((10_000, 1), (sum(lengths), 1), (14, 2), (9, 4)):
        found = run(plan, model, executor="packed", max_tokens=room, progress=False)
        groups = chunking._recorded_together(_work(model, plan), range(4), room)
        assert len(groups) == passes and sorted(prompt for group in groups for prompt in group) == [0, 1, 2, 3]
        assert np.nanmax(np.abs(found.table.values - once.table.values)) < 1e-12
        assert np.abs(found.corrupted - once.corrupted).max() < 1e-12
        # The clean runs, of prompts of one length at a time, and the recorded ones of as many prompts as are shared.
        padded = sum(len(recording._padded_batches(group, lengths)) for group in groups)
        assert found.run.forwards == 4 + padded
    # A prompt too long to be recorded with its chunk, and one without cells.
    same = plan_sweep(model, [*clean, clean[1]], [*corrupted, clean[1]], "layers[:].output", METRIC)
    found = run(same, model, executor="packed", max_tokens=8, progress=False)
    assert np.nanmax(np.abs(found.table.values[:4] - once.table.values)) < 1e-12
    assert found.table.values[4] == pytest.approx(found.corrupted[4], abs=0, nan_ok=True)


def test_the_first_chunk_is_a_small_one_so_that_the_bar_moves_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    model = double("llama")
    each = CostModel.of(model).token
    monkeypatch.setattr(chunking, "LEAST_TOKENS", 4)
    monkeypatch.setattr(chunking, "FIRST_FLOPS", 12 * each)
    monkeypatch.setattr(chunking, "CHUNK_FLOPS", 30 * each)
    assert chunking.tokens_at_once(model, None) == (12, 30)
    assert chunking.tokens_at_once(model, 7) == (7, 7)  # as it was asked for
    plan = plan_sweep(model, CLEAN, CORRUPTED, "layers[:].output", METRIC)
    work = _work(model, plan)
    chunks = list(chunking.chunks(work, choosing.EXECUTORS["packed"], plan.jobs, 30, 12))
    assert [spent.peak <= 12 for _, _, spent in chunks] == [True] + [False] * (len(chunks) - 1)
    assert [job for jobs, _, _ in chunks for job in jobs] == sorted(plan.jobs)


def _work(model: Any, plan: Any) -> Any:
    logits, source, _ = unedited.clean_run(model, plan, 1000)
    return Work(model, plan, source, logits)


# Gemma 2 takes its softmax in float32, whatever the model's dtype.
@pytest.mark.parametrize(
    ("family", "near"), [("llama", 1e-12), ("gemma2", 1e-6), ("mistral", 1e-12), ("gpt_oss", 1e-12)]
)
def test_rows_padded_to_share_a_call_of_attention_give_the_same_numbers(
    family: str, near: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = double(family)
    sites = ["layers[:].output", "layers[:].attn.output", "layers[:].groups[:].v", "layers[:].heads[:].output[-1]"]
    plan = plan_sweep(model, CLEAN, CORRUPTED, sites, METRIC)
    exact = _values(plan, model, "packed")
    for bucket in (2, 64):
        monkeypatch.setitem(packed_running.BUCKETS, "cpu", bucket)
        assert np.nanmax(np.abs(_values(plan, model, "packed") - exact)) < near


def test_a_padded_pack_calls_attention_once_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    model = double("llama")
    plan = plan_sweep(model, CLEAN, CORRUPTED, "layers[:].output", METRIC)
    calls: list[int] = []
    attended = attention.AttentionCall.attended
    monkeypatch.setattr(attention.AttentionCall, "attended", lambda *given: (calls.append(1), attended(*given))[1])
    counts = []
    for bucket in (1, 64):
        calls.clear()
        monkeypatch.setitem(packed_running.BUCKETS, "cpu", bucket)
        _values(plan, model, "packed")
        counts.append(len(calls))
    recorded = 3  # at three layers, prompts of two lengths in one pass
    assert counts[1] == recorded + 2
    assert counts[0] > counts[1]


def test_only_the_logits_that_the_metric_reads_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = double("llama")
    asked: list[int] = []
    logits = heads.Head.logits
    monkeypatch.setattr(heads.Head, "logits", lambda self, states: (asked.append(len(states)), logits(self, states))[1])
    plan = plan_sweep(model, CLEAN, CORRUPTED, "layers[:].output", METRIC)
    _values(plan, model, "packed")  # a model is probed only once
    asked.clear()
    two = _values(plan, model, "packed")
    assert asked == [3]  # the corrupted prompts as they are
    whole = ns.Metric.of(lambda logits: logits[:, 7] - logits[:, 8])
    plan = plan_sweep(model, CLEAN, CORRUPTED, "layers[:].output", whole)
    _values(plan, model, "packed")
    asked.clear()
    monkeypatch.setattr(packing, "LOGITS", 128)  # two rows of logits at once
    assert np.nanmax(np.abs(_values(plan, model, "packed") - two)) < 1e-12
    assert asked == [3, *[2] * (len(plan.jobs) // 2), *[1] * (len(plan.jobs) % 2)]


@pytest.mark.parametrize("family", ["gemma2", "cohere"])
def test_a_head_that_does_more_than_multiply_is_run_as_it_is(family: str) -> None:
    model = double(family)
    plan = plan_sweep(model, CLEAN, CORRUPTED, "layers[:].output", METRIC)
    assert not recording.record(packing.base_of(_work(model, plan)), [0]).head.plain
    assert np.nanmax(np.abs(_values(plan, model, "packed") - _values(plan, model, "reference"))) < 1e-12


def test_left_padded_prompts_are_swept_as_if_they_had_no_padding() -> None:
    model = double("gpt2")
    ids = [[0, 0, 13, 14, 15], [3, 4, 5, 6, 7]]
    mask = [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]
    padded = [{"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(mask)} for rows in (ids, _other(ids))]
    plan = plan_sweep(model, padded[0], padded[1], "layers[:].output", METRIC)
    own = [[rows[0][2:], rows[1]] for rows in (ids, _other(ids))]
    bare = plan_sweep(model, own[0], own[1], "layers[:].output", METRIC)
    values = _values(plan, model, "packed")
    assert np.array_equal(values, _values(bare, model, "packed"), equal_nan=True)
    assert np.nanmax(np.abs(values - _values(plan, model, "reference"))) < 1e-12


def _other(ids: list[list[int]]) -> list[list[int]]:
    return [[*row[:-2], row[-2] + 9, row[-1]] for row in ids]


def test_a_hybrid_model_runs_its_mixers_over_whole_prompts() -> None:
    """A convolution reads earlier tokens by code of its own, as attention does in GPT-J."""
    model = double("lfm2")
    sites = ["layers[:].output", "layers[:].mixer.output", "layers[:].input"]
    plan = plan_sweep(model, CLEAN, CORRUPTED, sites, METRIC)
    assert run(plan, model, progress=False).run.executor == "packed"
    packed, slow = _values(plan, model, "packed"), _values(plan, model, "reference")
    np.testing.assert_allclose(packed, slow, rtol=0, atol=1e-12)
    assert np.nanstd(slow) > 1e-3


def test_a_layer_whose_mixer_is_not_known_is_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "MIXERS", ())
    model = double("lfm2")
    result = ns.sweep(model, CLEAN[0], CORRUPTED[0], "layers[:].output", METRIC, progress=False)
    assert result.run.executor == "batched"
    assert "not packed: a layer of it has no module that mixes tokens" in result.run.note


def test_memory_that_runs_out_while_recording_halves_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    model = double("llama")
    plan = plan_sweep(model, CLEAN, CORRUPTED, "layers[:].output", METRIC)
    right = _values(plan, model, "packed")
    asked: list[int] = []
    keeper = packed_passes._keeper

    def narrow(entering: list[Any], *more: Any) -> Any:
        keep = keeper(entering, *more)

        def kept(block: Any, args: Any, kwargs: Any) -> None:
            asked.append(len(args[0]))
            if len(args[0]) > 1:
                raise RuntimeError("[enforce fail] not enough memory: you tried to allocate 12 bytes")
            keep(block, args, kwargs)

        return kept

    monkeypatch.setattr(packed_passes, "_keeper", narrow)
    assert np.nanmax(np.abs(_values(plan, model, "packed") - right)) < 1e-12
    assert max(asked) == 3 and asked[-1] == 1
