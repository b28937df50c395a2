"""Models in pieces: layers whose weights lie elsewhere until they run; values move to where they are written."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch

import nnsplice as ns
from zoo import build, tokenizer, wrap

PROMPT = "w3 w4 w5 w6"


@pytest.fixture
def offloaded(tmp_path: Path):
    from accelerate import dispatch_model

    module: Any = build("llama")
    cpu: Any = "cpu"
    places: Any = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{n}": "disk" if n == 1 else "cpu" for n in range(3)}
    module = cast(
        Any,
        dispatch_model(module, places, main_device=cpu, offload_dir=str(tmp_path), force_hooks=True),
    )
    assert next(module.model.layers[1].parameters()).is_meta
    return module


def test_a_model_with_a_layer_on_disk_is_captured_and_patched_as_a_whole_one(offloaded) -> None:
    model = ns.models.load(offloaded, tokenizer=tokenizer())
    whole = wrap("llama")
    paths = ["layers[:].output[-1]", "layers[1].heads[:].output[0]", "layers[1].mid[2]"]
    probe = {"input_ids": torch.tensor([[3, 4]])}
    assert ns.expand(model, paths, probe=probe)
    saved = ns.capture(model, PROMPT, paths)
    assert saved.allclose(ns.capture(whole, PROMPT, paths), atol=1e-6)
    other = ns.capture(whole, "w9 w8 w7", "layers[1].output[-1]")
    assert torch.allclose(ns.patched_logits(model, PROMPT, other), ns.patched_logits(whole, PROMPT, other), atol=1e-6)


def test_a_half_precision_model_takes_full_precision_values() -> None:
    model = wrap("llama")
    saved = ns.capture(model, "w9 w8 w7", "layers[1].output[-1]")
    model._module.bfloat16()
    logits = ns.patched_logits(model, PROMPT, saved)
    assert logits.dtype == torch.bfloat16
    assert torch.allclose(logits.float(), ns.patched_logits(wrap("llama"), PROMPT, saved), atol=0.2)
