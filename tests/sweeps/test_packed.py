"""The packed executor: exact, what the cost law says, and careful about models that it does not cover."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import nnsplice as ns
from nnsplice.sweeps import choosing, plan_sweep, run
from nnsplice.sweeps.packed import attention, executor, recording
from zoo import FAMILIES, wrap

CLEAN = ["w3 w4 w5 w6 w7", "w13 w14 w15", "w3 w4 w5 w6 w17"]
CORRUPTED = ["w3 w9 w5 w6 w7", "w13 w24 w15", "w3 w4 w5 w26 w17"]
SITES = (
    "embed.output", "layers[:].input", "layers[:].output", "layers[:].mid", "layers[:].attn.output",
    "layers[:].mlp.output", "layers[:].heads[:].output", "layers[:].heads[:].q", "layers[:].groups[:].k",
    "layers[:].groups[:].v", "layers[:].neurons[3]", "layers[:].mlp.up", "layers[:].attn.q", "layers[:].attn.o",
)  # fmt: skip
METRIC = ns.logit_diff("w7", "w8")
#: No causal decoders.
NOT_COVERED = {"t5", "bart", "bert"}
#: Families whose attention is code of their own.
OWN_CODE = {"gptj", "gpt_neo", "bloom", "falcon", "falcon_mqa", "falcon_mha", "codegen"}
COVERED = {
    "gptj", "gpt_neo", "bloom", "falcon", "falcon_mqa", "falcon_mha", "codegen", "t5", "bart", "bert",
}  # fmt: skip
COVERED = [family for family in FAMILIES if family not in NOT_COVERED]


def _double(family: str, **config: Any) -> Any:
    model = wrap(family, **config)
    model._module.double()
    return model


def _sites(model: Any) -> list[str]:
    found = []
    for site in SITES:
        try:
            ns.expand(model, site)
        except ns.errors.NnspliceError:
            continue
        found.append(site)
    return found


def _values(plan: Any, model: Any, how: str) -> np.ndarray:
    return run(plan, model, executor=how, progress=False).table.values


@pytest.mark.parametrize("options", [{}, {"window": 2}, {"operation": "zero"}, {"operation": "noise"}], ids=str)
@pytest.mark.parametrize("family", COVERED)
def test_packed_equals_batched_at_every_site(family: str, options: dict[str, Any]) -> None:
    model = _double(family)
    sites = [site for site in _sites(model) if "window" not in options or not site.startswith("embed")]
    assert len(sites) >= 10
    plan = plan_sweep(model, CLEAN, CORRUPTED, sites, METRIC, **options)
    packed, batched = _values(plan, model, "packed"), _values(plan, model, "batched")
    assert np.nanmax(np.abs(packed - batched)) < 1e-12
    assert len({round(v, 9) for v in packed[0][np.isfinite(packed[0])]}) > 50


@pytest.mark.parametrize("family", sorted(NOT_COVERED))
def test_what_is_not_covered_is_run_another_way_and_says_why(family: str) -> None:
    model = _double(family)
    plan = plan_sweep(model, CLEAN, CORRUPTED, "layers[:].output", METRIC)
    with pytest.raises(NotImplementedError):
        run(plan, model, executor="packed", progress=False)
    result = run(plan, model, progress=False)
    assert result.run.executor == "batched"
    assert result.run.note.startswith("not packed: ")
    assert np.nanmax(np.abs(result.table.values - _values(plan, model, "reference"))) < 1e-12


def test_metrics_at_another_position_spans_and_single_positions() -> None:
    model = _double("qwen3")
    spans = {"s": [(1, 3), (0, 2), (3, 5)]}
    for sites, metric in (
        ("layers[:].output[0:3]", METRIC.at(2)),
        ('layers[:].output["s"]', METRIC),
        (["layers[:].heads[:].output[-1]", "layers[1].mlp.output[1]"], METRIC),
    ):
        plan = plan_sweep(model, CLEAN, CORRUPTED, sites, metric, spans=spans, operation="zero")
        assert np.nanmax(np.abs(_values(plan, model, "packed") - _values(plan, model, "reference"))) < 1e-12


def test_one_cached_value_off_by_a_hundredth_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _double("llama")
    plan = plan_sweep(model, CLEAN, CORRUPTED, "layers[:].output", METRIC)
    right = _values(plan, model, "packed")
    record = recording.record

    def wrong(*args: Any) -> Any:
        made = record(*args)
        _, value = list(made.attended.values())[1]
        value[:, :, 0] *= 1.01
        return made

    monkeypatch.setattr(executor, "record", wrong)
    assert np.nanmax(np.abs(_values(plan, model, "packed") - right)) > 1e-6
    choosing._trusted.clear()
    result = run(plan, model, progress=False)
    assert (result.run.executor, "in a run of its own" in result.run.note) == ("batched", True)
    assert np.nanmax(np.abs(result.table.values - right)) < 1e-12


def test_a_model_is_probed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    probed: list[int] = []
    compare = choosing._compare
    monkeypatch.setattr(choosing, "_compare", lambda work: (probed.append(1), compare(work))[1])
    model = _double("llama")
    for _ in range(2):
        assert ns.sweep(model, CLEAN, CORRUPTED, "layers[:].output", METRIC, progress=False).run.executor == "packed"
    assert len(probed) == 1


def test_the_models_own_attention_is_back_afterwards_also_after_an_error() -> None:
    model = _double("gemma2")
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
    fresh = _double("gemma2")
    assert torch.equal(logits, ns.patched_logits(fresh, CLEAN[0], ns.capture(fresh, CLEAN[0], "layers[0].output[:]")))


def test_attention_can_be_exchanged_inside_an_exchange() -> None:
    model = _double("llama")
    outer, inner = attention.KeysAndValues(), attention.KeysAndValues()
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad(), attention.attention(model._module, outer):
        with attention.attention(model._module, inner):
            a = model._module(ids, use_cache=False).logits
        b = model._module(ids, use_cache=False).logits
    assert len(outer.of) == len(inner.of) == 3
    assert torch.equal(a, b)


def test_the_tokens_that_run_are_those_of_the_cost_law() -> None:
    model = _double("llama")
    length, layers = 12, 3
    clean, corrupted = list(range(3, 3 + length)), list(range(30, 30 + length))
    plan = plan_sweep(model, clean, corrupted, "layers[:].output", METRIC)
    result = run(plan, model, executor="packed", progress=False)
    suffixes = length * (length + 1) // 2
    # Blocks 1 and 2 see the suffix of every site patched below; the last then runs one token of each.
    inner = sum(layer * suffixes for layer in range(1, layers))
    assert result.run.tokens == inner + (layers - 1) * length
    assert result.run.block_calls == layers  # one for each block that runs, and the thin pass of the last
    prefixed = plan_sweep(model, clean, [*clean[:6], *corrupted[6:]], "layers[:].output", METRIC)
    assert run(prefixed, model, executor="packed", progress=False).run.tokens < 0.35 * result.run.tokens


def test_flops_counted_by_torch_stay_near_the_cost_law() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = wrap("llama", num_hidden_layers=6)
    clean, corrupted = list(range(3, 23)), list(range(30, 50))
    plan = plan_sweep(model, clean, corrupted, "layers[:].output", METRIC)
    with FlopCounterMode(display=False) as one, torch.no_grad():
        model._module(torch.tensor([corrupted]))
    with FlopCounterMode(display=False) as many:
        run(plan, model, executor="packed", progress=False)
    forwards = many.get_total_flops() / one.get_total_flops()
    assert forwards < 0.40 * 6 * 20  # (L - 1)(T + 1) / 4 is 0.22 of it, the runs before and small matrices come on top
