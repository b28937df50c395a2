"""How many tokens run at once."""

from __future__ import annotations

import pytest
import torch

from nnsplice.engine import memory
from nnsplice.errors import BadArgument
from zoo import wrap


def test_on_a_gpu_the_free_memory_says_how_many_tokens_run_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrap("llama")
    block = model._module.model.layers[0]
    # One token's queries, keys, values, attention, gate, up, down and norms, four times, and 64 logits: all in float32.
    linear = sum(layer.out_features for layer in block.modules() if isinstance(layer, torch.nn.Linear))
    assert linear * 4 * 4 < memory.bytes_per_token(model) < 2 * linear * 4 * 4
    needs = memory.bytes_per_token(model)
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (needs * 100, needs * 1000))
    assert memory.tokens_at_once(model) == 50
    model._module.double()
    assert memory.tokens_at_once(model) == 25
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (0, 0))
    assert memory.tokens_at_once(model) == 1


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 12 bytes."),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("MPS backend out of memory (MPS allocated: 8 GB)"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError(),
    ],
)
def test_memory_that_ran_out_is_known_whatever_says_so(error: BaseException) -> None:
    assert memory.is_out_of_memory(error)


def test_what_torch_says_here_of_memory_that_ran_out_is_known() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 46)
    assert memory.is_out_of_memory(caught.value)
    for other in (RuntimeError("shape mismatch"), ValueError("out of memory"), BadArgument("out of memory")):
        assert not memory.is_out_of_memory(other)
