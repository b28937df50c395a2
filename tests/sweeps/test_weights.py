"""`sweep_weights`: the same result as every other sweep, and the same numbers as copying weights by hand."""

from __future__ import annotations

import copy
import re
from typing import Any

import numpy as np
import pytest
import torch

import nnsplice as ns
import zoo
from weights.oracle import own_masks

PROMPTS = ["w3 w4 w5", "w6 w7 w8 w9", "w10 w11 w12"]
METRIC = ns.logit_diff("w13", "w14")
#: The names that the function itself sees, whoever else imports its module.
ROOM: dict[str, Any] = ns.sweep_weights.__globals__


def tuned_of(model: Any, seed: int = 5, size: float = 0.1) -> Any:
    """The same module with every parameter moved."""
    tuned = copy.deepcopy(model._module)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * size)
    return tuned


def pair(name: str) -> tuple[Any, Any]:
    model = zoo.wrap(name)
    model._module.double()
    return model, tuned_of(model)


def by_hand(model: Any, tuned: Any, place: str, prompt: str) -> float:
    """Copy the module, copy the weights where the mask says so, run it: nothing of sweeps is used."""
    module = copy.deepcopy(model._module)
    own, other = dict(module.named_parameters()), dict(tuned.named_parameters())
    head = re.fullmatch(r"layers\[(\d)\]\.heads\[(\d)\]", place)
    masks = own_masks(module, *map(int, head.groups())) if head else ns.weights.create_param_masks(module, place)
    ids = torch.tensor(model.tokenizer([prompt])["input_ids"])
    with torch.no_grad():
        for name, mask in masks.items():
            own[name].copy_(other[name] if mask is None else torch.where(mask, other[name], own[name]))
        inputs = (
            {"decoder_input_ids": ids.new_full((1, 1), module.config.decoder_start_token_id)}
            if module.config.is_encoder_decoder
            else {}
        )
        logits = module(input_ids=ids, **inputs).logits[0, -1]
    answer, wrong = (model.tokenizer.convert_tokens_to_ids(word) for word in ("w13", "w14"))
    return float(logits[answer] - logits[wrong])


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_numbers_are_those_of_copied_weights(name):
    model, tuned = pair(name)
    sites = ["layers[:].heads[1]", "layers[:].mlp", "embed"]
    if name in zoo.SEQ2SEQ:
        sites.append("encoder.layers[:].attn")
    before = {n: t.clone() for n, t in model._module.state_dict().items()}
    result = ns.sweep_weights(model, tuned, PROMPTS, sites, METRIC, progress=False)
    assert all(torch.equal(t, before[n]) for n, t in model._module.state_dict().items())
    frame = result.frame()
    for prompt, path, value in zip(frame.prompt, frame.path, frame.value, strict=True):
        assert value == pytest.approx(by_hand(model, tuned, path, PROMPTS[prompt]), abs=1e-12), path
    for prompt, text in enumerate(PROMPTS):
        assert result.clean[prompt] == pytest.approx(by_hand(model, tuned, "full", text), abs=1e-12)
    assert np.ptp(frame.value) > 1e-3


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_leaving_out_layers_changes_no_bit(name, monkeypatch):
    model, tuned = pair(name)
    fast = ns.sweep_weights(model, tuned, PROMPTS, "layers[:].mlp", METRIC, progress=False)
    monkeypatch.setattr(ROOM["Prefix"], "of", classmethod(lambda cls, model, run: cls()))
    slow = ns.sweep_weights(model, tuned, PROMPTS, "layers[:].mlp", METRIC, progress=False)
    assert fast == slow and fast.digest == slow.digest
    towers = 2 if name in zoo.SEQ2SEQ else 1
    assert slow.run.block_calls == 2 * 3 * 3 * towers  # two lengths, three cells, all layers
    # Layers 0, 1, 2 need 3, 2 and 1 of three; an encoder that is left alone needs none.
    assert fast.run.block_calls == 2 * (3 + 2 + 1)


def test_the_grid_is_layer_by_head_and_can_be_plotted(tmp_path):
    model, tuned = pair("llama")
    result = ns.sweep_weights(model, tuned, PROMPTS, "layers[:].heads[:]", METRIC, progress=False)
    assert result.grid().dims == ("prompt", "layer", "head") and result.grid().shape == (3, 3, 4)
    assert result.components == ("layers[:].heads[:]",) and result.is_complete
    axes = result.plot()
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("layer", "head")
    result.to_file(tmp_path / "r.safetensors")
    assert ns.SweepResult.from_file(tmp_path / "r.safetensors") == result
    result.to_html(tmp_path / "r.html")
    assert "layers[2].heads[3]" in (tmp_path / "r.html").read_text()


def test_one_place_without_a_number_has_a_grid_and_a_picture(tmp_path):
    model, tuned = pair("gpt2")
    result = ns.sweep_weights(model, tuned, PROMPTS, "embed", METRIC, progress=False)
    assert result.grid().dims == ("prompt",) and np.array_equal(result.grid().values, result.frame().value)
    assert np.asarray(result.plot().get_images()[0].get_array()).shape == (1, 1)
    result.to_html(tmp_path / "r.html")


def test_only_what_was_tuned_has_an_effect():
    model = zoo.wrap("gpt2")
    tuned = copy.deepcopy(model._module)
    with ns.weights.freeze_except(tuned, "l1h2") as parameters:
        optimizer = torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.1)
        for _ in range(5):
            optimizer.zero_grad()
            ids = torch.tensor([[3, 4, 5, 6]])
            tuned(ids, labels=ids).loss.backward()
            optimizer.step()
    result = ns.sweep_weights(model, tuned, PROMPTS, "layers[:].heads[:]", METRIC, progress=False)
    effect = result.effect(per_prompt=True)
    expected = np.zeros((3, 3, 4))
    expected[:, 1, 2] = 1.0
    assert np.array_equal(effect.values, expected)


def test_metrics_that_compare_are_compared_with_the_tuned_model():
    model, tuned = pair("gpt2")
    result = ns.sweep_weights(model, tuned, PROMPTS, ["layers[1]", "full"], ns.kl_divergence(), progress=False)
    everything = result.frame().set_index("path").loc["full"]
    assert np.allclose(everything.value, 0, atol=1e-12) and np.allclose(result.clean, 0, atol=1e-12)
    assert (result.corrupted > 1e-6).all()


def test_a_state_dict_is_taken_and_batches_do_not_matter():
    model, tuned = pair("llama")
    whole = ns.sweep_weights(model, tuned, PROMPTS, "layers[:].groups[:]", METRIC, progress=False)
    again = ns.sweep_weights(
        model, tuned.state_dict(), PROMPTS, "layers[:].groups[:]", METRIC, batch_size=1, progress=False
    )
    assert np.allclose(whole.grid(), again.grid(), atol=1e-12) and np.allclose(whole.clean, again.clean, atol=1e-12)
    assert whole.asked == again.asked and whole.grid().dims == ("prompt", "layer", "group")


class Stop(Exception):
    pass


@pytest.mark.parametrize("after", [1, 4, 7])
def test_a_journal_goes_on_after_a_stop(after, tmp_path, monkeypatch):
    model, tuned = pair("gpt2")
    before = {n: t.clone() for n, t in model._module.state_dict().items()}
    sites = "layers[:].mlp"
    expected = ns.sweep_weights(model, tuned, PROMPTS, sites, METRIC, progress=False)
    calls = 0
    swap = ROOM["swap"]

    def stopping(*args):
        nonlocal calls
        calls += 1
        if calls == after:
            raise Stop
        return swap(*args)

    journal = tmp_path / "journal.jsonl"
    monkeypatch.setitem(ROOM, "swap", stopping)
    with pytest.raises(Stop) if after < 7 else pytest.MonkeyPatch.context():
        ns.sweep_weights(model, tuned, PROMPTS, sites, METRIC, progress=False, journal=journal)
    assert all(torch.equal(t, before[n]) for n, t in model._module.state_dict().items())
    monkeypatch.setitem(ROOM, "swap", swap)
    result = ns.sweep_weights(model, tuned, PROMPTS, sites, METRIC, progress=False, journal=journal)
    assert result == expected and result.run.forwards == 6 - min(after - 1, 6)
    other = tuned_of(model, seed=6)
    with pytest.raises(ValueError, match="another sweep"):
        ns.sweep_weights(model, other, PROMPTS, sites, METRIC, progress=False, journal=journal)


def test_one_changed_number_anywhere_is_another_sweep():
    """The identity of a result covers all that is swapped: tuned models may differ in few numbers."""
    model, tuned = pair("gpt2")
    first = ns.sweep_weights(model, tuned, PROMPTS, "layers[:].mlp", METRIC, progress=False)
    with torch.no_grad():
        tuned.transformer.h[2].mlp.c_proj.weight[17, 3] += 1e-3
    second = ns.sweep_weights(model, tuned, PROMPTS, "layers[:].mlp", METRIC, progress=False)
    assert first.asked["to"] != second.asked["to"] and first.asked["from"] == second.asked["from"]


MISTAKES: Any = [
    ({"sites": []}, ValueError, "no sites"),
    ({"sites": "layers[9]"}, IndexError, "layer"),
    ({"sites": "layers[0].mid"}, ValueError, "activation"),
    ({"sites": "layers[0][-1]"}, ValueError, "no tokens"),
    ({"batch_size": 0}, ValueError, "batch_size=0"),
    ({"prompts": []}, ValueError, "no prompts"),
    ({"metric": ns.logit_diff("w13", "nonsense")}, ValueError, "vocabulary"),
    ({"metric": METRIC.at(-40)}, IndexError, r"reads position \[-40\]"),
    ({"metric": lambda logits: logits[:, 0] * float("nan")}, ValueError, "NaN"),
]


@pytest.mark.parametrize(("change", "error", "message"), MISTAKES)
def test_mistakes(change, error, message):
    model, tuned = pair("gpt2")
    arguments = {"sites": "layers[:]", "metric": METRIC, "prompts": PROMPTS, **change}
    with pytest.raises(error, match=message):
        ns.sweep_weights(model, tuned, **arguments, progress=False)


def test_models_are_checked():
    model, tuned = pair("gpt2")
    with pytest.raises(TypeError, match="not wrapped"):
        ns.sweep_weights(model._module, tuned, PROMPTS, "layers[:]", METRIC, progress=False)
    with pytest.raises(ValueError, match="same model"):
        ns.sweep_weights(model, model._module, PROMPTS, "layers[:]", METRIC, progress=False)
    with pytest.raises(ValueError, match="tuned model is in train mode"):
        ns.sweep_weights(model, tuned.train(), PROMPTS, "layers[:]", METRIC, progress=False)
    with pytest.raises(ValueError, match="has no transformer"):
        ns.sweep_weights(model, zoo.build("llama"), PROMPTS, "layers[:]", METRIC, progress=False)


def test_a_model_with_edits_is_refused_because_its_module_runs_without_them():
    model, tuned = pair("gpt2")
    with model.edit() as (_, edited):
        edited.transformer.h[1].output[:] = 0
    with pytest.raises(ValueError, match="has edits of nnsight"):
        ns.sweep_weights(edited, tuned, PROMPTS, "layers[1]", METRIC, progress=False)


@pytest.mark.parametrize("hooked", [False, True])
def test_only_logits_that_the_metric_reads_are_computed_and_they_are_counted(hooked):
    model, tuned = pair("llama")
    expected = [by_hand(model, tuned, f"layers[{layer}].mlp", PROMPTS[0]) for layer in range(3)]
    plain = ns.sweep_weights(model, tuned, PROMPTS[0], "layers[:].mlp", METRIC, progress=False)
    assert np.abs(plain.table.values[0] - expected).max() < 1e-12
    head = 2 * model._module.lm_head.weight.numel()
    if hooked:  # by code that may mix tokens, so all of them have to be there
        model._module.lm_head.register_forward_hook(lambda *_: None)
    result = ns.sweep_weights(model, tuned, PROMPTS[0], "layers[:].mlp", METRIC, progress=False)
    assert np.abs(result.table.values - plain.table.values).max() < 1e-12
    more = len(result.table.tokens[0]) - 1 if hooked else 0
    assert result.run.flops - plain.run.flops == 3 * head * more
    block = sum(2 * p.numel() for p in model._module.model.layers[0].parameters() if p.dim() == 2)
    assert plain.run.flops == (3 + 2 + 1) * block * len(result.table.tokens[0]) + 3 * head
