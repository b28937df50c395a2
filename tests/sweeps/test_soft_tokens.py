"""Soft tokens before the prompt's own: positions count the own ones, or a question is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf

import nnsplice as ns
from nnsplice.errors import BadArgument, NnspliceError, RefusedPlace, ShapeError
from zoo import VOCAB, build, tokenizer

CLEAN, CORRUPTED = [*range(3, 8)], [3, 40, 20, 6, 45]
METRIC = ns.logit_diff(7, 8)
EDGE = "layers[1].heads[0].pattern[-1][2]"


def _prompt_tuned(attention: str = "eager") -> Any:
    peft = pytest.importorskip("peft")
    inner = build("llama", attn_implementation=attention).double()
    wanted = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    return peft.get_peft_model(inner, wanted).double().eval()


def _cpmant() -> Any:
    config = hf.CpmAntConfig(
        vocab_size=VOCAB, hidden_size=16, num_attention_heads=4, dim_head=4, dim_ff=32, num_hidden_layers=3,
        prompt_types=8, prompt_length=4, segment_types=8, position_bias_num_buckets=16, position_bias_max_distance=64,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = hf.CpmAntForCausalLM(config).eval().double()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def _plain() -> Any:
    return build("llama", attn_implementation="eager").double()


#: Name -> (what builds it, how many soft tokens it has).
MODELS: dict[str, tuple[Callable[[], Any], int]] = {"prompt tuning": (_prompt_tuned, 3), "cpmant": (_cpmant, 4)}


def _by_hooks(module: Any, position: int) -> tuple[torch.Tensor, float]:
    """The clean value of the second layer, and the metric with it written into the corrupted run."""
    layer = next(inner for name, inner in module.named_modules() if name.endswith(".layers"))[1]
    kept: list[torch.Tensor] = []

    def opened(out: Any) -> torch.Tensor:
        return out[0] if isinstance(out, tuple) else out

    def write(_m: Any, _a: Any, out: Any) -> Any:
        value = opened(out).clone()
        value[:, position] = kept[0][:, position]
        return (value, *out[1:]) if isinstance(out, tuple) else value

    with torch.no_grad():
        hook = layer.register_forward_hook(lambda _m, _a, out: kept.append(opened(out).clone()))
        module(input_ids=torch.tensor([CLEAN]))
        hook.remove()
        hook = layer.register_forward_hook(write)
        logits = module(input_ids=torch.tensor([CORRUPTED])).logits[0, -1]
        hook.remove()
    return kept[0][0, position], float(logits[7] - logits[8])


@pytest.mark.parametrize("name", MODELS)
def test_positions_of_captures_writes_and_sweeps_are_the_prompts_own(name: str) -> None:
    make, soft = MODELS[name]
    module = make()
    model = ns.load(module, tokenizer())
    native = str(ns.Atlas.of(model).tower().blocks[1].module).replace("layers.1", "layers[1]")
    for path in ("layers[1].output", f"model.{native}.output"):
        result = ns.sweep(model, CLEAN, CORRUPTED, f"{path}[:]", METRIC, progress=False)
        for position in range(5):
            value, expected = _by_hooks(module, soft + position)
            saved = ns.capture(model, CLEAN, f"{path}[{position}]")
            assert torch.equal(saved[f"{path}[{position}]"].flatten(), value)
            logits = ns.patched_logits(model, CORRUPTED, saved)[0, -1]
            assert abs(float(logits[7] - logits[8]) - expected) < 1e-12
            assert abs(result.table.values[0, position] - expected) < 1e-12


def _steer(model: Any) -> Any:
    vector = ns.SavedActivation.from_pairs(("layers[1].output[-1]", torch.ones(1, 16)))
    with ns.steering.steer(model, vector, where=ns.steering.span(1, 3)):
        return ns.models.unwrap(model)(input_ids=torch.tensor([CLEAN]))


def _knockout(model: Any) -> Any:
    with ns.knockout(model, EDGE):
        return ns.capture(model, CLEAN, "layers[1].output[-1]")


#: What has no positions of its own for soft tokens -> how it is refused.
REFUSED: dict[str, tuple[Callable[[Any], Any], type[Exception]]] = {
    "attribute": (
        lambda m: ns.attribute(m, CLEAN, CORRUPTED, "layers[1].output[:]", METRIC, progress=False), ShapeError,
    ),
    "eap": (
        lambda m: ns.attribute(m, CLEAN, CORRUPTED, "layers[1].heads[:]", METRIC, method="eap", progress=False),
        ShapeError,
    ),
    "path_patch": (
        lambda m: ns.path_patch(m, CLEAN, CORRUPTED, "layers[0].mlp.output[2]", "unembed", METRIC, progress=False),
        ShapeError,
    ),
    "causal_trace": (
        lambda m: ns.causal_trace(m, [CLEAN], [(1, 3)], answer=7, sites="layers[:].output", samples=1, progress=False),
        ShapeError,
    ),
    "pattern": (lambda m: ns.capture(m, CLEAN, "layers[1].heads[0].pattern[2]"), RefusedPlace),
    "knockout": (_knockout, RefusedPlace),
    "sweep of knockouts": (
        lambda m: ns.sweep(m, None, CORRUPTED, EDGE, METRIC, operation="knockout", progress=False), RefusedPlace,
    ),
    "steering by tokens": (_steer, BadArgument),
}  # fmt: skip


@pytest.mark.parametrize("use", REFUSED)
@pytest.mark.parametrize("name", MODELS)
def test_what_would_take_soft_tokens_for_own_ones_is_refused(name: str, use: str) -> None:
    ask, error = REFUSED[use]
    with pytest.raises(error) as caught:
        ask(ns.load(MODELS[name][0](), tokenizer()))
    assert isinstance(caught.value, NnspliceError) and "tokens" in str(caught.value)


@pytest.mark.parametrize("use", REFUSED)
def test_without_soft_tokens_all_of_it_runs(use: str) -> None:
    assert REFUSED[use][0](ns.load(_plain(), tokenizer())) is not None


def test_knockouts_under_another_attention_are_refused_too() -> None:
    model = ns.load(_prompt_tuned("sdpa"), tokenizer())
    with pytest.raises(RefusedPlace, match="there are soft tokens among them"):
        _knockout(model)
    plain = ns.load(build("llama", attn_implementation="sdpa").double(), tokenizer())
    assert _knockout(plain).rows == 1


def test_packed_rows_know_no_soft_tokens() -> None:
    model = ns.load(_prompt_tuned(), tokenizer())
    plan = ns.plan_sweep(model, CLEAN, CORRUPTED, "layers[1].output[:]", METRIC)
    with pytest.raises(NotImplementedError, match="its layers hold other tokens than the prompts have"):
        ns.run(plan, model, executor="packed", progress=False)
    assert np.isfinite(ns.run(plan, model, progress=False).table.values).all()
