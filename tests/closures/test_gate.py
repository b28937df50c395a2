"""Whatever reads or writes a site is refused where it is not what it is called: once measured, at little cost."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

import nnsplice as ns
from closures import broken
from nnsplice.closures import kind_of, measure
from nnsplice.errors import RefusedPlace
from zoo import build, tokenizer, wrap

METRIC = ns.logit_diff("w7", "w8")
PROMPTS = ("w3 w4 w5", "w3 w6 w5")


def calls_of(model: Any, work: Callable[[], Any]) -> int:
    """How often the second layer's attention runs meanwhile."""
    count = []
    hook = model._module.get_submodule("model.layers.1.self_attn").register_forward_pre_hook(lambda *_: count.append(1))
    try:
        work()
    finally:
        hook.remove()
    return len(count)


def _eap(model: Any) -> Any:
    return ns.attribute(model, *PROMPTS, "layers[0].heads[:]", METRIC, method="eap", progress=False)


USES: dict[str, Callable[[Any], Any]] = {
    "capture": lambda m: ns.capture(m, "w3 w4 w5", "layers[1].attn.output[-1]"),
    "sweep": lambda m: ns.sweep(m, *PROMPTS, "layers[:].attn.output[-1]", METRIC, progress=False),
    "plan": lambda m: ns.plan_sweep(m, *PROMPTS, "layers[1].attn.output[-1]", METRIC),
    "attribute": lambda m: ns.attribute(m, *PROMPTS, "layers[:].attn.output[-1]", METRIC, progress=False),
    "eap": _eap,
    "path_patch": lambda m: ns.path_patch(m, *PROMPTS, "layers[0].heads[0]", "layers[1].mlp", METRIC, progress=False),
    "write": lambda m: ns.patched_logits(
        m, "w3 w4 w5", ns.SavedActivation.from_pairs(("layers[1].attn.output[-1]", torch.ones(1, 16)))
    ),
}


@pytest.mark.parametrize("use", USES)
def test_every_use_of_a_broken_branch_is_refused(use: str) -> None:
    with pytest.raises(RefusedPlace, match=r"\.attn\.output would not be what its name says in layer 1 of this model"):
        USES[use](broken.llama(broken.scaled_attention))
    USES[use](broken.llama())


def test_steering_is_refused_too() -> None:
    vector = ns.SavedActivation.from_pairs(("layers[1].attn.output[-1]", torch.ones(1, 16)))
    with (
        pytest.raises(RefusedPlace, match="would not be what its name says"),
        ns.steering.steer(broken.llama(broken.scaled_attention), vector),
    ):
        pass


def test_the_message_says_what_was_measured_where_and_what_is_left() -> None:
    with pytest.raises(RefusedPlace) as caught:
        ns.capture(broken.llama(broken.scaled_attention), "w3 w4", "layers[:].attn.output[-1]")
    text = str(caught.value)
    assert "input + attn.output + mlp.output is not the output (by " in text and "where rounding makes 1e-10" in text
    assert "layers[1].attn.output" in text and ".heads[:].output, .heads[:].q" in text and "native path" in text


def test_layers_and_kinds_that_hold_stay_usable_and_native_paths_promise_nothing() -> None:
    model = broken.llama(broken.scaled_attention)
    paths = ["layers[0].attn.output[-1]", "layers[1].heads[0].output[-1]", "model.model.layers[1].self_attn.output[-1]"]
    assert len(ns.capture(model, "w3 w4", paths)) == 3


def test_a_pattern_that_can_be_read_may_not_be_writable() -> None:
    model = broken.llama(broken.gated_heads)
    saved = ns.capture(model, "w3 w4 w5", "layers[1].heads[0].pattern[:]")
    with pytest.raises(RefusedPlace, match=r"pattern @ v is not the head's slice \(by "):
        ns.patched_logits(model, "w3 w4 w5", saved)


def test_a_pattern_of_a_layer_that_returns_none_is_not_written() -> None:
    model = broken.llama(lambda layer: broken._around(layer.self_attn, lambda out, *_: (out[0], None)))
    saved = ns.SavedActivation.from_pairs(("layers[1].heads[0].pattern[-1]", torch.eye(3)[None, -1]))
    with pytest.raises(RefusedPlace, match="nothing could be measured of its attention"):
        ns.patched_logits(model, "w3 w4 w5", saved)


def test_patterns_are_measured_when_the_attention_begins_to_make_them() -> None:
    model = broken.llama(broken.gated_heads)
    model._module.set_attn_implementation("sdpa")
    assert not {closure.kind for closure in measure(model)} & {"pattern", "written pattern"}
    model._module.set_attn_implementation("eager")
    assert {closure.kind for closure in measure(model) if not closure.holds} == {"written pattern"}
    pattern = "layers[1].heads[0].pattern[-1]"
    with pytest.raises(RefusedPlace, match="pattern @ v is not the head's slice"):
        ns.plan_sweep(model, *PROMPTS, pattern, METRIC)


def test_a_head_that_reads_more_than_the_last_layer_leaves_no_stream() -> None:
    model = broken.before_the_head(lambda last, first: last + 0.1 * first)
    for path in ("layers[:].output[-1]", "layers[0].input[0]"):
        with pytest.raises(RefusedPlace, match="what is read behind the last layer is more than that layer's output"):
            ns.capture(model, "w3 w4", path)
    assert len(ns.capture(model, "w3 w4", ["layers[0].heads[0].output[-1]", "model.model.layers[0].output[-1]"])) == 2


def test_a_change_of_the_last_layers_output_alone_leaves_the_stream() -> None:
    model = broken.before_the_head(lambda last, _: 2 * last)
    ns.expand(model, "layers[0].output")  # learns the order
    passes = [calls_of(model, lambda: ns.capture(model, "w3 w4", "layers[:].output[-1]")) for _ in range(2)]
    assert passes[0] - passes[1] == 2  # one for all kinds, and one to see that the head reads nothing else


def test_a_head_that_reads_an_earlier_layer_beside_the_final_norm_leaves_no_stream() -> None:
    model = broken.beside_the_head(lambda normed, first: normed + 0.01 * first)
    for path in ("layers[:].output[-1]", "layers[0].input[0]", "embed.output[-1]"):
        with pytest.raises(RefusedPlace, match="what is read behind the last layer is more than that layer's output"):
            ns.capture(model, "w3 w4", path)
    for use in (
        lambda: ns.sweep(model, *PROMPTS, "layers[:].output[-1]", METRIC, progress=False),
        lambda: ns.path_patch(model, *PROMPTS, "layers[0].heads[0]", "layers[1].output", METRIC, progress=False),
    ):
        with pytest.raises(RefusedPlace, match="what is read behind the last layer"):
            use()
    sound = broken.beside_the_head(lambda normed, _: 2 * normed)
    assert len(ns.capture(sound, "w3 w4", "layers[:].output[-1]")) == 3


# --- costs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "passes"),
    [
        ("layers[0].output[-1]", 2),
        ("layers[0].heads[0].q[-1]", 1),
        ("layers[:].mid[-1]", 2),
        ("layers[0].attn[0]", 1),
    ],
)
def test_the_first_use_of_a_kind_costs_a_pass_or_two_and_the_second_nothing(path: str, passes: int) -> None:
    model = broken.llama()
    ns.expand(model, path)  # learns the order
    first = calls_of(model, lambda: ns.capture(model, "w3 w4 w5", path))
    again = calls_of(model, lambda: ns.capture(model, "w6 w4 w5", path))
    assert first - again == passes


def test_everything_costs_less_than_five_passes() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = wrap("mixtral")
    ns.expand(model, "layers[0].output")
    ids = torch.tensor([[3, 10, 17, 24]])
    with FlopCounterMode(display=False) as one, torch.no_grad():
        model._module(ids)
    with FlopCounterMode(display=False) as all_of_it:
        measure(model)
    assert all_of_it.get_total_flops() < 5 * one.get_total_flops()


def test_changed_weights_are_measured_again() -> None:
    model = broken.llama()
    ns.capture(model, "w3 w4 w5", "layers[0].output[-1]")
    with torch.no_grad():
        model._module.model.layers[0].mlp.up_proj.weight.mul_(2)
    assert calls_of(model, lambda: ns.capture(model, "w3 w4 w5", "layers[0].output[-1]")) > calls_of(
        model, lambda: ns.capture(model, "w3 w4 w5", "layers[0].output[-1]")
    )


def test_a_head_that_was_zeroed_is_no_fault() -> None:
    model = broken.llama()
    with ns.weights.ablate(model, "l1h0"):
        assert all(closure.holds for closure in measure(model))


def test_experts_are_measured_aside_from_a_running_trace() -> None:
    model = wrap("mixtral")
    with torch.no_grad(), model.trace("w3 w4 w5"):
        found = ns.save_activations(model, "layers[0].experts[:].output[-1]")
    expected = ns.capture(model, "w3 w4 w5", "layers[0].experts[:].output[-1]")
    assert all(torch.equal(found[key], expected[key]) for key in expected)


# --- nothing is disturbed ---------------------------------------------------------------------------------------------


def test_a_running_trace_goes_on_as_if_nothing_had_been_measured() -> None:
    paths = ["layers[0].mid[-1]", "layers[1].heads[1].output[-1]", "layers[1].output[-1]"]
    expected = ns.capture(broken.llama(), "w3 w4 w5", paths)
    model = broken.llama()
    with torch.no_grad(), model.trace("w3 w4 w5"):
        found = ns.save_activations(model, paths)
        logits = model.output.logits.save()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert torch.equal(logits, model._module(**model.tokenizer("w3 w4 w5", return_tensors="pt")).logits)
    wrong = broken.llama(broken.scaled_attention)
    with pytest.raises(RefusedPlace, match="would not be what its name says"), wrong.trace("w3 w4 w5"):
        ns.save_activations(wrong, "layers[1].attn.output[-1]")


def test_modes_random_numbers_and_flags_are_as_before() -> None:
    model = broken.llama()
    model._module.train()
    state, flags = torch.random.get_rng_state(), [p.requires_grad for p in model._module.parameters()]
    with torch.no_grad():
        measure(model)
        assert not torch.is_grad_enabled()
    assert torch.equal(state, torch.random.get_rng_state())
    assert model._module.training and [p.requires_grad for p in model._module.parameters()] == flags
    assert all(p.grad is None for p in model._module.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model._module.modules())


@pytest.mark.parametrize("around", [torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_it_holds_inside_of_blocks_of_torch(around: Callable[[], Any]) -> None:
    model = broken.llama(dtype=torch.float32)
    with around():
        assert all(closure.holds for closure in measure(model))


def test_hooks_of_others_are_no_part_of_the_question() -> None:
    model = broken.llama()
    layer = model._module.model.layers[0]
    layer.register_forward_hook(lambda _, a, out: (out[0] * 1.5, *out[1:]) if isinstance(out, tuple) else out * 1.5)
    layer.self_attn.register_forward_hook(lambda _, a, out: (out[0] * 2, *out[1:]))
    found = {closure.kind for closure in measure(model) if not closure.holds}
    assert found == set()


def test_weights_that_are_not_here_are_measured_on_a_small_twin() -> None:
    import transformers as hf

    with torch.device("meta"):
        module = hf.LlamaForCausalLM(build("llama").config)
    assert all(closure.holds for closure in measure(module))


def test_threads_measure_one_after_the_other() -> None:
    models, found = [broken.llama(), broken.llama(broken.scaled_attention)] * 3, {}

    def work(number: int) -> None:
        found[number] = all(closure.holds for closure in measure(models[number]))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(models))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {0: True, 1: False, 2: True, 3: False, 4: True, 5: False}


def test_a_plain_module_is_measured_with_the_probe_it_was_given() -> None:
    import nnsight

    model = nnsight.NNsight(broken.llama()._module.model)
    probe = {"input_ids": torch.tensor([[5, 6, 7]])}
    ns.expand(model, "layers[0].mid", probe=probe)
    assert all(closure.holds for closure in measure(model))


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("layers[0].input", "stream"), ("embed", "stream"), ("layers[0].mid", "mid"), ("layers[1].attn", "attn"),
        ("layers[1].mlp.output", "mlp"), ("layers[1].heads[0]", "heads"), ("layers[1].heads[0].q", "q"),
        ("layers[1].attn.v", "v"), ("layers[1].heads[0].pattern", "pattern"), ("layers[1].neurons[3]", "neurons"),
        ("layers[1].mlp.up", None), ("layers[1].attn.o", None), ("final_norm", None), ("unembed", None),
        ("model.transformer.h[1].attn.output", None), ("blocks.1.attn.hook_z", "heads"),
    ],
)  # fmt: skip
def test_paths_are_of_a_kind_or_promise_nothing(path: str, kind: str | None) -> None:
    assert {kind_of(place) for place in ns.expand(wrap("gpt2"), path)} == {kind}


# --- wrapped models ---------------------------------------------------------------------------------------------------


def _with_adapter() -> Any:
    peft = pytest.importorskip("peft")
    model = build("llama").to(torch.float64)
    wanted = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "o_proj", "down_proj"])
    adapted = peft.get_peft_model(model, wanted).to(torch.float64).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.set_attn_implementation("eager")
    return ns.load(adapted, tokenizer())


def _compiled() -> Any:
    model = build("llama").to(torch.float64)
    model.set_attn_implementation("eager")
    model.compile(backend="eager")
    return ns.load(model, tokenizer())


@pytest.mark.parametrize("wrapped", [_with_adapter, _compiled])
def test_a_model_with_an_adapter_and_a_compiled_one_keep_every_promise(wrapped: Callable[[], Any]) -> None:
    plain = {(c.kind, c.layer) for c in measure(broken.llama())}
    found = measure(wrapped())
    assert {(c.kind, c.layer) for c in found} == plain
    assert [c for c in found if not c.holds] == []


# --- what it costs is told --------------------------------------------------------------------------------------------


def _swept(model: Any, sites: Any, **options: Any) -> ns.SweepResult:
    return ns.sweep(model, *PROMPTS, sites, METRIC, progress=False, **options)


def test_a_result_tells_what_measuring_took_and_only_once() -> None:
    model = broken.llama()
    first, second = (_swept(model, "layers[:].output[-1]") for _ in range(2))
    assert (first.run.gate, second.run.gate) == (2.0, 0.0)
    assert "what sites promise was measured first: 2 forward passes of a 4-token prompt" in repr(first)
    assert "measured first" not in repr(second) and first == second
    assert _swept(model, "layers[:].mid[-1]").run.gate == 1.0
    with torch.no_grad():
        model._module.model.layers[0].mlp.up_proj.weight.mul_(2)
    assert _swept(model, "layers[:].output[-1]").run.gate == 2.0
    native = _swept(broken.llama(), "model.model.layers[1].mlp.output[-1]")
    assert native.run.gate == 0.0


@pytest.mark.parametrize("method", ["atp", "eap", "exact"])
def test_estimates_and_paths_tell_it_too(method: str) -> None:
    model = broken.llama()
    result = ns.attribute(model, *PROMPTS, "layers[0].heads[:]", METRIC, method=method, progress=False)
    assert result.run.gate >= 1.0
    again = ns.path_patch(model, *PROMPTS, "layers[0].heads[0]", "layers[1].mlp", METRIC, progress=False)
    assert again.run.gate == 0.0
    assert (
        ns.path_patch(broken.llama(), *PROMPTS, "layers[0].heads[0]", "unembed", METRIC, progress=False).run.gate >= 1
    )


def test_what_is_told_of_experts_is_what_they_cost() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    from nnsplice.closures import passes_spent

    model = wrap("mixtral")
    ns.expand(model, "layers[0].output")
    with FlopCounterMode(display=False) as one, torch.no_grad():
        model._module(torch.tensor([[3, 10, 17, 24]]))
    measure(model, ["heads"])
    assert passes_spent(model) == 1.0
    with FlopCounterMode(display=False) as counted:
        measure(model, ["experts"])
    told, counted_passes = passes_spent(model), counted.get_total_flops() / one.get_total_flops()
    assert abs(told - counted_passes) < 0.15 * counted_passes and 0 < told < 3
    measure(model)
    assert 1.9 < passes_spent(model) < 2.1 and passes_spent(model) == 0.0


def test_it_is_kept_in_files_and_summed_where_results_are_merged(tmp_path: Any) -> None:
    model = broken.llama()
    plan = ns.plan_sweep(model, *PROMPTS, "layers[:].output[:]", METRIC)
    halves = [ns.run(plan.shard(n, 2), model, progress=False) for n in range(2)]
    whole = ns.SweepResult.merge(halves)
    assert [half.run.gate for half in halves] == [2.0, 0.0] and whole.run.gate == 2.0
    whole.to_file(tmp_path / "swept.json")
    assert ns.SweepResult.from_file(tmp_path / "swept.json").run.gate == 2.0


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_named(number: float) -> None:
    model = wrap("llama")
    with torch.no_grad():
        model._module.model.layers[1].self_attn.o_proj.weight[:, :6] = number
    with pytest.raises(RefusedPlace, match=r"model\.layers\.1\.self_attn\.o_proj\.weight holds NaN or infinity"):
        ns.capture(model, "w3 w4 w5", "layers[1].heads[0].output[-1]")
    with torch.no_grad():
        model._module.model.layers[1].self_attn.o_proj.weight[:, :6] = 0.5
    ns.capture(model, "w3 w4 w5", "layers[1].heads[0].output[-1]")
