"""A process that starts a team of processes with one model spread over them, and asks for what cannot be right there.

python sharded_models.py SIZE FOLDER KIND, where KIND is `refused` or `apart`; rank 0 writes answers.json there:
question -> what was answered.
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
PROMPTS, OTHERS = ["w3 w4 w5", "w9 w2 w6"], ["w3 w8 w5", "w9 w7 w6"]
#: What every process has whole, and what is gathered.
PATHS = ["layers[:].input[:]", "layers[:].output[-1]", "layers[:].attn.output[1]", "layers[:].mlp.output[:]",
         "layers[:].heads[:].output[-1]", "layers[:].mid[0]", "final_norm.output[-1]"]  # fmt: skip


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
        "attribute": lambda: ns.attribute(tensor, "w3 w4", "w3 w5", "layers[:].output", METRIC, progress=False),
        "trace": lambda: traced(tensor),
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


def traced(model: Any) -> object:
    with model.trace("w3 w4 w5"):
        saved = ns.save_activations(model, "layers[1].heads[2].output[-1]")
    return len(saved)


def apart(size: int) -> dict[str, str]:
    """How far captures, and runs with captures written in, are from those of the plain model, in double precision."""
    mesh = init_device_mesh("cpu", (size,))
    plain = zoo.build("llama", num_key_value_heads=4).double()
    sharded, split = copy.deepcopy(plain), copy.deepcopy(plain)
    for block in sharded.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    for block in split.model.layers:
        columns = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
        rows = dict.fromkeys(("self_attn.o_proj", "mlp.down_proj"), RowwiseParallel())
        parallelize_module(block, mesh, {**dict.fromkeys(columns, ColwiseParallel()), **rows})
    here = ns.load(plain, tokenizer=zoo.tokenizer())
    found: dict[str, str] = {}
    for name, module in (("fsdp", sharded), ("tensor", split)):
        model = ns.load(module, tokenizer=zoo.tokenizer())
        expected, got = ns.capture(here, PROMPTS, PATHS), ns.capture(model, PROMPTS, PATHS)
        found[f"{name} values"] = str(max(float((v - expected[k]).abs().max()) for k, v in got.items()))
        for path in ("layers[1].output[1]", "layers[0].attn.output[:]", "layers[1].heads[2].output[-1]"):
            saved = ns.capture(here, PROMPTS, path)
            one, other = (ns.patched_logits(each, OTHERS, saved) for each in (here, model))
            found[f"{name} {path}"] = str(float((one - other).abs().max()))
            for each in (here, model):  # what is written matters
                assert float((one - ns.patched_logits(each, OTHERS, saved * 0)).abs().max()) > 1e-4
        for path in ("layers[1].heads[2].q[-1]", "layers[1].neurons[3].output[-1]", "layers[1].mlp.up.output[-1]"):
            try:
                got = ns.capture(model, PROMPTS, path)
                expected = ns.capture(here, PROMPTS, path)
                found[f"{name} {path}"] = str(max(float((v - expected[k]).abs().max()) for k, v in got.items()))
            except NnspliceError as error:
                found[f"{name} {path}"] = f"{type(error).__name__}: {error}"
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


def member(rank: int, size: int, folder: str, kind: str) -> None:
    torch.set_num_threads(1)
    store = FileStore(f"{folder}/store", size)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=size)
    try:
        found = apart(size) if kind == "apart" else answers(size)
        if rank == 0:
            Path(folder, "answers.json").write_text(json.dumps(found))
        distributed.barrier()
    finally:
        distributed.destroy_process_group()


if __name__ == "__main__":
    # Forked, as every import is done by now.
    start_processes(member, (int(sys.argv[1]), *sys.argv[2:4]), nprocs=int(sys.argv[1]), start_method="fork")
