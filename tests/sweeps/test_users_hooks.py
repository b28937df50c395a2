"""Torch hooks of the user's stand where they stand: a value is what a module returned, and what it was given.

That is what nnsight reads: an output before forward hooks see it, an input after pre-hooks have changed it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import nnsplice as ns
from nnsplice.errors import BadArgument
from nnsplice.sweeps import plan_sweep, run
from zoo import tokenizer, wrap

CLEAN, CORRUPTED = [*range(3, 8)], [3, 40, 20, 6, 45]
METRIC = ns.logit_diff(7, 8)
#: Address -> the module in a layer, and its end.
SITES: dict[str, tuple[str, str]] = {
    "output": ("", "output"), "input": ("", "input"), "attn.output": ("self_attn", "output"),
    "mlp.output": ("mlp", "output"), "attn.v": ("self_attn.v_proj", "output"), "attn.o": ("self_attn.o_proj", "output"),
}  # fmt: skip


def _changed(value: torch.Tensor) -> torch.Tensor:
    return value * 1.5 + 0.3 * torch.sin(value)


def _opened(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    return (change(value[0]), *value[1:]) if isinstance(value, tuple) else change(value)


#: Name -> (layer, module in it, end, whether it changes what it sees).
HOOKS: dict[str, tuple[int, str, str, bool]] = {
    "a block's output": (1, "", "output", True),
    "the last block's output": (2, "", "output", True),
    "a block's input": (1, "", "input", True),
    "the first block's input": (0, "", "input", True),
    "attention's output": (1, "self_attn", "output", True),
    "the MLP's output": (1, "mlp", "output", True),
    "the MLP's input": (1, "mlp", "input", True),
    "a projection's output": (1, "self_attn.v_proj", "output", True),
    "a projection's input": (1, "self_attn.o_proj", "input", True),
    "a block's output, which it only looks at": (1, "", "output", False),
    "a block's input, which it only looks at": (1, "", "input", False),
}


def _hook(module: Any, end: str, change: Callable[[torch.Tensor], torch.Tensor] | None, first: bool = False) -> Any:
    def after(_m: Any, _a: Any, out: Any) -> Any:
        return None if change is None else _opened(out, change)

    def before(_m: Any, args: Any) -> Any:
        return None if change is None else _opened(args, change)

    if end == "output":
        return module.register_forward_hook(after, prepend=first)
    return module.register_forward_pre_hook(before)


def _by_hooks(module: Any, path: str, end: str, layer: int, position: int, zero: bool) -> float:
    place = module.model.layers[layer].get_submodule(path)
    kept: list[torch.Tensor] = []
    with torch.no_grad():
        hook = _hook(place, end, lambda value: (kept.append(value.clone()), value)[1], first=True)
        module(torch.tensor([CLEAN]), use_cache=False)
        hook.remove()

        def write(value: torch.Tensor) -> torch.Tensor:
            value = value.clone()
            value[:, position] = 0 if zero else kept[0][:, position]
            return value

        hook = _hook(place, end, write, first=True)
        logits = module(torch.tensor([CORRUPTED]), use_cache=False).logits[0, -1]
        hook.remove()
    return float(logits[7] - logits[8])


@pytest.mark.parametrize("operation", ["patch", "zero"])
@pytest.mark.parametrize("name", HOOKS)
def test_every_executor_goes_through_a_hook_of_the_users(name: str, operation: str) -> None:
    model = wrap("llama")
    module = model._module.double()
    layer, path, end, changes = HOOKS[name]
    _hook(module.model.layers[layer].get_submodule(path), end, _changed if changes else None)
    plan = plan_sweep(model, CLEAN, CORRUPTED, [f"layers[:].{site}" for site in SITES], METRIC, operation=operation)
    packed, batched = (run(plan, model, executor=how, progress=False) for how in ("packed", "batched"))
    assert np.nanmax(np.abs(packed.table.values - batched.table.values)) < 1e-12
    for prompt, number in plan.jobs:
        cell = plan.targets[number].cell
        site = next(s for s in SITES if cell.component in (f"layers[:].{s}", f"layers[:].{s}.output"))
        assert cell.layer is not None and isinstance(cell.position, int)
        expected = _by_hooks(module, *SITES[site], cell.layer, cell.position, operation == "zero")
        assert abs(packed.table.values[prompt, number] - expected) < 1e-12, cell.path


def _mixed(value: torch.Tensor) -> torch.Tensor:
    return value + 0.5 * value.flip(1)


#: Name -> (module, end): those around the layers.
AROUND = {
    "what the layers make together": ("model", "output"), "the final norm's output": ("model.norm", "output"),
    "the final norm's input": ("model.norm", "input"), "the head's output": ("lm_head", "output"),
    "the head's input": ("lm_head", "input"), "the embeddings": ("model.embed_tokens", "output"),
}  # fmt: skip


def _opened_output(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor | tuple):
        return _opened(value, change)
    value["last_hidden_state"] = change(value["last_hidden_state"])
    return value


@pytest.mark.parametrize("change", [_changed, _mixed], ids=["changes", "mixes tokens"])
@pytest.mark.parametrize("name", AROUND)
def test_every_executor_goes_through_a_hook_around_the_layers(name: str, change: Any) -> None:
    model = wrap("llama")
    module = model._module.double()
    path, end = AROUND[name]
    place = module.get_submodule(path)
    if end == "output":
        place.register_forward_hook(lambda _m, _a, out: _opened_output(out, change))
    else:
        place.register_forward_pre_hook(lambda _m, args: _opened(args, change))
    plan = plan_sweep(model, CLEAN, CORRUPTED, "layers[:].output", METRIC)
    ran = 0
    for how in ("packed", "batched", "reference", "auto"):
        try:
            result = run(plan, model, executor=how, progress=False)
        except NotImplementedError:
            assert how == "packed"
            continue
        ran += 1
        for target, value in zip(plan.targets, result.table.values[0], strict=True):
            layer, position = target.cell.layer, target.cell.position
            assert layer is not None and isinstance(position, int)
            assert abs(value - _by_hooks(module, "", "output", layer, position, zero=False)) < 1e-12, how
    assert ran >= 3


def test_a_hook_on_the_model_itself_that_changes_its_logits_is_refused_and_one_that_looks_is_not() -> None:
    model = wrap("llama")
    module, seen = model._module, []
    module.register_forward_hook(lambda *_: seen.append(None))
    plan = plan_sweep(model, CLEAN, CORRUPTED, "layers[:].output", METRIC)
    run(plan, model, progress=False)
    assert seen

    def change(_m: Any, _a: Any, out: Any) -> Any:
        out.logits = out.logits * 2
        return out

    hook = module.register_forward_hook(change)
    saved = ns.SavedActivation.from_pairs(("layers[0].output[0]", torch.zeros(1, 16)))
    for use in (
        lambda: plan_sweep(model, CLEAN, CORRUPTED, "layers[:].output", METRIC),
        lambda: run(plan, model, progress=False),
        lambda: ns.patched_logits(model, CLEAN, saved),
        lambda: ns.attribute(model, CLEAN, CORRUPTED, "layers[:].output", METRIC, progress=False),
    ):
        with pytest.raises(BadArgument, match=r"a hook on the model itself, .* changes its logits by up to"):
            use()
    hook.remove()
    run(plan, model, progress=False)


def test_hooks_that_let_tokens_see_later_ones_leave_no_cell_known() -> None:
    model = wrap("llama")
    model._module.double()
    mlp = model._module.model.layers[1].mlp
    mlp.register_forward_hook(lambda _m, _a, out: out + out.flip(1))  # the last token reaches the first
    plan = plan_sweep(model, [CLEAN], [CORRUPTED], "layers[:].output", METRIC)
    assert not plan.known
    result = run(plan, model, progress=False)
    for target, value in zip(plan.targets, result.table.values[0], strict=True):
        layer, position = target.cell.layer, target.cell.position
        assert layer is not None and isinstance(position, int)
        assert abs(value - _by_hooks(model._module, "", "output", layer, position, zero=False)) < 1e-12


LONG, OTHER = [*range(3, 15)], [3, 4, 5, 6, 7, 30, 31, 32, 33, 34, 35, 36]
STEER = torch.linspace(-2, 3, 16, dtype=torch.float64)


def _steered_at(index: Any, least: int = 0) -> Callable[[torch.Tensor], torch.Tensor]:
    """Add to some tokens of values that have enough of them: the order of sites is learned from a short prompt."""

    def change(value: torch.Tensor) -> torch.Tensor:
        if value.shape[1] <= least:
            return value
        value = value.clone()
        value[index] += STEER
        return value

    return change


#: What hooks do that are written for one prompt at a time.
ONE_PROMPT: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "the first token": _steered_at((slice(None), 0)),
    "a token that both prompts share": _steered_at((slice(None), 4), 4),
    "a token that is swept": _steered_at((slice(None), 7), 7),
    "the last token": _steered_at((slice(None), -1)),
    "all but the first tokens": _steered_at((slice(None), slice(9, None))),
    "more tokens than the prompt has": _steered_at((slice(None), 20), 20),
    "prompts, and no token that is generated": _steered_at(slice(None), 1),
    "the first row": _steered_at(0),
    "the last row": _steered_at(-1),
}  # fmt: skip


def _in_own_runs(module: Any, clean: list[int], corrupted: list[int], targets: Any) -> list[float]:
    """Every cell of block outputs in a run of its own, with whatever hooks the module has."""
    kept: dict[int, torch.Tensor] = {}
    blocks = module.model.layers
    keep = [b.register_forward_hook(lambda _m, _a, out, n=n: kept.__setitem__(n, out.clone()), prepend=True)
            for n, b in enumerate(blocks)]  # fmt: skip
    with torch.no_grad():
        module(torch.tensor([clean]), use_cache=False)
    for hook in keep:
        hook.remove()
    found = []
    for target in targets:

        def write(_m: Any, _a: Any, out: Any, cell: Any = target.cell) -> Any:
            out = out.clone()
            out[:, cell.position] = kept[cell.layer][:, cell.position]
            return out

        hook = blocks[target.cell.layer].register_forward_hook(write, prepend=True)
        with torch.no_grad():
            logits = module(torch.tensor([corrupted]), use_cache=False).logits[0, -1]
        hook.remove()
        found.append(float(logits[7] - logits[8]))
    return found


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("name", ONE_PROMPT)
def test_hooks_written_for_one_prompt_give_what_they_give_in_a_run_of_each_cell(name: str, layer: int) -> None:
    model = wrap("llama")
    module = model._module.double()
    change = ONE_PROMPT[name]
    module.model.layers[layer].register_forward_hook(lambda _m, _a, out: change(out))
    clean, corrupted = [LONG, LONG[::-1]], [OTHER, [*LONG[:3:-1], 20, 21, 22, 23]]
    plan = plan_sweep(model, clean, corrupted, "layers[:].output", METRIC)
    expected = [_in_own_runs(module, *pair, plan.targets) for pair in zip(clean, corrupted, strict=True)]
    for how in ("auto", "auto", "batched", "packed"):
        try:
            result = run(plan, model, executor=how, progress=False)
        except NotImplementedError:
            assert how != "auto"
            continue
        assert np.abs(result.table.values - np.array(expected)).max() < 1e-12, how
        for prompt, one in enumerate((clean, corrupted)):
            with torch.no_grad():
                logits = [module(torch.tensor([ids]), use_cache=False).logits[0, -1] for ids in one]
            ends = (result.clean, result.corrupted)[prompt]
            assert np.abs(ends - np.array([float(each[7] - each[8]) for each in logits])).max() < 1e-12


def test_a_hook_whose_variables_change_between_calls_is_looked_at_anew() -> None:
    model = wrap("llama")
    at: list[int | None] = [None]
    module = model._module.double()

    def hook(_m: Any, _a: Any, out: torch.Tensor) -> torch.Tensor:
        return out if at[0] is None else _steered_at((slice(None), at[0]), at[0])(out)

    module.model.layers[1].register_forward_hook(hook)
    plan = plan_sweep(model, LONG, OTHER, "layers[:].output", METRIC)
    for at[0] in (None, 2, None, 9):
        result = run(plan, model, progress=False)
        expected = _in_own_runs(module, LONG, OTHER, plan.targets)
        assert np.abs(result.table.values[0] - expected).max() < 1e-12
        assert result.run.executor == ("packed" if at[0] is None else "batched")


class _AtFirst(torch.nn.Module):
    """An MLP of the user's, which steers the first token."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return _steered_at((slice(None), 0))(self.inner(states))


def test_a_module_of_a_class_of_the_users_is_tried_as_a_hook_is() -> None:
    module = wrap("llama")._module.double()
    module.model.layers[1].mlp = _AtFirst(module.model.layers[1].mlp).eval()
    model = ns.load(module, tokenizer())
    plan = plan_sweep(model, LONG, OTHER, "layers[:].output", METRIC)
    result = run(plan, model, progress=False)
    assert np.abs(result.table.values[0] - _in_own_runs(module, LONG, OTHER, plan.targets)).max() < 1e-12


def test_small_parts_of_a_plan_under_a_hook_are_right_too() -> None:
    model = wrap("llama")
    module = model._module.double()
    module.model.layers[1].register_forward_hook(lambda _m, _a, out: out * 1.5)
    plan = plan_sweep(model, LONG, OTHER, "layers[:].output", METRIC)
    result = run(plan, model, max_tokens=12, progress=False)
    assert result.run.executor == "packed"
    assert np.abs(result.table.values[0] - _in_own_runs(module, LONG, OTHER, plan.targets)).max() < 1e-12


def _nth_call(acts: Callable[[int], bool]) -> Callable[[torch.Tensor], torch.Tensor]:
    calls = [0]

    def change(value: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        return value + STEER if acts(calls[0]) else value

    return change


#: What hooks do that is not the same in every run.
UNSTEADY: dict[str, Callable[[], Callable[[torch.Tensor], torch.Tensor]]] = {
    "in the first call only": lambda: _nth_call(lambda call: call == 1),
    "in every other call": lambda: _nth_call(lambda call: call % 2 == 0),
    "with random numbers": lambda: lambda value: value + torch.randn_like(value),
}
SAVED = ns.SavedActivation.from_pairs(("layers[0].output[-1]", torch.zeros(1, 16, dtype=torch.float64)))
#: Questions about differences between runs.
ASKED: dict[str, Callable[[Any], Any]] = {
    "a sweep": lambda m: ns.sweep(m, CLEAN, CORRUPTED, "layers[:].output", METRIC, progress=False),
    "an ablation": lambda m: ns.ablate(m, CLEAN, "layers[:].heads[:]", METRIC, progress=False),
    "estimates": lambda m: ns.attribute(m, CLEAN, CORRUPTED, "layers[:].output", METRIC, progress=False),
    "paths": lambda m: ns.path_patch(m, CLEAN, CORRUPTED, "layers[0].heads[:]", "unembed", METRIC, progress=False),
    "a circuit": lambda m: ns.Circuit.full(m).run(m, CLEAN, CORRUPTED, METRIC),
    "a patched run": lambda m: ns.patched_logits(m, CLEAN, SAVED, progress=False),
}  # fmt: skip


@pytest.mark.parametrize("ask", ASKED)
@pytest.mark.parametrize("name", UNSTEADY)
def test_a_hook_that_does_not_do_the_same_in_every_run_is_refused(name: str, ask: str) -> None:
    model = wrap("llama")
    module = model._module.double()
    ASKED[ask](model)  # whatever is measured once is known
    change = UNSTEADY[name]()
    module.model.layers[1].mlp.register_forward_hook(lambda _m, _a, out: change(out))
    with pytest.raises(BadArgument, match="does not do the same in every run"):
        ASKED[ask](model)


def test_a_hook_that_draws_the_same_numbers_in_every_run_is_a_hook_as_any_other() -> None:
    model = wrap("llama")
    module = model._module.double()

    def noised(_m: Any, _a: Any, out: torch.Tensor) -> torch.Tensor:
        draws = torch.Generator().manual_seed(0)
        return out + torch.randn(out.shape, generator=draws, dtype=out.dtype)

    module.model.layers[1].mlp.register_forward_hook(noised)
    plan = plan_sweep(model, LONG, OTHER, "layers[:].output", METRIC)
    result = run(plan, model, progress=False)
    assert np.abs(result.table.values[0] - _in_own_runs(module, LONG, OTHER, plan.targets)).max() < 1e-12
