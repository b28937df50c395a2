"""Code of the user's around a model: on its wrappers, on all modules, in the place of a `forward`.

Numbers either have what it makes of the logits in them, or are refused; code that only looks disturbs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

import nnsplice as ns
from nnsplice.errors import BadArgument
from nnsplice.sweeps import plan_sweep, run
from zoo import build, tokenizer

CLEAN, CORRUPTED = [*range(3, 8)], [3, 40, 20, 6, 45]
METRIC = ns.logit_diff(7, 8)
EXECUTORS = ("packed", "batched", "reference", "auto")
registry = torch.nn.modules.module


def _doubled(_m: Any, _a: Any, out: Any) -> Any:
    if isinstance(out, torch.Tensor):
        return out * 2
    out.logits = out.logits * 2
    return out


def _lora(task: str | None = "CAUSAL_LM") -> Any:
    peft = pytest.importorskip("peft")
    wanted = peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=2, init_lora_weights=False, task_type=task)
    return peft.get_peft_model(build("llama").double(), wanted).eval()


@contextmanager
def _plainly(module: Any) -> Iterator[tuple[Any, Any]]:
    yield ns.load(module, tokenizer()), module


@contextmanager
def _on_wrapper(hook: Callable[..., Any]) -> Iterator[tuple[Any, Any]]:
    module = _lora()
    module.register_forward_hook(hook)
    with _plainly(module) as found:
        yield found


@contextmanager
def _on_tuner(hook: Callable[..., Any]) -> Iterator[tuple[Any, Any]]:
    module = _lora()
    module.base_model.register_forward_hook(hook)
    with _plainly(module) as found:
        yield found


@contextmanager
def _on_wrapped(hook: Callable[..., Any]) -> Iterator[tuple[Any, Any]]:
    module = _lora()
    module.base_model.model.register_forward_hook(hook)
    with _plainly(module) as found:
        yield found


@contextmanager
def _on_compiled(hook: Callable[..., Any]) -> Iterator[tuple[Any, Any]]:
    module: Any = torch.compile(build("llama").double(), backend="eager")
    module.register_forward_hook(hook)
    with _plainly(module) as found:
        yield found


@contextmanager
def _on_all(hook: Callable[..., Any]) -> Iterator[tuple[Any, Any]]:
    module = build("llama").double()
    handle = registry.register_module_forward_hook(
        lambda m, a, out: hook(m, a, out) if hasattr(out, "logits") else None
    )
    try:
        with _plainly(module) as found:
            yield found
    finally:
        handle.remove()


def _replace(module: Any, hook: Callable[..., Any]) -> None:
    inner = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        out = inner(*args, **kwargs)
        changed = hook(module, args, out)
        return out if changed is None else changed

    module.forward = forward


def _forward(name: str, *, late: bool) -> Callable[[Callable[..., Any]], Any]:
    @contextmanager
    def case(hook: Callable[..., Any]) -> Iterator[tuple[Any, Any]]:
        module = build("llama").double()
        model = ns.load(module, tokenizer()) if late else None
        _replace(module.get_submodule(name), hook)
        yield model or ns.load(module, tokenizer()), module

    return case


#: Where the code stands -> a model with it.
AROUND: dict[str, Callable[[Callable[..., Any]], Any]] = {
    "a PEFT wrapper": _on_wrapper,
    "the tuner inside of a PEFT wrapper": _on_tuner,
    "the model inside of a PEFT wrapper": _on_wrapped,
    "a compiled wrapper": _on_compiled,
    "all modules": _on_all,
    "the model's forward, before it is loaded": _forward("", late=False),
    "the model's forward": _forward("", late=True),
    "the head's forward, before it is loaded": _forward("lm_head", late=False),
    "the head's forward": _forward("lm_head", late=True),
    "a layer's MLP": _forward("model.layers.1.mlp", late=True),
}
REFUSED = {"a PEFT wrapper", "a compiled wrapper", "all modules", "the model's forward"}


def _layers(module: Any) -> Any:
    return next(m for name, m in module.named_modules() if name.endswith("model.layers"))


def _by_hooks(module: Any, layer: int, position: int) -> float:
    """The whole, with all that stands around it, run under plain hooks."""
    block = _layers(module)[layer]
    kept: list[torch.Tensor] = []
    with torch.no_grad():
        hook = block.register_forward_hook(lambda _m, _a, out: kept.append(out.clone()), prepend=True)
        module(input_ids=torch.tensor([CLEAN]), use_cache=False)
        hook.remove()

        def write(_m: Any, _a: Any, out: torch.Tensor) -> torch.Tensor:
            out = out.clone()
            out[:, position] = kept[0][:, position]
            return out

        hook = block.register_forward_hook(write, prepend=True)
        logits = module(input_ids=torch.tensor([CORRUPTED]), use_cache=False).logits[0, -1]
        hook.remove()
    return float(logits[7] - logits[8])


def _right_everywhere(model: Any, module: Any) -> int:
    """How many executors ran; every number is that of plain hooks."""
    plan, ran = plan_sweep(model, CLEAN, CORRUPTED, "layers[:].output", METRIC), 0
    for how in EXECUTORS:
        try:
            values = run(plan, model, executor=how, progress=False).table.values[0]
        except NotImplementedError:
            assert how == "packed"
            continue
        ran += 1
        for target, value in zip(plan.targets, values, strict=True):
            layer, position = target.cell.layer, target.cell.position
            assert layer is not None and isinstance(position, int)
            assert abs(value - _by_hooks(module, layer, position)) < 1e-6, (how, target.cell.path)
    return ran


@pytest.mark.parametrize("where", AROUND)
def test_code_that_doubles_the_logits_is_in_every_number_or_refused(where: str) -> None:
    with AROUND[where](_doubled) as (model, module):
        if where not in REFUSED:
            assert _right_everywhere(model, module) >= 3
            return
        for use in (
            lambda: ns.sweep(model, CLEAN, CORRUPTED, "layers[:].output", METRIC, progress=False),
            lambda: ns.attribute(model, CLEAN, CORRUPTED, "layers[:].output", METRIC, progress=False),
            lambda: ns.path_patch(model, CLEAN, CORRUPTED, "layers[0].heads[:]", "layers[2]", METRIC, progress=False),
            lambda: ns.patched_logits(
                model, CLEAN, ns.SavedActivation.from_pairs(("layers[0].output[0]", torch.zeros(1, 16)))
            ),
        ):
            with pytest.raises(BadArgument, match=r"changes its logits by up to"):
                use()


@pytest.mark.filterwarnings("ignore:Dynamo does not know")  # a trace of a compiled wrapper
@pytest.mark.parametrize("where", AROUND)
def test_code_that_only_looks_disturbs_nothing(where: str) -> None:
    seen: list[None] = []
    with AROUND[where](lambda *_: seen.append(None)) as (model, module):
        assert _right_everywhere(model, module) == len(EXECUTORS)
        ns.capture(model, CLEAN, "layers[1].output[-1]")
        assert seen


def test_a_global_hook_in_the_layers_stands_where_a_hook_of_a_layer_would() -> None:
    module = build("llama").double()
    kinds = (type(module.model.layers[0]), type(module.model.layers[0].mlp))

    def before(called: torch.nn.Module, args: Any) -> Any:
        return (args[0] * 1.2,) if isinstance(called, kinds[1:]) else None

    handles = [
        registry.register_module_forward_hook(lambda m, _a, out: out * 1.3 + 0.1 if isinstance(m, kinds) else None),
        registry.register_module_forward_pre_hook(before),
    ]
    # The oracle's own hooks come after global ones, so that it writes and reads what stands behind them: the same
    # answer, as what it reads of the clean run and what it writes are changed alike.
    try:
        assert _right_everywhere(ns.load(module, tokenizer()), module) >= 3
    finally:
        for handle in handles:
            handle.remove()


def test_a_head_whose_forward_mixes_tokens_is_asked_for_all_of_them() -> None:
    module = build("llama").double()
    _replace(module.lm_head, lambda _m, _a, out: out + out.flip(1))
    assert _right_everywhere(ns.load(module, tokenizer()), module) >= 2


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("lm_head", "unembed.output[-1]"), ("model.layers.1.mlp", "layers[1].mlp.output[-1]"),
        ("model.layers.1", "layers[1].output[-1]"), ("model.layers.1.mlp", "model.model.layers[1].mlp.output[-1]"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("change", [lambda out: 2 * out, None], ids=["changed", "made anew"])
def test_values_of_a_module_whose_forward_was_replaced_are_refused(name: str, path: str, change: Any) -> None:
    module = build("llama").double()
    model = ns.load(module, tokenizer())
    before = ns.capture(model, CLEAN, path)
    place = module.get_submodule(name)
    if change is None:  # nothing that nnsight put there is called any more
        place.forward = type(place).forward.__get__(place)
    else:
        _replace(place, lambda _m, _a, out: change(out))
    vector = ns.SavedActivation.from_pairs((path, before[path]))
    for use in (
        lambda: ns.capture(model, CLEAN, path),
        lambda: ns.patched_logits(model, CLEAN, vector),
        lambda: ns.steering.steer(model, vector),
        lambda: ns.sweep(model, CLEAN, CORRUPTED, path, METRIC, progress=False),
    ):
        with pytest.raises(BadArgument, match=f"the forward of {name} was replaced"):
            use()
    assert ns.capture(model, CLEAN, "layers[0].output[-1]").rows == 1


def test_a_model_whose_forward_calls_nothing_of_what_was_there_is_refused() -> None:
    module = build("llama").double()
    model = ns.load(module, tokenizer())
    module.forward = type(module).forward.__get__(module)
    with pytest.raises(BadArgument, match="or a forward in the place of its own"):
        ns.sweep(model, CLEAN, CORRUPTED, "layers[:].output", METRIC, progress=False)


def test_a_hook_that_comes_later_is_seen_though_another_was_harmless() -> None:
    module = build("llama").double()
    model = ns.load(module, tokenizer())
    handle = registry.register_module_forward_hook(lambda *_: None)
    try:
        ns.sweep(model, CLEAN, CORRUPTED, "layers[:].output", METRIC, progress=False)
    finally:
        handle.remove()
    with _all_doubled(), pytest.raises(BadArgument, match="changes its logits"):
        ns.sweep(model, CLEAN, CORRUPTED, "layers[:].output", METRIC, progress=False)
    assert np.isfinite(ns.sweep(model, CLEAN, CORRUPTED, "layers[:].output", METRIC, progress=False).table.values).all()


@contextmanager
def _all_doubled() -> Iterator[None]:
    handle = registry.register_module_forward_hook(
        lambda m, a, out: _doubled(m, a, out) if hasattr(out, "logits") else None
    )
    try:
        yield
    finally:
        handle.remove()


def _steered(model: Any) -> Any:
    vector = ns.steering.SteeringVector.of(ns.SavedActivation.from_pairs(("layers[1].output[-1]", torch.ones(1, 16))))
    return ns.steering.sweep(model, [CLEAN], vector, [1.0], METRIC, progress=False)


def _swapped(model: Any) -> Any:
    tuned = {name: p * 0.9 for name, p in ns.models.unwrap(model).named_parameters()}
    return ns.sweep_weights(model, tuned, [CLEAN], "layers[0]", METRIC, progress=False)


#: What calls the bare module inside of all wrappers.
BARE: dict[str, Callable[[Any], Any]] = {
    "circuits": lambda model: ns.Circuit.full(model).run(model, CLEAN, CORRUPTED, METRIC),
    "a sweep of steering": _steered,
    "a sweep of weights": _swapped,
}


@pytest.mark.parametrize("use", BARE)
def test_what_calls_the_bare_module_is_refused_in_a_wrapper_that_does_more(use: str) -> None:
    with (
        _on_tuner(_doubled) as (model, _),
        pytest.raises(BadArgument, match=r"changes its logits by up to .* inside of"),
    ):
        BARE[use](model)
    with _on_tuner(lambda *_: None) as (model, _):
        assert BARE[use](model) is not None
