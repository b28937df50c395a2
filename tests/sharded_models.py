"""A process that starts a team of processes with one model spread over them, and asks for what cannot be right there.

python sharded_models.py SIZE FOLDER KIND, where KIND is a function here; rank 0 writes answers.json in the folder:
question -> what was answered. For `failing` every rank writes answers-RANK.json.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
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
from nnsplice.atlas import unwrap
from nnsplice.engine import weights_digest
from nnsplice.errors import NnspliceError
from weights.oracle import IDS

METRIC = ns.logit_diff("w7", "w8")
PROMPTS, OTHERS = ["w3 w4 w5", "w9 w62 w6"], ["w3 w8 w5", "w9 w7 w6"]
#: What every process has whole, and what is gathered.
PATHS = ["layers[:].input[:]", "layers[:].output[-1]", "layers[:].attn.output[1]", "layers[:].mlp.output[:]",
         "layers[:].heads[:].output[-1]", "layers[:].mid[0]", "final_norm.output[-1]"]  # fmt: skip


def entered(manager: Any) -> str:
    with manager:
        return "entered"


def refused(size: int, _folder: str) -> dict[str, str]:
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
        "paths": lambda: ns.path_patch(
            tensor, "w3 w4", "w3 w5", "layers[:].heads[:].output", "layers[2].output[-1]", METRIC, progress=False
        ),
        "other source": lambda: ns.sweep(
            plain, "w3 w4", None, "layers[:].output[-1]", METRIC, source=tensor, progress=False
        ),
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


def spread(size: int) -> tuple[Any, Any, Any]:
    """A model in double precision: in this process, fully sharded, and with tensor parallelism."""
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
    plain, sharded, split = (ns.load(module, tokenizer=zoo.tokenizer()) for module in (plain, sharded, split))
    return plain, sharded, split


CLEAN, CORRUPTED = ["w3 w4 w5", "w9 w62 w6 w61"], ["w3 w8 w5", "w9 w7 w6 w61"]
SITES = ["layers[:].output", "layers[:].attn.output", "layers[:].mlp.output", "layers[:].heads[:].output"]
SWEPT: dict[str, Callable[[Any], Any]] = {
    "reference": lambda m: ns.sweep(
        m, CLEAN[:1], CORRUPTED[:1], ["layers[1].output[1]", "layers[:].heads[2].output[-1]"], METRIC,
        executor="reference", progress=False,
    ),
    "batched": lambda m: ns.sweep(
        m, CLEAN, CORRUPTED, SITES, METRIC, executor="batched", max_tokens=16, progress=False
    ),
    "auto": lambda m: ns.sweep(m, CLEAN, CORRUPTED, SITES, METRIC, progress=False),
    "sets": lambda m: ns.sweep(m, CLEAN, CORRUPTED, [["layers[0].heads[1]", "layers[2].mlp"]], METRIC, progress=False),
    "neurons": lambda m: ns.sweep(m, CLEAN, CORRUPTED, "layers[1].neurons[3].output[-1]", METRIC, progress=False),
    "zero": lambda m: ns.ablate(m, CLEAN, SITES[1:], METRIC, progress=False),
    "mean": lambda m: ns.ablate(m, CLEAN, SITES[1:], METRIC, operation="mean", progress=False),
    "noise": lambda m: ns.causal_trace(m, CLEAN, ["w4", "w62"], answer="w7", samples=2, progress=False),
    "knockout": lambda m: ns.sweep(
        m, None, CORRUPTED, "layers[:].heads[:].pattern[-1][:2]", METRIC, operation="knockout", progress=False
    ),
}  # fmt: skip


def swept(size: int, folder: str) -> dict[str, str]:
    """How far the values of sweeps are from those of the plain model, and whether they are about the same weights."""
    here, *several = spread(size)
    found: dict[str, str] = {}
    for asked, ask in SWEPT.items():
        expected = ask(here)
        assert np.nanstd(np.nan_to_num(expected.table.values)) > 1e-4  # what is patched matters
        for name, model in zip(("fsdp", "tensor"), several, strict=True):
            try:
                got = ask(model)
            except NnspliceError as error:
                found[f"{name} {asked}"] = f"{type(error).__name__}: {error}"
                continue
            assert np.array_equal(got.table.done, expected.table.done)
            assert asked == "mean" or got.table.asked == expected.table.asked  # means are told apart by every bit
            assert got.run.executor == ("reference" if asked == "reference" else "batched")
            found[f"{name} {asked}"] = str(float(np.nanmax(np.abs(got.table.values - expected.table.values))))
    found["note"] = SWEPT["auto"](several[0]).run.note
    for executor, model in (("packed", several[0]), ("packed", several[1])):
        try:
            ns.sweep(model, CLEAN, CORRUPTED, SITES, METRIC, executor=executor, progress=False)
        except NnspliceError as error:
            found["packed"] = f"{type(error).__name__}: {error}"
    # One journal, of the first process, which goes on where the plain model left it.
    rank, journal = distributed.get_rank(), Path(folder, "journal.jsonl")
    if rank == 0:
        ns.sweep(here, CLEAN, CORRUPTED, SITES[0], METRIC, executor="batched", journal=journal, progress=False)
        lines = journal.read_text().splitlines()
        journal.write_text("\n".join(lines[:1]) + "\n")
    distributed.barrier()
    at = journal if rank == 0 else Path(folder, "none", "of", "mine.jsonl")
    got = ns.sweep(several[1], CLEAN, CORRUPTED, SITES[0], METRIC, max_tokens=16, journal=at, progress=False)
    again = ns.sweep(several[0], CLEAN, CORRUPTED, SITES[0], METRIC, journal=journal, progress=False)
    found["journal"] = str(float(np.nanmax(np.abs(got.table.values - again.table.values))))
    found["lines"] = str(len(journal.read_text().splitlines()))
    # All processes have the same numbers, to the bit.
    every: list[Any] = [None] * size
    distributed.all_gather_object(every, got.table.values)
    found["same"] = str(all(np.array_equal(one, every[0], equal_nan=True) for one in every))
    # An edit that one process made of its own shard is another model, in all of them.
    root: Any = unwrap(several[0])
    weight = root.model.layers[1].mlp.up_proj.weight
    before = weights_digest(several[0])
    if rank == size - 1:
        weight._local_tensor[0, 0] += 1
    found["edited"] = str(weights_digest(several[0]) != before)
    return found


def failing(size: int, folder: str) -> dict[str, str]:
    """What each process is told when another goes another way."""
    rank, (*_, tensor) = distributed.get_rank(), spread(size)
    found: dict[str, str] = {}

    def ask(name: str, **options: Any) -> None:
        clean = options.pop("clean", "w3 w4 w5")
        start = time.monotonic()
        try:
            ns.sweep(tensor, clean, "w3 w8 w5", SITES[0], METRIC, executor="batched", progress=False, **options)
            found[name] = "done"
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
        assert time.monotonic() - start < 60

    ask("prompts", clean="w3 w4 w5" if rank == 0 else "w3 w61 w5")
    ask("tokens", max_tokens=16 + rank)
    ask("journal", journal=Path(folder, "no folder", "journal.jsonl"))
    ask("all well")

    def runs_out(_module: Any, args: Any) -> None:
        if len(args[0]) > 1:  # in a chunk of cells
            raise torch.OutOfMemoryError("CUDA out of memory")

    # The other processes wait in the middle of the run: until their group's timeout, as this one lives on.
    root: Any = unwrap(tensor)
    hook = root.model.layers[2].register_forward_pre_hook(runs_out) if rank == size - 1 else None
    ask("memory")
    assert hook is None or hook.remove() is None
    Path(folder, f"answers-{rank}.json").write_text(json.dumps(found))
    os._exit(0)  # the group is broken now, and would be waited for


def apart(size: int, _folder: str) -> dict[str, str]:
    """How far captures, and runs with captures written in, are from those of the plain model, in double precision."""
    here, *several = spread(size)
    found: dict[str, str] = {}
    for name, model in zip(("fsdp", "tensor"), several, strict=True):
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
    limit = timedelta(seconds=20 if kind == "failing" else 240)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)
    try:
        found = {"refused": refused, "apart": apart, "swept": swept, "failing": failing}[kind](size, folder)
        if rank == 0:
            Path(folder, "answers.json").write_text(json.dumps(found))
        distributed.barrier()
    finally:
        distributed.destroy_process_group()


if __name__ == "__main__":
    # Forked, as every import is done by now.
    start_processes(member, (int(sys.argv[1]), *sys.argv[2:4]), nprocs=int(sys.argv[1]), start_method="fork")
