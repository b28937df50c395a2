"""The simulated machine itself: what it counts is known beforehand here, and it refuses what a GPU refuses."""

from __future__ import annotations

import gc
import threading

import pytest
import torch
from transformers.utils.import_utils import is_torch_cuda_available

import zoo
from machine.simulated import Machine

IDS = torch.tensor([[3, 4, 5, 6, 7]])


def test_a_launch_is_counted_for_each_operation_and_none_for_views(machine):
    simulated = machine(1)
    values = torch.arange(6.0, device="cuda")
    with simulated.measured() as spent:
        turned = values.view(2, 3).transpose(0, 1)[1:]
    assert spent.launches == 0
    with simulated.measured() as spent:
        made = (turned + 1).relu() @ torch.ones(2, 2, device="cuda")
    assert made.device == torch.device("cuda", 0) and made.is_cuda
    assert spent.launches == sum(spent.operations.values()) == 4 and spent.waits == 0


def test_what_stays_on_the_cpu_counts_nothing(machine):
    with machine(1).measured() as spent:
        (torch.ones(3) + 1).sum().item()
    assert (spent.launches, spent.waits, dict(spent.copies), spent.extra()) == (0, 0, {}, 0)


@pytest.mark.parametrize(
    ("ask", "waits", "copies"),
    [
        (lambda x: x.sum().item(), 1, {"d2h": 1}),
        (lambda x: bool((x > 0).all()), 1, {"d2h": 1}),
        (lambda x: x.tolist(), 1, {"d2h": 1}),
        (lambda x: x.cpu(), 1, {"d2h": 1}),
        (lambda x: x.to("cpu", non_blocking=True), 0, {"d2h": 1}),
        (lambda x: x.to("cuda:1"), 0, {"d2d": 1}),
        (lambda x: x.nonzero(), 1, {}),
        (lambda x: x[x > 2], 1, {}),
        (lambda x: x[[0, 1]], 1, {"h2d": 1}),
        (lambda x: x[torch.tensor([0, 1])], 1, {"h2d": 1}),
        (lambda x: x[torch.tensor([0, 1], device="cuda:0")], 1, {"h2d": 1}),
        (lambda x: x[torch.tensor([0, 1]).to("cuda:0", non_blocking=True)], 0, {"h2d": 1}),
        (lambda x: x.masked_fill(x > 2, 0), 0, {}),
        (lambda x: x + torch.tensor(2.0), 0, {}),
        (lambda x: x[1:], 0, {}),
        (lambda x: torch.cuda.synchronize(), 1, {}),
    ],
)
def test_waits_and_copies(machine, ask, waits, copies):
    simulated = machine(2)
    values = torch.arange(5.0, device="cuda:0")
    with simulated.measured() as spent:
        ask(values)
    assert (spent.waits, dict(spent.copies)) == (waits, copies)


@pytest.mark.parametrize(
    "mix",
    [
        lambda a, b: a + b,
        lambda a, b: torch.cat([a, b]),
        lambda a, b: a @ b,
        lambda a, b: a.where(b > 0, a),
        lambda a, b: a.index_select(0, b.long().flatten()[:1]),
        lambda a, b: torch.nn.functional.linear(a, b),
    ],
)
def test_tensors_of_several_devices_are_refused(machine, mix):
    machine(2)
    places = ["cpu", "cuda:0", "cuda:1"]
    tensors = [torch.ones(2, 2, device=place) for place in places]
    assert mix(tensors[1], torch.ones(2, 2, device="cuda:0")).device.index == 0
    for a, b in [(1, 2), (2, 1), (1, 0), (0, 1)]:
        with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
            mix(tensors[a], tensors[b])


def test_a_device_that_is_not_there_is_refused(machine):
    machine(1)
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        torch.ones(1, device="cuda:1")
    with pytest.raises(TypeError, match="can't convert cuda:0"):
        torch.ones(1, device="cuda").numpy()


def test_bytes_are_counted_while_tensors_live(machine):
    simulated = machine(2)
    with simulated.measured() as spent:
        kept = torch.zeros(1000, dtype=torch.float64, device="cuda:1")
        gone = kept + 1  # alive beside the first
        del gone
        view = kept[:10]
    gc.collect()
    assert spent.extra("cuda:1") == 16_000 and spent.extra("cuda:0") == 0
    assert simulated.live[torch.device("cuda", 1)] == 8_000
    del kept
    assert simulated.live[torch.device("cuda", 1)] == 8_000 and len(view) == 10  # a view keeps what it looks at
    del view
    assert simulated.live[torch.device("cuda", 1)] == 0


def test_memory_runs_out_and_is_there_again(machine):
    machine(1, capacity=1000)
    first = torch.zeros(200, device="cuda")
    assert torch.cuda.mem_get_info() == (200, 1000)
    with pytest.raises(torch.OutOfMemoryError):
        first.add(1)
    del first
    assert torch.cuda.mem_get_info() == (1000, 1000)
    assert torch.zeros(200, device="cuda").sum().item() == 0


def test_gradients_go_back_through_moves(machine):
    simulated = machine(2)
    weight = torch.tensor([1.0, 2.0], device="cuda:1", requires_grad=True)
    with simulated.measured() as spent:
        (weight.to("cuda:0").pow(2).sum().cpu() * 3).backward()
    assert weight.grad is not None and weight.grad.device.index == 1
    assert weight.grad.tolist() == [6.0, 12.0] and spent.copies["d2d"] == 2 and spent.launches > 0


def test_other_threads_are_watched_too(machine):
    simulated, found = machine(1), []
    with simulated.measured() as spent:
        thread = threading.Thread(target=lambda: found.append(torch.ones(2, device="cuda") + 1))
        thread.start()
        thread.join()
    assert found[0].is_cuda and spent.launches == 2


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_models_of_transformers_give_the_numbers_of_the_cpu(machine, family):
    expected = zoo.build(family)(IDS).logits
    simulated = machine(1)
    module = zoo.build(family).to("cuda")
    assert {p.device.index for p in module.parameters()} == {0}
    with simulated.measured() as spent, torch.no_grad():
        found = module(IDS.to("cuda")).logits
    assert spent.launches > 30 and spent.extra() > found.nbytes
    assert torch.equal(found.cpu(), expected)
    with pytest.raises(RuntimeError, match="same device"):
        module(IDS)


def test_nothing_is_left_behind():
    before = torch.Tensor.device
    with pytest.raises(ZeroDivisionError), Machine(2):
        assert torch.cuda.is_available() and is_torch_cuda_available()
        inside = torch.ones(1, device="cuda")
        raise ZeroDivisionError
    assert torch.Tensor.device is before and inside.device.type == "cpu"
    assert not torch.cuda.is_available() and not is_torch_cuda_available()
    assert threading.Thread.run.__module__ == "threading"
