"""The digest of a model's weights: another one for any other number, the same wherever and however they are stored."""

from __future__ import annotations

import copy
from typing import Any

import accelerate
import pytest
import torch
from torch import nn

import nnsplice as ns
import zoo
from nnsplice import engine
from nnsplice.engine import digest as room
from nnsplice.errors import BadArgument
from zoo import wrap


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_number_of_a_model_counts(dtype: torch.dtype) -> None:
    model = wrap("llama")
    model._module.to(dtype)
    before = engine.weights_digest(model, anew=True)
    for name, parameter in model._module.named_parameters():
        flat = parameter.data.view(-1)
        for at in (0, 17 % len(flat), len(flat) - 1):
            held = flat[at].clone()
            flat[at] = held + 1
            assert engine.weights_digest(model, anew=True) != before, (name, at)
            flat[at] = held
    assert engine.weights_digest(model, anew=True) == before
    weight = model._module.model.layers[1].self_attn.o_proj.weight
    weight.data = weight.data.t().contiguous().t()  # the same numbers, stored otherwise
    assert engine.weights_digest(model, anew=True) == before
    weight.data = weight.data[:, [4, 5, 6, 7, 0, 1, 2, 3, *range(8, 16)]]  # two heads exchanged
    assert engine.weights_digest(model, anew=True) != before


def count(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many numbers are read from now on."""
    read: list[int] = []
    plain = room.summed
    monkeypatch.setattr(room, "summed", lambda tensor: read.append(tensor.numel()) or plain(tensor))
    return read


def test_what_is_not_written_is_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    module = zoo.build("llama", seed=11)
    read = count(monkeypatch)
    before = room.weights_digest(module)
    assert sum(read) == sum(p.numel() for p in module.parameters())
    read.clear()
    assert room.weights_digest(module) == before and not read
    weight = module.model.layers[1].self_attn.o_proj.weight
    block = ns.weights.ablate(module, "l1h2")
    ways = {
        "in place": lambda: weight.detach().__setitem__((0, 0), 3.0),
        "a step": lambda: torch.optim.SGD([weight], lr=0.1).step(),
        "ablation": block.__enter__,
        "storage": lambda: setattr(weight, "data", weight.data + 1),
        "state dict": lambda: module.load_state_dict({n: t * 2 for n, t in module.state_dict().items()}),
    }
    seen = {before}
    weight.grad = torch.ones_like(weight)
    for name, write in ways.items():
        with torch.no_grad():
            write()
        found = room.weights_digest(module)
        assert found not in seen, name
        assert found == room.weights_digest(module, anew=True), name
        seen.add(found)
    twin = copy.deepcopy(module)
    assert room.weights_digest(twin) == room.weights_digest(module)
    with torch.inference_mode():
        unseen = nn.Linear(2, 2)
    first = room.weights_digest(unseen)
    with torch.inference_mode():
        unseen.weight[0, 0] += 1
    assert room.weights_digest(unseen) != first  # torch counts no writes here, so these are read every time


def test_the_second_digest_reads_no_tensor_that_was_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.ModuleList(nn.Linear(64, 64) for _ in range(500))
    read: list[int] = []
    summed = room.summed
    monkeypatch.setattr(room, "summed", lambda tensor: read.append(tensor.data_ptr()) or summed(tensor))
    before = room.weights_digest(module)
    assert len(read) == 1000
    read.clear()
    assert room.weights_digest(module) == before and read == []
    weight = list(module.parameters())[14]
    with torch.no_grad():
        weight += 1
    assert room.weights_digest(module) != before and read == [weight.data_ptr()]


def test_a_journal_is_told_of_writes_that_torch_does_not_count(tmp_path: Any) -> None:
    model = wrap("gpt2", seed=12)
    ask = {"metric": ns.logit_diff("w7", "w8"), "progress": False}
    call = lambda: ns.sweep(  # noqa: E731
        model, "w3 w4", "w3 w5", "layers[:].mlp.output", journal=tmp_path / "journal.jsonl", **ask
    )
    call()
    model._module.transformer.h[1].mlp.c_fc.weight.data[0, 0] += 1
    with pytest.raises(BadArgument, match=r"written through \.data"):
        call()
    with pytest.raises(ns.errors.NnspliceError, match="journal"):  # seen now: this journal is of another model
        call()


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_weights_are_read_where_they_are(where: str, tmp_path: Any) -> None:
    digests = []
    for seed in (1, 2, 1):
        module = zoo.build("llama", seed=seed)
        plain = room.weights_digest(module)
        if where == "cpu":
            accelerate.cpu_offload(module, execution_device=torch.device("cpu"))
        else:
            accelerate.disk_offload(module, str(tmp_path / str(len(digests))), execution_device=torch.device("cpu"))
        assert all(p.is_meta for p in module.parameters())
        digests.append(room.weights_digest(module))
        assert digests[-1] == plain == room.weights_digest(module)  # wherever they are, they are the same numbers
    assert digests[0] == digests[2] != digests[1]
    if where == "cpu":
        weights: Any = module.model.layers[1].mlp.up_proj._hf_hook.weights_map
        with torch.no_grad():
            weights["weight"][0, 0] += 1
        assert room.weights_digest(module) != digests[2]


def test_a_model_whose_numbers_are_nowhere_has_no_identity() -> None:
    module = zoo.build("llama").to("meta")
    with pytest.raises(BadArgument, match=r"embed_tokens\.weight is on the meta device.*cannot be told"):
        room.weights_digest(module)


class Router(nn.Module):
    """A layer whose bias is a buffer, as DeepSeek's routers have it, with one that is computed."""

    bias: torch.Tensor
    computed: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 3))
        self.register_buffer("bias", torch.zeros(3))
        self.register_buffer("computed", torch.zeros(3), persistent=False)


def test_buffers_that_are_saved_count_and_computed_ones_do_not() -> None:
    layer = Router()
    module = nn.Sequential(layer)
    before = room.weights_digest(module)
    layer.computed += 1
    assert room.weights_digest(module) == before
    layer.bias += 1
    assert room.weights_digest(module) != before


def test_the_memory_of_weights_can_still_be_freed_as_fully_shard_does() -> None:
    module = nn.Linear(3, 3)
    room.weights_digest(module)
    assert all(parameter.untyped_storage().resizable() for parameter in module.parameters())
