"""A process that starts a team of processes with one model spread over them, and asks for what cannot be right there.

python sharded_models.py SIZE FOLDER; rank 0 prints a JSON object: question -> what was answered.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch._C._distributed_c10d import FileStore
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.multiprocessing.spawn import start_processes

import nnsplice as ns
import zoo
from nnsplice import wire
from nnsplice.errors import NnspliceError
from weights.oracle import IDS

METRIC = ns.logit_diff("w7", "w8")


def entered(manager: Any) -> str:
    with manager:
        return "entered"


def answers(size: int) -> dict[str, str]:
    mesh = init_device_mesh("cpu", (size,))
    plain = zoo.wrap("llama")
    sharded = copy.deepcopy(plain._module)
    for block in sharded.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    split = copy.deepcopy(plain._module)
    for block in split.model.layers:
        columns = dict.fromkeys(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ColwiseParallel())
        parallelize_module(block, mesh, {**columns, "self_attn.o_proj": RowwiseParallel()})
    flat = FullyShardedDataParallel(copy.deepcopy(plain._module), use_orig_params=True, device_id=torch.device("cpu"))
    fsdp, tensor = (ns.load(module, tokenizer=plain.tokenizer) for module in (sharded, split))
    value = distribute_tensor(torch.ones(2, 4, 16), mesh, [Replicate()])
    asked: dict[str, Callable[[], object]] = {
        "ablate": lambda: entered(ns.weights.ablate(sharded, "l1h2")),
        "freeze": lambda: entered(ns.weights.freeze_except(sharded, "l1h2")),
        "masks": lambda: entered(ns.weights.ablate(split, ns.weights.create_param_masks(split, "l1g1"))),
        "swap": lambda: entered(ns.weights.swap(plain, sharded, "l1h2")),
        "interpolate": lambda: entered(ns.weights.interpolate(plain, dict(split.named_parameters()), "l1h2", 0.5)),
        "diff": lambda: ns.weights.diff(plain, sharded, by="heads"),
        "capture": lambda: ns.capture(tensor, "w3 w4 w5", "layers[1].heads[2].output[-1]"),
        "capture fsdp": lambda: ns.capture(fsdp, "w3 w4 w5", "layers[1].heads[2].output[-1]"),
        "sweep": lambda: ns.sweep(tensor, "w3 w4", "w3 w5", "layers[:].heads[:].output", METRIC, progress=False),
        "weights": lambda: ns.sweep_weights(fsdp, plain, "w3 w4", "layers[:].heads[:]", METRIC, progress=False),
        "tuned": lambda: ns.sweep_weights(plain, sharded, "w3 w4", "layers[:].heads[:]", METRIC, progress=False),
        "flat": lambda: entered(ns.weights.ablate(flat, "full")),
        "value": lambda: wire.unpack((value, None)),
        # What is whole here works, among processes too.
        "plain ablate": lambda: entered(ns.weights.ablate(plain, "l1h2")),
        "plain capture": lambda: len(ns.capture(plain, "w3 w4 w5", "layers[1].heads[2].output[-1]")),
        "rest untouched": lambda: entered(ns.weights.ablate(split, "l1 mlp")),
        "gathered": lambda: gathered(split),
    }
    found: dict[str, str] = {}
    for name, ask in asked.items():
        try:
            found[name] = str(ask())
        except NnspliceError as error:
            found[name] = f"{type(error).__name__}: {error}"
        except ValueError as error:
            found[name] = f"ValueError: {error}"
    return found


def gathered(model: Any) -> float:
    """What the message says to write: the whole tensors in a plain model."""
    whole = zoo.build("llama", seed=5)
    whole.load_state_dict({n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in model.named_parameters()})
    with torch.no_grad(), ns.weights.ablate(whole, "l1h2"):
        found = whole(IDS).logits
    reference = zoo.build("llama")
    with torch.no_grad(), ns.weights.ablate(reference, "l1h2"):
        return float((found - reference(IDS).logits).abs().max())


def member(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = FileStore(f"{folder}/store", size)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=size)
    try:
        found = answers(size)
        if rank == 0:
            Path(folder, "answers.json").write_text(json.dumps(found))
        distributed.barrier()
    finally:
        distributed.destroy_process_group()


if __name__ == "__main__":
    # Forked, as every import is done by now.
    start_processes(member, (int(sys.argv[1]), sys.argv[2]), nprocs=int(sys.argv[1]), start_method="fork")
