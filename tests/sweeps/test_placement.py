"""Sweeps of models whose weights are not plain tensors in memory: quantised, or on disk until they are used."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import nn

import nnsplice as ns
from nnsplice.errors import BadArgument

SITES = ["layers[:].output[-1]", "layers[1].heads[:].output[-1]", "layers[:].mlp.output[-1]"]


def _toy() -> Any:
    return copy.deepcopy(ns.load("toy-llama")._module)


def _sweep(module: Any, executor: str) -> np.ndarray:
    model = ns.load(module, tokenizer=ns.load("toy-llama").tokenizer)
    fact = ns.models.toy_prompts().facts[0]
    metric = ns.logit_diff(fact.answer, fact.wrong)
    result = ns.sweep(model, fact.clean, fact.corrupted, SITES, metric, executor=executor, progress=False)
    return result.frame()["value"].to_numpy()


class Packed(torch.Tensor):
    """Numbers in bytes with a scale, as quantisation libraries keep them: nothing but its parts can be read."""

    @staticmethod
    def __new__(cls, numbers: torch.Tensor, scale: torch.Tensor) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=scale.dtype)

    def __init__(self, numbers: torch.Tensor, scale: torch.Tensor) -> None:
        self.numbers, self.scale = numbers, scale

    def __tensor_flatten__(self) -> Any:
        return ["numbers", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].numbers, args[0].scale)
        raise NotImplementedError(func)


class Int8Linear(nn.Linear):
    """A linear layer of packed numbers, as a quantisation library puts in place of another."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False)
        whole = layer.weight.detach()
        scale = whole.abs().amax(1, keepdim=True) / 127
        self.packed = Packed((whole / scale).round().to(torch.int8), scale)
        self.weight = nn.Parameter(self.packed, requires_grad=False)

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 torch's own name for it
        return input @ (self.packed.numbers * self.packed.scale).T


def _quantise(module: nn.Module) -> None:
    for name, layer in list(module.named_modules()):
        if isinstance(layer, nn.Linear):
            module.set_submodule(name, Int8Linear(layer).eval())


def test_a_model_of_int8_weights_is_swept_alike_by_every_executor() -> None:
    module = _toy()
    _quantise(module)
    reference = _sweep(module, "reference")
    whole = _sweep(_toy(), "reference")
    assert np.abs(reference - whole).max() > 1e-4  # it really is another model
    assert np.allclose(reference, whole, atol=0.3)
    for executor in ("batched", "auto"):
        assert np.allclose(_sweep(module, executor), reference, atol=1e-4)


@pytest.mark.filterwarnings("ignore")  # of a library that need not be here, about its own parts
@pytest.mark.parametrize("bits", [8, 4])
def test_a_model_of_torchao_is_swept_alike_by_every_executor_and_its_weights_are_refused(bits: int) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    module = _toy()
    # Its own format of 4 bits has kernels for GPUs alone; this one keeps numbers of 4 bits in bytes.
    config = (
        quantization.Int8WeightOnlyConfig() if bits == 8 else quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4)  # pyright: ignore[reportAttributeAccessIssue]
    )
    quantization.quantize_(module, config)
    reference = _sweep(module, "reference")
    whole = _sweep(_toy(), "reference")
    assert 1e-4 < np.abs(reference - whole).max() < (0.3 if bits == 8 else 10)
    for executor in ("batched", "packed", "auto"):
        assert np.allclose(_sweep(module, executor), reference, atol=1e-4)
    with (
        pytest.raises(BadArgument, match=r"layers\.1\.self_attn.*weight is quantised"),
        ns.weights.ablate(module, "l1h2"),
    ):
        pass


def test_a_model_whose_quantised_layers_hold_no_parameter_is_still_recognised() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own quantisation is on its way out, but what it made is still about
        module = torch.ao.quantization.quantize_dynamic(_toy(), {nn.Linear}, dtype=torch.qint8).eval()
    assert not dict(module.model.layers[0].self_attn.q_proj.named_parameters())
    alone = _sweep(module, "reference")
    assert np.allclose(alone, _sweep(_toy(), "reference"), atol=1.0)
    # Its rounding depends on the whole batch, so only a trace for each cell is right, and `auto` finds that out.
    assert np.abs(_sweep(module, "batched") - alone).max() > 0.01
    assert np.array_equal(_sweep(module, "auto"), alone)


def test_a_model_with_a_layer_on_disk_is_swept_as_a_whole_one(tmp_path: Path) -> None:
    from accelerate import dispatch_model

    module = _toy()
    layers = len(module.model.layers)
    places: Any = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{n}": "disk" if n == 1 else "cpu" for n in range(layers)}
    cpu: Any = "cpu"
    module = cast(Any, dispatch_model(module, places, main_device=cpu, offload_dir=str(tmp_path), force_hooks=True))
    assert next(module.model.layers[1].parameters()).is_meta
    for executor in ("reference", "auto"):
        assert np.allclose(_sweep(module, executor), _sweep(_toy(), "reference"), atol=1e-4)
