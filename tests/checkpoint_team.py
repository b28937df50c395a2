"""A process that starts teams of processes, which write and read checkpoints together; prints a JSON line a rank.

python checkpoint_team.py FOLDER SIZE SCENARIO...
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # before the forks, each of which would import it
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from nnsplice import checkpoints as ck

KB = 1 / 1024**2
LIMIT = 60  # seconds, after which a process that hangs is ended

Result = dict[str, Any]


def states(count: int = 8) -> dict[str, torch.Tensor]:
    return {f"t{i}": torch.arange(64.0).reshape(8, 8) + 1000 * i for i in range(count)}


def world() -> distributed.ProcessGroup:
    group = distributed.group.WORLD
    assert group is not None
    return group


def everything(folder: Path) -> dict[str, torch.Tensor]:
    mapper = ck.Parallel([ck.Identity(name) for name in ck.Checkpoint.open(folder)])
    return dict(ck.read_model_state(folder, mapper, "cpu", show_progress=False))


def write_together(folder: Path, rank: int, size: int, fail: int | None = None, **options: Any) -> None:
    whole = ck.Parallel([ck.Rename(name, f"made.{name}") for name in states()])
    own = ck.Shard(whole, size, rank)
    needed = {name for group in own.state_dependency_groups() for name in group.inputs}

    def offered():
        for number, (name, tensor) in enumerate((n, t) for n, t in states().items() if n in needed):
            if rank == fail and number == 1:
                raise RuntimeError("no more memory")
            yield name, tensor

    ck.write_model_state_distributed(folder / "ck", own, offered(), world(), 0.3 * KB, False, **options)  # pyright: ignore[reportArgumentType]


# -- scenarios ---------------------------------------------------------------------------------------------------------


def shards(folder: Path, rank: int, size: int) -> Result:
    """Each process writes its share, and reads another one."""
    write_together(folder, rank, size)
    found = everything(folder / "ck")
    same = found.keys() == {f"made.{n}" for n in states()} and all(
        torch.equal(found[f"made.{n}"], t) for n, t in states().items()
    )
    checkpoint = ck.Checkpoint.open(folder / "ck")
    whole = ck.Parallel([ck.Identity(name) for name in checkpoint])
    share = ck.Shard(whole, size, rank, checkpoint.sizes())
    read = dict(ck.read_model_state(folder / "ck", share, "cpu", show_progress=False))
    told: list[Any] = [None] * size
    distributed.all_gather_object(told, sorted(read))
    return {"same": same, "shares": told, "files": sorted(path.name for path in (folder / "ck").iterdir())}


def one_fails(folder: Path, rank: int, size: int) -> Result:
    """The last process fails in the middle; the old checkpoint stays."""
    write_together(folder, rank, size)
    before = everything(folder / "ck")
    said = ""
    try:
        write_together(folder, rank, size, fail=size - 1)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    after = everything(folder / "ck")
    same = before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    return {"said": said, "same": same, "left": sorted(path.name for path in folder.glob(".ck*"))}


def goes_on(folder: Path, rank: int, size: int) -> Result:
    """A write that failed is gone on with by all."""
    said = ""
    try:
        write_together(folder, rank, size, fail=size - 1, resume=True)
    except Exception as error:
        said = type(error).__name__
    distributed.barrier()
    kept = len(list(folder.glob(".ck.part/weights/*.safetensors")))
    distributed.barrier()
    write_together(folder, rank, size, resume=True)
    found = everything(folder / "ck")
    same = all(torch.equal(found[f"made.{n}"], t) for n, t in states().items()) and len(found) == len(states())
    return {"said": said, "kept": kept, "same": same, "left": sorted(path.name for path in folder.glob(".ck*"))}


def killed(folder: Path, rank: int, size: int) -> Result:
    """The last process is killed in the middle; the others say so, the old checkpoint stays, and one goes on alone."""
    write_together(folder, rank, size)
    before = everything(folder / "ck")
    distributed.barrier()
    whole = ck.Parallel([ck.Rename(name, f"made.{name}") for name in states()])
    own = ck.Shard(whole, size, rank)
    needed = {name for group in own.state_dependency_groups() for name in group.inputs}

    def offered():
        for number, (name, tensor) in enumerate((n, t) for n, t in states().items() if n in needed):
            if rank == size - 1 and number == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            yield name, tensor

    said = ""
    try:
        ck.write_model_state_distributed(folder / "ck", own, offered(), world(), 0.3 * KB, False)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    after = everything(folder / "ck")
    same = before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    return {"said": said, "same": same, "left": sorted(path.name for path in folder.glob(".ck*"))}


def killed_before_it_is_gathered(folder: Path, rank: int, size: int) -> Result:
    """A process is killed while a tensor that is spread over it is asked for."""
    mesh = mesh_of(size, True)
    number = mesh.get_local_rank("pp")
    stage = Stage(number, mesh)
    mapper = ck.Parallel([ck.Identity(f"stage{number}.a"), ck.Identity(f"stage{number}.b")])
    if rank == size - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    said = ""
    try:
        ck.save_model_state_pipeline_parallel(folder / "ck", mapper, mesh, "pp", [stage], 1 * KB, False)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    return {"said": said, "same": not (folder / "ck").exists(), "left": sorted(p.name for p in folder.glob(".ck*"))}


def collide(folder: Path, rank: int, size: int) -> Result:
    """Two processes write the same name."""
    try:
        ck.write_model_state_distributed(
            folder / "ck", ck.Identity("a"), [("a", torch.ones(2))], world(), show_progress=False
        )
    except Exception as error:
        return {"said": f"{type(error).__name__}: {error}", "there": (folder / "ck").exists()}
    return {"said": "", "there": True}


def leaves(folder: Path, rank: int, size: int) -> Result:
    """Distribute sends nothing, GatherFullTensor gets everything back."""
    mesh = init_device_mesh("cpu", (size,))
    tensor = torch.arange(40.0).reshape(10, 4)
    results = []
    for placements in ([Shard(0)], [Shard(1)], [Replicate()]):
        made = ck.Distribute("x", mesh, placements).apply({"x": tensor})["x"]
        expected = distribute_tensor(tensor, mesh, placements)
        assert isinstance(made, DTensor) and isinstance(expected, DTensor)
        results.append(torch.equal(made.to_local(), expected.to_local()) and made.placements == expected.placements)
        results.append(torch.equal(ck.GatherFullTensor("x").apply({"x": made})["x"], tensor))
    try:
        ck.GatherFullTensor("x").apply({"x": tensor})
        said = ""
    except ValueError as error:
        said = str(error)
    # One process alone distributes: nothing may wait for the others.
    alone = ck.Distribute("x", mesh, [Shard(0)]).apply({"x": tensor})["x"] if rank == 0 else None
    return {"results": results, "said": said, "alone": alone is not None or rank > 0}


def mesh_of(size: int, first: bool) -> DeviceMesh:
    """The pipeline first or last."""
    shape, names = ((2, size // 2), ("pp", "tp")) if first else ((size // 2, 2), ("tp", "pp"))
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


class Stage(nn.Module):
    """Two weights, one of them spread over the other dimension of the mesh."""

    def __init__(self, number: int, mesh: DeviceMesh) -> None:
        super().__init__()
        torch.manual_seed(number)
        self.whole = {f"stage{number}.{name}": torch.randn(6, 5) for name in ("a", "b")}
        self.add_module(f"stage{number}", nn.Module())
        inner = self.get_submodule(f"stage{number}")
        spread = distribute_tensor(self.whole[f"stage{number}.a"], mesh["tp"], [Shard(0)])
        inner.register_parameter("a", nn.Parameter(spread))
        inner.register_parameter("b", nn.Parameter(self.whole[f"stage{number}.b"].clone()))


def pipeline(folder: Path, rank: int, size: int, first: bool = True, fail: str = "") -> Result:
    """Two stages, each spread over the rest of the mesh."""
    mesh = mesh_of(size, first)
    number = mesh.get_local_rank("pp")
    stage = Stage(number, mesh)
    mapper = ck.Parallel([ck.Transpose(f"stage{number}.a", (0, 1)), ck.Rename(f"stage{number}.b", f"stage{number}.c")])
    said = ""
    if fail:
        from nnsplice.checkpoints.io import shards as module

        real = module.ShardWriter.add

        def add(self: Any, name: str, tensor: torch.Tensor) -> None:
            if rank == size - size // 2 * (not first) - 1 - (size // 2 - 1) * first or fail == "all":
                raise OSError(28, "No space left on device")
            real(self, name, tensor)

        module.ShardWriter.add = add
    try:
        ck.save_model_state_pipeline_parallel(folder / "ck", mapper, mesh, "pp", [stage], 1 * KB, False)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    if fail:
        return {"said": said, "there": (folder / "ck").exists(), "left": sorted(p.name for p in folder.glob(".ck*"))}
    found = everything(folder / "ck")
    own = stage.whole
    a, c = found[f"stage{number}.a"], found[f"stage{number}.c"]
    return {
        "said": said, "names": sorted(found),
        "same": torch.equal(a, own[f"stage{number}.a"].T) and torch.equal(c, own[f"stage{number}.b"]),
    }  # fmt: skip


def own_slice(folder: Path, rank: int, size: int) -> Result:
    """A DTensor target reads its own slice, and no more."""
    mesh = init_device_mesh("cpu", (size,))
    whole = {name: torch.randn(40, 30) for name in ("rows", "columns", "same", "turned")}
    for tensor in whole.values():
        distributed.broadcast(tensor, 0)
    if rank == 0:
        mapper = ck.Parallel([ck.Identity(name) for name in whole])
        ck.write_model_state_local(folder / "ck", mapper, whole.items(), show_progress=False)
    distributed.barrier()
    model = nn.Module()
    placements = {"rows": [Shard(0)], "columns": [Shard(1)], "same": [Replicate()], "turned": [Shard(0)]}
    for name, tensor in whole.items():
        blank = torch.zeros_like(tensor.T.contiguous() if name == "turned" else tensor)
        model.register_parameter(name, nn.Parameter(distribute_tensor(blank, mesh, placements[name])))
    expected = {name: distribute_tensor(tensor, mesh, placements[name]).to_local() for name, tensor in whole.items()}
    expected["turned"] = distribute_tensor(whole["turned"].T.contiguous(), mesh, [Shard(0)]).to_local()
    counts = {}
    for name in ("rows", *whole):  # the first time other things are read as well
        mapper = ck.Transpose(name, (0, 1)) if name == "turned" else ck.Rename(name, name)
        before = rchar()
        ck.load_model_state(folder / "ck", mapper, "cpu", model, show_progress=False)
        counts[name] = rchar() - before
    header = (
        ck.Checkpoint.open(folder / "ck").entry("rows").start
        + (folder / "ck" / "model.safetensors.index.json").stat().st_size
    )
    same = {name: torch.equal(getattr(model, name).to_local(), expected[name]) for name in whole}
    return {"same": same, "extra": {n: counts[n] - header - expected[n].nbytes for n in ("rows", "columns", "same")}}


def rchar() -> int:
    """Bytes that this process asked the system for."""
    return int(Path("/proc/self/io").read_text().split()[1])


SCENARIOS: dict[str, Callable[[Path, int, int], Result]] = {
    "shards": shards,
    "one fails": one_fails,
    "goes on": goes_on,
    "killed": killed,
    "killed before it is gathered": killed_before_it_is_gathered,
    "collide": collide,
    "leaves": leaves,
    "own slice": own_slice,
    "pipeline first": lambda f, r, s: pipeline(f, r, s, True),
    "pipeline last": lambda f, r, s: pipeline(f, r, s, False),
    "pipeline fails": lambda f, r, s: pipeline(f, r, s, True, "one"),
    "pipeline fails last": lambda f, r, s: pipeline(f, r, s, False, "one"),
}


def run(folder: Path, size: int, name: str) -> None:
    """One scenario, in processes that are forked from this one."""
    folder.mkdir()
    children = []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            signal.alarm(LIMIT)
            distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
            code = 0
            try:
                result = SCENARIOS[name](folder, rank, size)
            except Exception as error:
                result, code = {"error": repr(error)}, 1
            (folder / f"rank{rank}.json").write_text(json.dumps(result))
            if not name.startswith("killed"):  # which waits for those that are gone
                distributed.destroy_process_group()
            os._exit(code)
        children.append(child)
    started = time.monotonic()
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    for rank, code in enumerate(codes):
        path = folder / f"rank{rank}.json"
        told = json.loads(path.read_text()) if path.exists() else {}
        print(json.dumps({"scenario": name, "size": size, "rank": rank, "code": code, **told}), flush=True)
    print(f"{name}: {time.monotonic() - started:.1f} s", file=sys.stderr)


if __name__ == "__main__":
    torch.set_num_threads(1)
    where, count, *names = sys.argv[1:]
    for number, scenario in enumerate(names or SCENARIOS):
        run(Path(where) / f"{number}", int(count), scenario)
