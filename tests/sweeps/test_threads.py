"""Threads and the attention that packed rows exchange: turns, or a refusal, and the config as it was."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import nnsplice as ns
from nnsplice import engine
from nnsplice.attribution.attention import probabilities
from nnsplice.packed.attention import AttentionCall, attention
from zoo import wrap

CLEAN, CORRUPTED, METRIC = "w3 w4 w5 w6", "w3 w7 w5 w6", ns.logit_diff("w8", "w9")
IDS = torch.tensor([[3, 4, 5, 6]])


def double(seed: int = 0) -> Any:
    model = wrap("llama", seed=seed)
    model._module.double()
    return model


def sharing(model: Any, config: Any) -> Any:
    """A model whose modules read the config object of another."""
    for module in model._module.modules():
        if "config" in module.__dict__:
            module.config = config
    return model


def as_it_is(call: AttentionCall) -> torch.Tensor:
    """Exchanged attention that computes what the model's own does."""
    return call.attended(call.query, call.key, call.value, call.mask)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model._module(IDS, use_cache=False).logits


@pytest.mark.parametrize("exchanged", [lambda root: attention(root, as_it_is), probabilities])
def test_a_thread_that_meets_the_exchanged_attention_is_refused(exchanged: Any) -> None:
    model = double()
    plain, config = logits(model), model._module.config
    before = config._attn_implementation
    with exchanged(model._module), ThreadPoolExecutor(1) as pool:
        with pytest.raises(ns.errors.BadArgument, match=r"another thread sweeps this model[\s\S]*deepcopy"):
            pool.submit(logits, model).result()
        assert (logits(model) - plain).abs().max() < 1e-12
    assert config._attn_implementation == before and torch.equal(logits(model), plain)


def test_models_that_share_a_config_take_turns() -> None:
    first = double()
    config = first._module.config
    second = sharing(double(seed=1), config)
    before, entered = config._attn_implementation, threading.Event()

    def enters() -> str:
        with attention(second._module, as_it_is):
            entered.set()
            logits(second)
        return config._attn_implementation

    with ThreadPoolExecutor(1) as pool:
        with attention(first._module, as_it_is):
            waits = pool.submit(enters)
            assert not entered.wait(0.3)
            logits(first)
        assert waits.result(30) == before
    assert entered.is_set() and config._attn_implementation == before


def test_sweeps_and_captures_of_models_that_share_a_config_are_what_they_are_alone() -> None:
    first = double()
    models = [first, sharing(double(seed=1), first._module.config)]
    before = first._module.config._attn_implementation

    def asked(number: int) -> tuple[np.ndarray, torch.Tensor]:
        model = models[number % 2]
        found = ns.sweep(model, CLEAN, CORRUPTED, "layers[:].output", METRIC, executor="packed", progress=False)
        return found.table.values, ns.capture(model, CLEAN, "layers[1].output[-1]")["layers[1].output[-1]"]

    alone = [asked(0), asked(1)]
    begin = threading.Barrier(4, timeout=30)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda number: (begin.wait(), asked(number))[1], range(4)))
    for number, (values, captured) in enumerate(found):
        assert np.nanmax(np.abs(values - alone[number % 2][0])) < 1e-12
        assert torch.equal(captured, alone[number % 2][1])
    assert np.nanmax(np.abs(alone[0][0] - alone[1][0])) > 1e-4
    assert first._module.config._attn_implementation == before


class Stubborn:
    """A config that takes no other attention."""

    sub_configs: dict = {}  # noqa: RUF012  # as transformers declares it
    _attn_implementation: str

    def __init__(self) -> None:
        self.__dict__["_attn_implementation"] = "own"

    def __setattr__(self, name: str, value: str) -> None:
        if value != "own":
            raise ZeroDivisionError


def test_what_was_set_before_an_error_is_put_back() -> None:
    model = double()
    config = model._module.config
    last: Any = nn.Identity()
    before = config._attn_implementation
    last.config = Stubborn()
    model._module.last = last
    with pytest.raises(ZeroDivisionError), engine.other_attention(model._module, "another"):
        raise AssertionError("never reached")
    assert config._attn_implementation == before and last.config._attn_implementation == "own"
    with ThreadPoolExecutor(1) as pool:  # nobody holds a turn any more
        assert pool.submit(lambda: engine.locked(model).__enter__()).result(30) is None


def test_configs_inside_a_config_come_back_too() -> None:
    """Setting the outer one sets them all, so one that differed has to be put back by itself."""
    import transformers as hf

    config = hf.T5GemmaConfig() if hasattr(hf, "T5GemmaConfig") else hf.LlavaConfig()
    inner = [getattr(config, name) for name in config.sub_configs]
    for number, one in enumerate(inner):
        one._attn_implementation = ("sdpa", "eager")[number % 2]
    config._attn_implementation_internal = "eager"
    before = [one._attn_implementation for one in (config, *inner)]
    root: Any = nn.Identity()
    root.config = config
    with engine.other_attention(root, "another"):
        assert [one._attn_implementation for one in (config, *inner)] == ["another"] * len(before)
    assert [one._attn_implementation for one in (config, *inner)] == before
    assert len(set(before)) == 2
