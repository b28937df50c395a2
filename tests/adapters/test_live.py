"""An adapter on a model leaves every address valid; with and without it, at all sites or at some."""

from __future__ import annotations

import copy
import sys
import warnings
from typing import Any

import pytest
import torch

import nnsplice as ns
import zoo
from adapters.peft_models import adapt
from nnsplice import engine
from nnsplice.adapters import disabled
from nnsplice.errors import BadArgument, MissingPackage, RefusedPlace, UnknownPath
from nnsplice.models.sources import EMBEDDED

PLACES = ["embed.output[-1]", "layers[:].output[-1]", "layers[:].mid[-1]", "layers[:].heads[:].output[-1]",
          "layers[:].attn.q.output[-1]", "layers[:].mlp.output[0]", "unembed.output[-1]"]  # fmt: skip
PROMPT = "The Velmar Tower is located in the city of"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    path = tmp_path_factory.mktemp("toy-lora")
    base = AutoModelForCausalLM.from_pretrained(EMBEDDED["toy-llama"])
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn_like(p) * 0.05)
    model.save_pretrained(str(path))
    return path


@pytest.fixture(scope="module")
def adapted(folder) -> Any:
    model: Any = ns.load("toy-llama", peft=str(folder))
    assert not any(module.training for module in model._module.modules())  # PEFT's layers come in train mode
    return model


@pytest.fixture(scope="module")
def plain() -> Any:
    return ns.load("toy-llama")


def places(model):
    return [str(path) for path in ns.expand(model, PLACES)]


def test_every_address_stays(adapted, plain):
    assert places(adapted) == places(plain)
    assert [check for check in ns.Atlas.of(adapted).verify(layers=[0, 3]) if not check.ok] == []


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks transformers for it
@pytest.mark.parametrize("name", ["plain", "dora", "conv1d", "neox", "experts", "one_expert_tensor"])
def test_a_model_that_peft_wrapped_is_what_it_is_with_the_adapter_merged(tmp_path, name):
    wrapped = adapt(name, tmp_path).model.eval()
    merged = copy.deepcopy(wrapped).merge_and_unload()
    one, other = (ns.load(model, tokenizer=zoo.tokenizer()) for model in (wrapped, merged))
    paths = ["embed.output[-1]", "layers[:].output[-1]", "layers[:].heads[:].output[-1]", "layers[:].mlp.output[0]"]
    paths += ["layers[:].experts[:].output[-1]"] if "expert" in name else []
    found = ns.capture(one, [[3, 4, 5]], paths)
    for key, value in ns.capture(other, [[3, 4, 5]], paths).items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5)
    patched = ns.patched_logits(one, [[6, 7, 8]], found.subset("layers[2].output[-1]"))
    torch.testing.assert_close(patched[0, -1], wrapped(torch.tensor([[3, 4, 5]])).logits[0, -1], rtol=1e-4, atol=1e-5)


def test_without_its_adapter_a_model_is_the_base(adapted, plain):
    paths = places(plain)
    base = ns.capture(plain, PROMPT, paths)
    both = ns.capture(adapted, PROMPT, paths)
    with disabled(adapted):
        without = ns.capture(adapted, PROMPT, paths)
    again = ns.capture(adapted, PROMPT, paths)
    for path in paths:
        assert torch.equal(without[path], base[path]) and torch.equal(again[path], both[path])
    assert not torch.equal(both["layers[5].output[-1]"], base["layers[5].output[-1]"])
    assert torch.equal(both["embed.output[-1]"], base["embed.output[-1]"])
    # What the adapter did is a capture like any other, and puts back what it did.
    difference = both - without
    assert isinstance(difference, ns.SavedActivation)
    with disabled(adapted):
        logits = ns.patched_logits(adapted, PROMPT, difference.subset("layers[5].output[-1]"), add=True)
    expected = ns.patched_logits(adapted, PROMPT, both.subset("embed.output[-1]"))
    torch.testing.assert_close(logits[0, -1], expected[0, -1], atol=1e-4, rtol=1e-4)


def test_a_sweep_with_and_without(adapted, plain):
    fact = ns.models.toy_prompts().facts[0]
    metric = ns.logit_diff(fact.answer, fact.wrong)
    run = lambda model: ns.sweep(model, fact.clean, fact.corrupted, "layers[:].output[-1]", metric, progress=False)  # noqa: E731
    expected, changed = run(plain), run(adapted)
    with disabled(adapted):
        found = run(adapted)
    assert torch.allclose(torch.tensor(found.effect().values), torch.tensor(expected.effect().values), atol=1e-5)
    assert not torch.allclose(torch.tensor(changed.effect().values), torch.tensor(expected.effect().values), atol=1e-3)


def test_some_places_alone(adapted, plain):
    """Without the factors of layer 3's MLP: up to there the adapted run, and a base MLP there."""
    paths = ["layers[:].output[-1]", "layers[3].mid[-1]", "layers[3].mlp.output[-1]"]
    both = ns.capture(adapted, PROMPT, paths)
    with disabled(adapted, "layers[3].mlp"):
        some = ns.capture(adapted, PROMPT, paths)
    assert torch.equal(some["layers[2].output[-1]"], both["layers[2].output[-1]"])
    assert torch.equal(some["layers[3].mid[-1]"], both["layers[3].mid[-1]"])
    assert not torch.equal(some["layers[3].mlp.output[-1]"], both["layers[3].mlp.output[-1]"])
    with disabled(adapted, ["layers[:].attn", "layers[:].mlp"]):
        none = ns.capture(adapted, PROMPT, paths)
    base = ns.capture(plain, PROMPT, paths)
    assert all(torch.equal(none[path], base[path]) for path in base)


def test_a_result_knows_whether_the_adapter_was_on(folder):
    """Two sweeps with and without an adapter are no shards of one, and no journal continues the other's."""
    model: Any = ns.load("toy-llama", peft=str(folder))
    on = engine.weights_digest(model)
    with disabled(model):
        off = engine.weights_digest(model)
    with disabled(model, "layers[2].mlp"):
        some = engine.weights_digest(model)
    assert engine.weights_digest(model) == on
    with torch.no_grad():
        model._module.model.layers[3].mlp.down_proj.lora_B["default"].weight[0, 0] += 1.0
    assert len({on, off, some, engine.weights_digest(model)}) == 4


def test_it_ends_also_when_the_block_raises(adapted):
    key = "layers[5].output[-1]"
    before = ns.capture(adapted, PROMPT, key)
    flags = {name: p.requires_grad for name, p in adapted._module.named_parameters()}
    with pytest.raises(ZeroDivisionError), disabled(adapted):
        raise ZeroDivisionError
    assert torch.equal(ns.capture(adapted, PROMPT, key)[key], before[key])
    assert flags == {name: p.requires_grad for name, p in adapted._module.named_parameters()}


def test_inside_one_another(adapted, plain):
    with disabled(adapted, "layers[0]"):
        with disabled(adapted):
            base = ns.capture(adapted, PROMPT, "layers[5].output[-1]")
        some = ns.capture(adapted, PROMPT, "layers[5].output[-1]")
    key = "layers[5].output[-1]"
    assert torch.equal(base[key], ns.capture(plain, PROMPT, key)[key]) and not torch.equal(some[key], base[key])


@pytest.mark.parametrize("name", ["dora", "conv1d", "embedding", "saved_head", "experts", "t5", "rslora"])
def test_peft_models_of_every_kind(tmp_path, name):
    trained = adapt(name, tmp_path)
    family = "qwen3" if name == "rslora" else {"conv1d": "gpt2", "experts": "mixtral", "t5": "t5"}.get(name, "llama")
    model, inputs = trained.model.eval(), zoo.inputs(family)
    with torch.no_grad(), disabled(model):
        off = model(**inputs).logits
    with torch.no_grad():
        assert torch.equal(off, zoo.build(family)(**inputs).logits)
        assert not torch.equal(off, model(**inputs).logits)


def test_what_is_refused(adapted, plain, tmp_path):
    with pytest.raises(BadArgument, match="no adapter"), disabled(plain):
        pass
    with pytest.raises(UnknownPath, match=r"no factors at layers\[0\]\.attn\.o"), disabled(adapted, "layers[0].attn.o"):
        pass
    biased = adapt("biases", tmp_path)
    with pytest.raises(RefusedPlace, match="biases"), disabled(biased.model):
        pass
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = adapt("plain", tmp_path / "plain")
        merged.model.merge_adapter()
    with pytest.raises(BadArgument, match="merged"), disabled(merged.model):
        pass


def test_without_peft(plain, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft.tuners.tuners_utils", None)
    with pytest.raises(MissingPackage, match=r"nnsplice\[peft\]"), disabled(plain):
        pass
