"""Every executor gives the numbers of one trace per cell, which is written with means that torch hooks have checked."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import nnsplice as ns
from nnsplice.errors import UnknownPath
from nnsplice.sweeps import Plan, plan_sweep, run
from zoo import FAMILIES, SEQ2SEQ, build, double, wrap

CLEAN = ["w3 w4 w5 w6 w7", "w13 w14 w15"]
CORRUPTED = ["w3 w9 w5 w6 w7", "w13 w24 w15"]
SITES = (
    "embed.output",
    "layers[:].output",
    "layers[:].attn.output",
    "layers[:].mlp.output",
    "layers[:].heads[:].output[-1]",
    "layers[:].heads[0,2].q",
    "layers[:].groups[:].k[1]",
    "layers[:].groups[:].v",
    "layers[:].neurons[3,5].output[-1]",
)
METRIC = ns.logit_diff("w7", "w8")


def _sites(model: Any, family: str) -> list[str]:
    """The sites of the list that this family has; those of an encoder-decoder stand in its encoder."""
    prefix = "encoder." if family in SEQ2SEQ else ""
    found = []
    for site in SITES:
        try:
            ns.expand(model, prefix + site)
        except ns.errors.NnspliceError:
            continue
        found.append(prefix + site)
    return [*found, "layers[:].output"] if prefix else found


def _values(plan: Plan, model: Any, executor: str, **options: Any) -> np.ndarray:
    return run(plan, model, executor=executor, progress=False, **options).table.values


@pytest.mark.parametrize("family", FAMILIES)
def test_batched_equals_one_trace_per_cell_also_of_cells_known_without_computing(family: str) -> None:
    model = double(family)
    plan = plan_sweep(model, CLEAN, CORRUPTED, _sites(model, family), METRIC)
    assert len(plan) > 140
    assert bool(plan.known) is (family not in (*SEQ2SEQ, "bert"))
    everything = replace(plan, jobs=tuple(sorted({*plan.jobs, *plan.known})), known=())
    found, reference = (
        run(plan, model, executor="batched", progress=False).table,
        _values(everything, model, "reference"),
    )
    np.testing.assert_allclose(found.values, reference, rtol=0, atol=1e-12)
    assert np.isfinite(found.values[found.done]).all()
    assert np.nanstd(found.values[0]) > 1e-3


@pytest.mark.parametrize("operation", ["zero", "noise", "mean", "resample", "add", lambda value: value.flip(-1) * 2])
@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "mixtral"])
def test_every_operation_is_the_same_in_every_executor(family: str, operation: Any) -> None:
    model = double(family)
    sites = ["layers[:].output", "layers[:].heads[:].output[1]", "layers[1].mid[-1]"]
    needs = operation in ("mean", "resample", "add")
    reference = ns.capture(model, ["w20 w21 w22", "w23 w24 w25"], [s if "[" in s[-4:] else f"{s}[:]" for s in sites])
    plan = plan_sweep(
        model, CLEAN, CORRUPTED, sites, METRIC, operation=operation, reference=reference if needs else None, seed=3
    )
    batched, one = _values(plan, model, "batched"), _values(plan, model, "reference")
    assert np.nanmax(np.abs(batched - one)) < 1e-11
    assert np.nanmax(np.abs(batched - batched[:, :1])) > 1e-4


@pytest.mark.parametrize("window", [2, 3, 10])
def test_windows_of_layers_are_clipped_at_the_ends(window: int) -> None:
    model = double("llama")
    plan = plan_sweep(model, CLEAN, CORRUPTED, "layers[:].mlp.output", METRIC, window=window)
    assert np.nanmax(np.abs(_values(plan, model, "batched") - _values(plan, model, "reference"))) < 1e-12
    layers = {t.cell.layer: [p.steps[0].index for p in t.places] for t in plan.targets}
    expected = {i: [j for j in range(3) if i - window // 2 <= j < i + (window + 1) // 2] for i in range(3)}
    assert layers == expected
    # ... against hooks: the window around layer 1 at token 1.
    module = build("llama").double()
    clean, corrupted = (torch.tensor([[int(w[1:]) for w in side[0].split()]]) for side in (CLEAN, CORRUPTED))
    kept: dict[int, torch.Tensor] = {}
    hooks = [
        layer.mlp.register_forward_hook(lambda _m, _a, out, n=n: kept.__setitem__(n, out.clone()))
        for n, layer in enumerate(module.model.layers)
    ]
    with torch.no_grad():
        module(clean)
    for hook in hooks:
        hook.remove()

    def patch(n: int):
        def hook(_module, _args, out):
            out = out.clone()
            out[:, 1] = kept[n][:, 1]
            return out

        return hook

    for n in expected[1]:
        module.model.layers[n].mlp.register_forward_hook(patch(n))
    with torch.no_grad():
        logits = module(corrupted).logits[0, -1]
    number = next(i for i, t in enumerate(plan.targets) if (t.cell.layer, t.cell.position) == (1, 1))
    assert np.isclose(_values(plan, model, "batched")[0, number], float(logits[7] - logits[8]), atol=1e-12)


@pytest.mark.parametrize("executor", ["packed", "batched", "reference"])
def test_a_window_reaches_layers_that_were_not_named(executor: str) -> None:
    model = double("llama")
    every = plan_sweep(model, CLEAN, CORRUPTED, "layers[:].mlp.output", METRIC, window=3)
    one = plan_sweep(model, CLEAN, CORRUPTED, "layers[1].mlp.output", METRIC, window=3)
    assert [[p.steps[0].index for p in t.places] for t in one.targets] == [[0, 1, 2]] * len(one.targets)
    whole, part = _values(every, model, executor), _values(one, model, executor)
    same = [n for n, target in enumerate(every.targets) if target.cell.layer == 1]
    assert np.allclose(whole[:, same], part, rtol=0, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize(
    ("family", "path", "expected"),
    [
        ("llama", "model.model.layers[1].mlp.output", "model.model.layers[{}].mlp.output"),
        ("gpt2", "model.transformer.h[1].output", "model.transformer.h[{}].output"),
        ("llama", "blocks.1.hook_mlp_out", "layers[{}].mlp.output"),
        ("t5", "encoder.layers[1].mlp.output", "encoder.layers[{}].mlp.output"),
    ],
)
def test_a_window_counts_layers_where_the_path_does(family: str, path: str, expected: str) -> None:
    plan = plan_sweep(wrap(family), "w3 w4 w5", "w3 w6 w5", f"{path}[1]", METRIC, window=3)
    assert [str(place.place) for place in plan.targets[0].places] == [expected.format(n) for n in range(3)]


def test_a_window_over_a_layer_without_such_a_place_is_told() -> None:
    with pytest.raises(UnknownPath, match=r"(?s)layer 1 has no attention.*window=3 around layers\[0\].attn.q"):
        plan_sweep(wrap("lfm2"), "w3 w4 w5", "w3 w6 w5", "layers[0].attn.q[0]", METRIC, window=3)


def test_the_residual_sweep_against_torch_hooks_alone() -> None:
    model, module = double("gpt2"), build("gpt2").double()
    clean, corrupted = (torch.tensor([[int(w[1:]) for w in side[0].split()]]) for side in (CLEAN, CORRUPTED))
    plan = plan_sweep(model, CLEAN[0], CORRUPTED[0], "layers[:].output", METRIC)
    values = _values(plan, model, "batched")[0]
    with torch.no_grad():
        states = module(clean, output_hidden_states=True).hidden_states
    for number, target in enumerate(plan.targets):
        layer, position = target.cell.layer, target.cell.position
        assert layer is not None
        if layer == 2:
            continue  # the last hidden state that transformers returns is after the final norm

        def patch(_module, _args, out, layer=layer, position=position):
            out = out.clone()
            out[:, position] = states[layer + 1][:, position]
            return out

        hook = module.transformer.h[layer].register_forward_hook(patch)
        with torch.no_grad():
            logits = module(corrupted).logits[0, -1]
        hook.remove()
        assert np.isclose(values[number], float(logits[7] - logits[8]), atol=1e-12)


def test_patterns_and_experts_are_swept_cell_by_cell() -> None:
    model = double("mixtral", attn_implementation="eager")
    sites = ["layers[1].heads[:].pattern[-1]", "layers[1].experts[:].output"]
    result = run(plan_sweep(model, CLEAN, CORRUPTED, sites, METRIC), model, progress=False)
    assert result.run.executor == "reference"
    assert "derived from several values" in result.run.note
    assert np.nanstd(result.table.values[0]) > 1e-6


def test_pairs_of_different_length_are_aligned_at_the_end_or_by_spans() -> None:
    model = double("llama")
    clean, corrupted = "w3 w4 w5 w6 w7", "w9 w5 w6 w7"
    by_end = plan_sweep(model, clean, corrupted, "layers[1].output", METRIC, align="end")
    values = _values(by_end, model, "batched")
    assert np.nanmax(np.abs(values - _values(by_end, model, "reference"))) < 1e-12
    source = ns.capture(model, clean, "layers[1].output[:]")
    for number, target in enumerate(by_end.targets):
        saved = ns.SavedActivation.from_pairs(
            (target.cell.path, source[f"layers[1].output[{int(target.cell.position or 0) + 1}]"])
        )
        logits = ns.patched_logits(model, corrupted, saved)[0, -1]
        assert np.isclose(values[0, number], float(logits[7] - logits[8]), atol=1e-12)
    spans = {"clean": {"s": "w4 w5"}, "corrupted": {"s": "w9"}}
    with pytest.raises(ValueError, match="5 tokens, the corrupted one 4"):
        plan_sweep(model, clean, corrupted, 'layers[1].output["s"][-1]', METRIC, spans=spans)
    spanned = plan_sweep(model, clean, corrupted, 'layers[:].output["s"][-1]', METRIC, spans=spans, align="end")
    saved = ns.SavedActivation.from_pairs(("layers[1].output[0]", source["layers[1].output[2]"]))
    logits = ns.patched_logits(model, corrupted, saved)[0, -1]
    assert np.isclose(_values(spanned, model, "batched")[0, 1], float(logits[7] - logits[8]), atol=1e-12)


def test_a_reference_is_met_at_the_position_that_was_asked_for() -> None:
    model, spans = double("llama"), {"s": [(1, 3), (2, 4)]}
    others = ["w8 w9 w10 w11", "w12 w13 w14 w15 w16 w17"]
    sites = ["layers[1].output[0,-1]", 'layers[1].output["s"][-1]']
    reference = ns.capture(model, others, [*sites, 'layers[1].output["s"]'], spans=spans)
    there = {"s": (0, 2)}
    plan = plan_sweep(
        model, None, CORRUPTED[1], [*sites, 'layers[1].output["s"]'], METRIC, operation="mean", reference=reference,
        spans=there,
    )  # fmt: skip
    for value, target in zip(_values(plan, model, "batched")[0], plan.targets, strict=True):
        path = target.cell.path
        saved = reference.subset([f"{path}[0]", f"{path}[1]"] if path.endswith('"s"]') else path).mean()
        logits = ns.patched_logits(model, CORRUPTED[1], saved, spans=there)[0, -1]
        assert np.isclose(value, float(logits[7] - logits[8]), atol=1e-12), path


def test_a_reference_of_a_file_is_found_however_its_places_are_spelled(tmp_path) -> None:
    model = double("llama")
    ns.capture(model, CLEAN[1], "model.model.layers[1].output[-1]").to_file(tmp_path / "r.safetensors")
    reference = ns.SavedActivation.from_file(tmp_path / "r.safetensors")
    ask = {"operation": "mean", "reference": reference}
    plan = plan_sweep(model, None, CORRUPTED[1], "layers[1].output[-1]", METRIC, **ask)
    logits = ns.patched_logits(model, CORRUPTED[1], reference)[0, -1]
    assert np.isclose(_values(plan, model, "packed")[0, 0], float(logits[7] - logits[8]), atol=1e-12)


@pytest.mark.parametrize("executor", ["packed", "batched", "reference"])
@pytest.mark.parametrize("width", [1, 32])
def test_a_reference_of_another_width_is_refused(executor: str, width: int) -> None:
    model = double("llama")
    reference = ns.SavedActivation.from_pairs(("layers[1].output[-1]", torch.ones(1, width)))
    for operation in ("add", "mean"):
        plan = plan_sweep(
            model, None, CORRUPTED[1], "layers[1].output[-1]", METRIC, operation=operation, reference=reference
        )
        with pytest.raises(ValueError, match=f"is {width} wide, the site 16"):
            _values(plan, model, executor)


def test_each_prompt_is_added_its_own_row_of_a_reference() -> None:
    model = double("llama")
    one = ns.capture(model, "w3 w4 w5", "layers[1].output[0,1]")
    two = ns.capture(model, ["w3 w4 w5", "w8 w9 w10"], "layers[1].output[0,1]")
    for reference, own in ((one, [one, one]), (two, [two.slice[0], two.slice[1]])):
        ask = {"operation": "add", "reference": reference}
        plan = plan_sweep(model, None, [CORRUPTED[1]] * 2, "layers[1].output[2]", METRIC, **ask)
        for value, held in zip(_values(plan, model, "batched")[:, 0], own, strict=True):
            logits = ns.patched_logits(model, CORRUPTED[1], held.mean("position"), add=True, at=2)[0, -1]
            assert np.isclose(value, float(logits[7] - logits[8]), atol=1e-12)


@pytest.mark.parametrize(("clean", "corrupted"), [("w3 w4 w5 w6 w7", "w9 w5 w6"), ("w9 w5 w6", "w3 w4 w5 w6 w7")])
def test_aligned_at_the_end_a_token_is_met_by_its_partner_or_is_no_cell(clean: str, corrupted: str) -> None:
    model = double("llama")
    source, shared = ns.capture(model, clean, "layers[1].output[:]"), 3

    def partner(*tokens: int) -> float:
        """With these tokens, counted from the end, patched."""
        pairs = [(f"layers[1].output[{token}]", source.stack()[0, :, token]) for token in tokens]
        logits = ns.patched_logits(model, corrupted, ns.SavedActivation.from_pairs(*pairs))[0, -1]
        return float(logits[7] - logits[8])

    length = len(corrupted.split())
    plan = plan_sweep(model, clean, corrupted, ["layers[1].output[:]", "layers[1].output[-2]"], METRIC, align="end")
    expected = [partner(token) if -token <= shared else np.nan for token in (*range(-length, 0), -2)]
    together = plan_sweep(model, clean, corrupted, "layers[1].output", METRIC, align="end", together=True)
    for executor in ("packed", "batched", "reference"):
        np.testing.assert_allclose(_values(plan, model, executor)[0], expected, rtol=0, atol=1e-12)
        np.testing.assert_allclose(_values(together, model, executor)[0, 0], partner(-3, -2, -1), rtol=0, atol=1e-12)
    through = ns.path_patch(model, clean, corrupted, "layers[1].output", "unembed", METRIC, align="end", progress=False)
    edges = ns.attribute(
        model, clean, corrupted, "layers[2].output", METRIC, method="eap", receivers="unembed", align="end",
        progress=False,
    )  # fmt: skip
    assert np.isfinite(through.table.values).all() and np.isfinite(edges.table.values).all()
    if length > shared:
        with pytest.raises(IndexError, match="has a partner"):
            plan_sweep(model, clean, corrupted, "layers[1].output[0]", METRIC, align="end")


def test_spans_of_different_length_in_a_pair_are_refused() -> None:
    model = double("llama")

    def plan(clean: Any, corrupted: Any, site: str) -> Plan:
        spans = {"clean": clean, "corrupted": corrupted}
        return plan_sweep(model, CLEAN[0], CORRUPTED[0], site, METRIC, spans=spans)

    for clean, corrupted in (((1, 4), (1, 3)), ((1, 3), (1, 4))):
        with pytest.raises(ValueError, match=r"pair 0: the span \"s\" has [23] tokens in the clean"):
            plan({"s": clean}, {"s": corrupted}, 'layers[1].output["s"]')
    with pytest.raises(IndexError, match=r"2 tokens in the clean prompt"):
        plan({"s": (1, 3)}, {"s": (1, 4)}, 'layers[1].output["s"][2]')
    with pytest.raises(ValueError, match=r"is not given for the clean prompts"):
        plan({"t": (1, 3)}, {"s": (1, 4)}, 'layers[1].output["s"]')


def test_the_clean_run_is_read_where_each_pair_says() -> None:
    model = double("llama")
    clean, corrupted = ["w3 w4 w5 w6 w7", "w13 w14 w15 w16 w17"], ["w3 w9 w5 w6 w7", "w14 w25 w16 w17"]
    plan = plan_sweep(model, clean, corrupted, "layers[1].output[:3]", METRIC.at(2), align="end")
    logits = [ns.patched_logits(model, text, ns.capture(model, text, "embed.output[0]"))[0] for text in clean]
    expected = [float(one[at, 7] - one[at, 8]) for one, at in zip(logits, (2, 3), strict=True)]
    np.testing.assert_allclose(run(plan, model, progress=False).clean, expected, rtol=0, atol=1e-12)


def test_a_metric_may_read_another_position() -> None:
    model = double("llama")
    plan = plan_sweep(model, CLEAN[0], CORRUPTED[0], "layers[:].output[0:3]", METRIC.at(2))
    assert np.nanmax(np.abs(_values(plan, model, "batched") - _values(plan, model, "reference"))) < 1e-12
    saved = ns.capture(model, CLEAN[0], "layers[0].output[1]")
    logits = ns.patched_logits(model, CORRUPTED[0], saved)[0, 2]
    number = next(i for i, t in enumerate(plan.targets) if (t.cell.layer, t.cell.position) == (0, 1))
    assert np.isclose(_values(plan, model, "batched")[0, number], float(logits[7] - logits[8]), atol=1e-12)


def test_small_chunks_give_the_same_numbers() -> None:
    model = double("gpt2")
    plan = plan_sweep(model, CLEAN, CORRUPTED, "layers[:].output", METRIC)
    whole = _values(plan, model, "batched")
    assert np.nanmax(np.abs(_values(plan, model, "batched", max_tokens=7) - whole)) < 1e-12


def test_a_chunk_that_does_not_fit_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    from nnsplice.sweeps import choosing

    model = double("gpt2")
    plan = plan_sweep(model, CLEAN, CORRUPTED, "layers[:].output", METRIC)
    whole = _values(plan, model, "batched")
    sizes: list[int] = []
    batched = choosing.EXECUTORS["batched"]

    def narrow(work: Any, jobs: Any):
        sizes.append(len(jobs))
        if len(jobs) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return batched(work, jobs)

    monkeypatch.setitem(choosing.EXECUTORS, "batched", replace(batched, run=narrow))
    assert np.nanmax(np.abs(_values(plan, model, "batched") - whole)) < 1e-12
    assert max(sizes) > 2 >= sizes[-1]


def test_bfloat16_agrees_within_its_own_precision() -> None:
    model = wrap("llama")
    exact = _values(plan_sweep(model, CLEAN, CORRUPTED, "layers[:].output", METRIC), model, "batched")
    model._module.bfloat16()
    rough = _values(plan_sweep(model, CLEAN, CORRUPTED, "layers[:].output", METRIC), model, "batched")
    scale = np.nanmax(np.abs(exact))
    assert np.nanmax(np.abs(exact - rough)) < 0.05 * scale
    assert np.nanmax(np.abs(exact - rough)) > 0
