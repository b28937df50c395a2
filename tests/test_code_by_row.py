"""Hooks and classes of the user's that tell rows of a batch apart: every prompt has the numbers of a run of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaMLP

import nnsplice as ns
from nnsplice import engine
from zoo import build, tokenizer, wrap

CLEAN = [[3, 4, 5, 6, 7], [8, 9, 10, 11, 12], [13, 14, 15, 16, 17], [3, 4, 5, 6, 7, 8, 9, 20]]
CORRUPTED = [[3, 40, 20, 6, 45], [8, 33, 10, 41, 12], [13, 14, 25, 36, 17], [3, 4, 55, 6, 37, 8, 19, 20]]
METRIC = ns.logit_diff(7, 8)
STEP = torch.linspace(-2, 3, 16, dtype=torch.float64)


def _changed(index: Any, value: Tensor) -> Tensor:
    value = value.clone()
    value[index] += STEP
    return value


#: What hooks do that are written for one prompt, or for one of a batch.
ROWS: dict[str, Callable[[Tensor], Tensor]] = {
    "the first row": lambda value: _changed(0, value),
    "the second row": lambda value: _changed(1, value) if len(value) > 1 else value,
    "the last row": lambda value: _changed(-1, value),
    "what rows have in common": lambda value: value - value.mean(0, keepdim=True) + STEP if len(value) > 1 else value,
    "the fifth token": lambda value: _changed((slice(None), 4), value) if value.shape[1] > 4 else value,
}


@pytest.fixture(params=ROWS)
def model(request: pytest.FixtureRequest) -> Any:
    made = wrap("llama")
    change = ROWS[request.param]
    made._module.double().model.layers[1].register_forward_hook(lambda _m, _a, out: change(out))
    return made


def _logits(module: Any, ids: list[int]) -> Tensor:
    with torch.no_grad():
        return module(torch.tensor([ids]), use_cache=False).logits[0, -1]


def _metric(module: Any, ids: list[int]) -> float:
    logits = _logits(module, ids)
    return float(logits[7] - logits[8])


@contextmanager
def _hooked(place: Any, change: Callable[[Any], Any]) -> Iterator[None]:
    hook = place.register_forward_hook(lambda _m, _a, out: change(out), prepend=True)
    try:
        yield
    finally:
        hook.remove()


def _left(module: Any, ids: list[int]) -> Tensor:
    """What leaves the last block, before hooks: `[token, width]`."""
    kept: list[Tensor] = []
    with _hooked(module.model.layers[2], lambda out: kept.append(out.clone())):
        _logits(module, ids)
    return kept[0][0]


def test_a_capture(model: Any) -> None:
    found = ns.capture(model, CLEAN, "layers[2].output[-1]")["layers[2].output[-1]"]
    assert torch.equal(found.reshape(4, 16), torch.stack([_left(model._module, ids)[-1] for ids in CLEAN]))


def test_a_capture_runs_as_many_prompts_at_once_as_it_is_told() -> None:
    model = wrap("llama")
    change = ROWS["the second row"]
    model._module.double().model.layers[1].register_forward_hook(lambda _m, _a, out: change(out))
    together = ns.capture(model, CLEAN[:2], "layers[2].output[-1]", batch_size=2)["layers[2].output[-1]"]
    alone = ns.capture(model, CLEAN[:2], "layers[2].output[-1]")["layers[2].output[-1]"]
    assert (together[0] - alone[0]).abs().max() < 1e-12 and (together[1] - alone[1]).abs().max() > 0.1
    kept: list[Tensor] = []
    with torch.no_grad(), _hooked(model._module.model.layers[2], lambda out: kept.append(out.clone())):
        model._module(torch.tensor(CLEAN[:2]), use_cache=False)
    assert torch.equal(together.reshape(2, 16), kept[0][:, -1])


def test_patched_logits(model: Any) -> None:
    saved = ns.SavedActivation.from_pairs(("layers[0].output[-1]", torch.zeros(4, 16, dtype=torch.float64)))
    found = ns.patched_logits(model, CLEAN, saved, add=True, progress=False)
    assert torch.equal(found[:, -1], torch.stack([_logits(model._module, ids) for ids in CLEAN]))


@pytest.mark.parametrize("method", ["atp", "atp*", "ig", "eap", "eap-ig", "relp", "ifr", "exact"])
def test_estimates(model: Any, method: str) -> None:
    sites = "layers[2].output" if method in ("atp", "atp*", "ig") else "layers[2].mlp"

    def estimated(clean: list[list[int]], corrupted: list[list[int]]) -> Any:
        return ns.attribute(model, clean, corrupted, sites, METRIC, method=method, progress=False)

    found = estimated(CLEAN, CORRUPTED)
    for prompt, pair in enumerate(zip(CLEAN, CORRUPTED, strict=True)):
        one = estimated([pair[0]], [pair[1]])
        values, alone = found.table.values[prompt], one.table.values[0]
        assert np.abs(values[~np.isnan(values)][: len(alone)] - alone[~np.isnan(alone)]).max() < 1e-12
        assert [found.clean[prompt], found.corrupted[prompt]] == pytest.approx(
            [_metric(model._module, ids) for ids in pair], abs=1e-12
        )


def test_a_sweep_of_steering(model: Any) -> None:
    ones = torch.ones(1, 16, dtype=torch.float64)
    vector = ns.SavedActivation.from_pairs(("layers[2].output[-1]", ones))
    found = ns.steering.sweep(model, CLEAN, vector, [0.5, 1.0], METRIC, progress=False)
    for prompt, ids in enumerate(CLEAN):
        for number, strength in enumerate((0.5, 1.0)):
            with _hooked(model._module.model.layers[2], lambda out, strength=strength: out + strength):
                expected = _metric(model._module, ids)
            assert found.values[prompt, 0, number] == pytest.approx(expected, abs=1e-12)


def test_the_guard_of_a_steered_generation() -> None:
    model = wrap("llama")
    module = model._module.double()
    # A hook that changes the second token of a pass, where all the generated ones would come at once.
    change = ROWS["the second row"]
    module.model.layers[1].register_forward_hook(
        lambda _m, _a, out: change(out.transpose(0, 1)).transpose(0, 1).contiguous()
    )
    vector = ns.SavedActivation.from_pairs(("layers[2].output[-1]", torch.ones(1, 16, dtype=torch.float64)))
    found = ns.steering.sweep(
        model, CLEAN, vector, [4.0], lambda text: float(len(text)), max_new_tokens=4, progress=False
    )
    for prompt, ids in enumerate(CLEAN):
        given: Any = {"attention_mask": torch.ones(1, len(ids), dtype=torch.long), "pad_token_id": 0}
        with _hooked(module.model.layers[2], lambda out: out + 4.0), torch.no_grad():
            out = module.generate(
                torch.tensor([ids]), max_new_tokens=4, do_sample=False, output_logits=True,
                return_dict_in_generate=True, **given,
            )  # fmt: skip
        new = out.sequences[0, len(ids) :]
        if 1 in new.tolist():  # the token that ends a text
            continue
        apart = 0.0
        with torch.no_grad():
            step = module(torch.tensor([ids]), use_cache=True)
            for number, steered in enumerate(out.logits):
                plain = step.logits[:, -1].float().log_softmax(-1)
                apart += float((plain.exp() * (plain - steered.log_softmax(-1))).sum())
                step = module(new[number].view(1, 1), past_key_values=step.past_key_values, use_cache=True)
        assert found.kl[prompt, 0, 0] == pytest.approx(apart / len(new), abs=1e-5)


def test_a_sweep_of_weights(model: Any) -> None:
    module, tuned = model._module, copy.deepcopy(model._module)
    with torch.no_grad():
        for number, parameter in enumerate(tuned.parameters()):
            parameter += 0.05 * torch.sin(torch.arange(parameter.numel()) + number).reshape(parameter.shape)
    found = ns.sweep_weights(model, tuned, CLEAN, "layers[:].mlp", METRIC, progress=False)
    assert found.clean == pytest.approx([_metric(tuned, ids) for ids in CLEAN], abs=1e-12)
    for layer in range(3):
        own = copy.deepcopy(module.model.layers[layer].mlp.state_dict())
        module.model.layers[layer].mlp.load_state_dict(tuned.model.layers[layer].mlp.state_dict())
        expected = [_metric(module, ids) for ids in CLEAN]
        module.model.layers[layer].mlp.load_state_dict(own)
        assert found.table.values[:, layer] == pytest.approx(expected, abs=1e-12)


def _by_hooks(module: Any, clean: list[int], corrupted: list[int]) -> list[float]:
    """The metric with each head of layer 0 patched, and its change let through to the last MLP alone."""
    blocks = module.model.layers

    def kept(ids: list[int]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        hooks = [blocks[0].self_attn.o_proj.register_forward_pre_hook(lambda _m, a: found.__setitem__("z", a[0]))]
        for n, block in enumerate(blocks):
            hooks.append(
                block.self_attn.register_forward_hook(
                    lambda _m, _a, out, n=n: found.__setitem__(f"attn {n}", out[0].clone()), prepend=True
                )
            )
            hooks.append(
                block.mlp.register_forward_hook(
                    lambda _m, _a, out, n=n: found.__setitem__(f"mlp {n}", out.clone()), prepend=True
                )
            )
        _logits(module, ids)
        for hook in hooks:
            hook.remove()
        return found

    patch, still = kept(clean), kept(corrupted)
    values = []
    for head in range(4):
        columns = slice(6 * head, 6 * head + 6)

        def write(_m: Any, args: Any, columns: slice = columns) -> Any:
            new = args[0].clone()
            new[..., columns] = patch["z"][..., columns]
            return (new,)

        hooks = [blocks[0].self_attn.o_proj.register_forward_pre_hook(write)]
        for n in (1, 2):
            hooks.append(
                blocks[n].self_attn.register_forward_hook(
                    lambda _m, _a, out, n=n: (still[f"attn {n}"], *out[1:]), prepend=True
                )
            )
        for n in (0, 1):
            hooks.append(blocks[n].mlp.register_forward_hook(lambda _m, _a, _o, n=n: still[f"mlp {n}"], prepend=True))
        made: list[Tensor] = []
        with _hooked(blocks[2].mlp, lambda out, made=made: made.append(out.clone())):
            _logits(module, corrupted)
        for hook in hooks:
            hook.remove()
        with _hooked(blocks[2].mlp, lambda _out, made=made: made[0]):
            values.append(_metric(module, corrupted))
    return values


def test_path_patching(model: Any) -> None:
    found = ns.path_patch(model, CLEAN, CORRUPTED, "layers[0].heads[:]", "layers[2].mlp", METRIC, progress=False)
    for prompt, pair in enumerate(zip(CLEAN, CORRUPTED, strict=True)):
        assert found.table.values[prompt] == pytest.approx(_by_hooks(model._module, *pair), abs=1e-12)


class _AtFirst(LlamaMLP):
    """An MLP of the user's, which steers the first token."""

    def forward(self, x: Tensor) -> Tensor:
        return _changed((slice(None), 0), super().forward(x))


def test_path_patching_of_a_model_with_a_class_of_the_users() -> None:
    module = build("llama").double()
    module.model.layers[2].mlp.__class__ = _AtFirst
    model = ns.load(module, tokenizer())
    found = ns.path_patch(model, CLEAN, CORRUPTED, "layers[0].heads[:]", "layers[2].mlp", METRIC, progress=False)
    assert "code of yours" in found.run.note
    for prompt, pair in enumerate(zip(CLEAN, CORRUPTED, strict=True)):
        assert found.table.values[prompt] == pytest.approx(_by_hooks(model._module, *pair), abs=1e-12)


def _plus_one(states: Tensor, token: int) -> Tensor:
    states = states.clone()
    states[:, token] += 1
    return states


def test_the_hooks_of_a_steering_block_know_their_rows() -> None:
    model = wrap("llama")
    module = model._module.double()
    assert not engine.has_code_by_row(module)
    vector = ns.SavedActivation.from_pairs(("layers[1].output[-1]", torch.ones(1, 16, dtype=torch.float64)))
    rows = ns.steering.mask([[True, False, False, False, False], [False, False, True, False, False]])
    with ns.steering.steer(model, vector, 1.0, where=rows):
        assert not engine.has_code_by_row(module)
        found = ns.capture(model, CLEAN[:2], "layers[2].output[-1]")["layers[2].output[-1]"]
    for row, token in enumerate((0, 2)):
        with _hooked(module.model.layers[1], lambda out, token=token: _plus_one(out, token)):
            assert (found.reshape(2, 16)[row] - _left(module, CLEAN[row])[-1]).abs().max() < 1e-12
