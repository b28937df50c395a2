"""The recorded order: the model's own, for every family, kept until the structure changes; the model stays as it is."""

from __future__ import annotations

import copy
import random
from typing import Any

import nnsight
import pytest
import torch
from torch import nn

import nnsplice as ns
import unusual
from nnsplice.atlas import Site
from nnsplice.engine import order_of, record
from nnsplice.errors import NeedsProbe, NeverFired
from zoo import FAMILIES, build, inputs, wrap


@pytest.mark.parametrize("family", FAMILIES)
def test_the_order_is_the_one_in_which_nnsight_serves_values(family: str) -> None:
    model = wrap(family)
    order = order_of(model)
    before = dict(model.interleaver.counts)
    with torch.no_grad(), model.trace(**inputs(family)):
        model.output.save()
    served = [key for key, count in model.interleaver.counts.items() if count > before.get(key, 0)]
    visited = [key for key in served if key.rsplit(".", 1)[-1] in ("input", "output")]
    mine = [f"model.{module}.{end}" if module else f"model.{end}" for (module, end, visit) in order.ranks if visit == 0]
    assert mine == [key for key in visited if not key.startswith("model.generator")]


@pytest.mark.parametrize("family", FAMILIES)
def test_expanded_paths_stand_in_the_order_that_hooks_see(family: str) -> None:
    model, module = wrap(family), build(family)
    paths = ns.expand(model, ["layers[:].output", "layers[:].attn.output", "layers[:].mlp.output", "embed.output"])
    shuffled = random.Random(0).sample(paths, len(paths))
    assert ns.expand(model, shuffled) == paths
    seen: list[tuple[str, str]] = []
    hooks = []
    for name, inner in module.named_modules():
        hooks.append(inner.register_forward_pre_hook(lambda *_, n=name: seen.append((n, "input"))))
        hooks.append(inner.register_forward_hook(lambda *_, n=name: seen.append((n, "output"))))
    with torch.no_grad():
        module(**inputs(family))
    places = [seen.index((path.site.module, path.site.end)) for path in paths]
    assert places == sorted(places)


def test_recording_changes_nothing_of_the_model() -> None:
    model = wrap("gpt2", resid_pdrop=0.5)
    model._module.train()
    model._module.transformer.h[1].eval()
    modes = [module.training for module in model._module.modules()]
    torch.manual_seed(7)
    state = torch.get_rng_state()
    order_of(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model._module.modules()] == modes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model._module.modules())
    assert not nn.modules.module._global_forward_hooks
    assert all(parameter.grad is None for parameter in model._module.parameters())


def test_hooks_are_removed_when_the_probe_fails() -> None:
    model = nnsight.NNsight(nn.Linear(3, 3))
    with pytest.raises(RuntimeError, match=r"mat1|shapes"):
        ns.expand(model, "model.output[0]", probe=torch.zeros(1, 2, 5))
    assert not nn.modules.module._global_forward_hooks
    assert not nn.modules.module._global_forward_pre_hooks
    assert ns.expand(model, "model.output[0]", probe=torch.zeros(1, 2, 3))


def test_the_order_is_recorded_once_and_again_when_the_structure_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    import nnsplice.engine.recording as recording

    recorded: list[int] = []
    original = recording.record
    monkeypatch.setattr(recording, "record", lambda *args: (recorded.append(1), original(*args))[1])
    model = wrap("gpt2")
    for _ in range(3):
        ns.capture(model, "w3 w4", "layers[:].output[-1]")
    assert len(recorded) == 1
    model.transformer.h[1].extra = nn.Identity()
    ns.capture(model, "w3 w4", "layers[:].output[-1]")
    assert len(recorded) == 2
    del model._module.transformer.h[2]
    assert [str(p) for p in ns.expand(model, "layers[:].output")] == ["layers[0].output", "layers[1].output"]
    assert len(recorded) == 3


def test_the_order_can_be_recorded_from_inside_a_trace() -> None:
    model = wrap("llama")
    with torch.no_grad(), model.trace("w3 w4 w5"):
        saved = ns.save_activations(model, ["layers[2].output[-1]", "layers[0].output[-1]"])
        logits = model.output.logits.save()
    assert saved.keys() == ["layers[0].output[-1]", "layers[2].output[-1]"]
    assert torch.equal(saved["layers[2].output[-1]"], ns.capture(model, "w3 w4 w5", "l2.output[-1]")["l2.output[-1]"])
    assert logits.shape == (1, 3, 64)


def test_a_module_that_runs_for_every_layer_is_met_by_its_calls() -> None:
    model = wrap("albert")
    calls = record(model, (), inputs("albert"))
    (block,) = {path.site.module for path in ns.expand(model, "layers[:].output")}
    assert calls.count((block, "output")) == 3
    given = {**inputs("albert")}
    outputs: list[torch.Tensor] = []
    module = build("albert")
    hook = module.get_submodule(block).register_forward_hook(lambda _m, _a, out: outputs.append(_first(out).clone()))
    with torch.no_grad():
        module(**given)
    hook.remove()
    saved = ns.capture(model, given["input_ids"], "layers[:].output[1]")
    for layer, expected in enumerate(outputs):
        assert torch.equal(saved[f"layers[{layer}].output[1]"], expected[:, 1])
    # ... and written at one of them.
    patched = ns.patched_logits(model, given["input_ids"], saved.subset("layers[1].output[1]") * 0)

    def zero(_module, _args, output):
        if len(calls_seen) == 1:
            value = _first(output).clone()
            value[:, 1] = 0
            output = (value, *output[1:]) if isinstance(output, tuple) else value
        calls_seen.append(1)
        return output

    calls_seen: list[int] = []
    module.get_submodule(block).register_forward_hook(zero)
    with torch.no_grad():
        assert torch.equal(patched, module(**given).logits)


def _first(value):
    return value[0] if isinstance(value, tuple) else value


@pytest.mark.parametrize("family", ["gpt2", "llama", "mixtral", "gemma2", "t5", "bert", "opt", "falcon", "phi3"])
def test_a_model_without_weights_gets_its_order_from_a_small_twin(family: str) -> None:
    kind, config = type(build(family)), build(family).config
    with torch.device("meta"):
        empty = kind(config)
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert order_of(empty).ranks == order_of(kind(config)).ranks


def test_a_plain_module_needs_an_input_once() -> None:
    model = nnsight.NNsight(nn.Sequential(nn.Linear(3, 3), nn.ReLU()))
    with pytest.raises(NeedsProbe, match=r"Sequential[\s\S]*probe=example_input"):
        ns.expand(model, "model.output[0]")
    assert ns.expand(model, "model.output[0]", probe=torch.zeros(1, 2, 3))
    assert ns.expand(model, "model.output[1]")  # known now


def test_a_probe_may_be_arguments_or_keywords() -> None:
    class Two(nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return a + b

    x = torch.zeros(1, 2, 3)
    assert ns.expand(nnsight.NNsight(Two()), "model.output[0]", probe=(x, x))
    assert ns.expand(nnsight.NNsight(Two()), "model.output[0]", probe={"a": x, "b": x})


def test_a_call_past_the_last_one_is_named() -> None:
    order = order_of(wrap("gpt2"))
    with pytest.raises(NeverFired, match=r"runs 1 times? in one forward pass, so there is no call 2"):
        order.rank(Site("transformer.h.0", occurrence=2))


def test_a_lora_on_the_model_leaves_every_address_valid() -> None:
    from peft import LoraConfig, get_peft_model

    module = build("llama")
    plain = ns.expand(wrap("llama"), ["layers[:].output", "layers[:].heads[:].output", "layers[:].heads[:].q"])
    module = get_peft_model(module, LoraConfig(target_modules=["q_proj", "v_proj"])).base_model.model
    from nnsight.modeling.transformers import TransformersModel

    from zoo import tokenizer

    model = TransformersModel(module, tokenizer=tokenizer(), task="text-generation")
    assert [str(p) for p in ns.expand(model, [str(p) for p in plain])] == [str(p) for p in plain]
    saved = ns.capture(model, "w3 w4 w5", "layers[1].heads[2].q[-1]")
    reference = ns.capture(wrap("llama"), "w3 w4 w5", "layers[1].heads[2].q[-1]")
    assert saved.allclose(reference, atol=1e-6)  # a fresh LoRA adds nothing


# -- models of several towers, and those that do not run from tokens ---------------------------------------------------

TEXT_TOWERS = ("gemma3", "llava", "qwen2_vl", "qwen3_5", "llama4", "idefics2")


def running(name: str) -> Any:
    """The model, where transformers itself runs it from tokens: 5.24 does not run Llama 4 without an image."""
    module = unusual.build(name)
    try:
        with torch.no_grad():
            module(input_ids=torch.tensor([[3, 9]]))
    except AttributeError as error:
        pytest.skip(f"this transformers does not run it from tokens: {error}")
    return module


@pytest.mark.parametrize("name", TEXT_TOWERS)
def test_a_model_with_towers_beside_the_text_needs_no_probe(name: str) -> None:
    module = running(name)
    layers = module.get_decoder().layers if name != "llama4" else module.language_model.model.layers
    seen: list[torch.Tensor] = []
    hook = layers[2].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        logits = module(input_ids=torch.tensor([[3, 9, 4, 7]])).logits
    hook.remove()
    model = nnsight.NNsight(module)
    saved = ns.capture(model, [3, 9, 4, 7], ["layers[2].input[1]", "layers[0].output[-1]"])
    assert torch.equal(saved["layers[2].input[1]"], seen[0][:, 1])
    assert torch.equal(ns.patched_logits(model, [3, 9, 4, 7], saved), logits)


@pytest.mark.parametrize("name", TEXT_TOWERS)
def test_a_twin_of_a_model_with_several_towers_has_its_order(name: str) -> None:
    module = running(name)
    assert order_of(copy.deepcopy(module).to("meta")).ranks == order_of(module).ranks


@pytest.mark.parametrize(
    ("name", "needs"),
    [("whisper", "input_features, decoder_input_ids"), ("instructblip", "input_ids, pixel_values, qformer_input_ids")],
)
def test_a_model_that_does_not_run_from_tokens_says_what_to_give(name: str, needs: str) -> None:
    with pytest.raises(NeedsProbe, match=f"an input to run it with, once: {needs}"):
        ns.expand(nnsight.NNsight(unusual.build(name)), "layers[0].output")


def test_whisper_is_ordered_once_it_has_an_input() -> None:
    model = nnsight.NNsight(unusual.build("whisper"))
    probe = {"input_features": torch.zeros(1, 8, 32, dtype=torch.float64), "decoder_input_ids": torch.tensor([[3, 4]])}
    paths = ns.expand(model, ["layers[0].output", "encoder.layers[2].output"], probe=probe)
    assert [str(path) for path in paths] == ["encoder.layers[2].output", "layers[0].output"]
