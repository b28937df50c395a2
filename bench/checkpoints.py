"""Converting a synthetic checkpoint: time, CPU time and peak memory, against a plain copy with safetensors and d9d.

python -m bench.checkpoints                        8 GB, which are removed afterwards
python -m bench.checkpoints --gb 2 --d9d PYTHON    another size; a Python that has d9d (its own environment)

Every way runs in a process of its own. Peak memory is the largest resident set, file pages that are mapped included.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.timing import machine

TAIL = """
# Not getrusage, which remembers the process that this one was forked from.
peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
print(json.dumps([time.perf_counter() - w, time.process_time() - c, peak]))
"""
HEAD = """
import json, sys, time, os
from pathlib import Path
import torch
torch.set_num_threads(1)
src, dst, layers = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
ONE, MANY = [f"model.layers.{i}.self_attn.{n}_proj.weight" for i in range(layers) for n in "qkv"], range(4)
"""
START = "w, c = time.perf_counter(), time.process_time()\n"

PLAIN = """
from safetensors.torch import load_file, save_file
{start}
dst.mkdir()
for path in sorted(src.glob("*.safetensors")):
    save_file(load_file(path), dst / path.name, {{"format": "pt"}})
    if {sync}:
        with open(dst / path.name, "rb") as file:
            os.fsync(file.fileno())
"""
MAPPERS = """
def mapper(m, parallel, stack):
    renames = [m(name, name.replace("model.layers", "blocks")) for name in ONE]
    experts = [[f"model.layers.{i}.mlp.experts.{e}.weight" for e in MANY] for i in range(layers)]
    if stack is None:
        renames += [m(name, name.replace("model.layers", "blocks")) for names in experts for name in names]
    else:
        renames += [stack(names, f"blocks.{i}.experts", 0) for i, names in enumerate(experts)]
    return parallel(renames)
"""
OURS = """
from nnsplice import checkpoints as ck
{start}
ck.convert(src, dst, mapper(ck.Rename, ck.Parallel, {stack}), shard_size_gb=1.0, show_progress=False)
"""
D9D = """
from d9d.model_state.mapper.leaf import ModelStateMapperRename as Rename, ModelStateMapperStackTensors as Stack
from d9d.model_state.mapper.compose import ModelStateMapperParallel as Parallel
from d9d.model_state.mapper.adapters import identity_mapper_from_mapper_outputs
from d9d.model_state.io import read_model_state, write_model_state_local
{start}
both = mapper(Rename, Parallel, {stack})
dst.mkdir()
states = read_model_state(src, both, "cpu", show_progress=False)
write_model_state_local(dst, identity_mapper_from_mapper_outputs(both), states, 1.0, False)
"""


def make(folder: Path, gigabytes: float) -> int:
    """A checkpoint of layers with q, k, v and four experts, 64 MB each, in files of about 1 GB; how many layers."""
    import torch
    from safetensors.torch import save_file

    layers = max(1, round(gigabytes * 1e9 / (7 * 64 * 1024**2)))
    folder.mkdir()
    random = torch.randn(4096, 8192, dtype=torch.bfloat16)
    weight_map: dict[str, str] = {}
    for first in range(0, layers, 2):
        names = [
            f"model.layers.{i}.{name}.weight"
            for i in range(first, min(first + 2, layers))
            for name in [*(f"self_attn.{n}_proj" for n in "qkv"), *(f"mlp.experts.{e}" for e in range(4))]
        ]
        file = f"model-{first:05d}.safetensors"
        save_file({name: random.clone() for name in names}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map})
    )
    return layers


def measured(python: str, script: str, src: Path, dst: Path, layers: int) -> list[float]:
    """Seconds, CPU seconds and peak kilobytes of one run."""
    try:
        command = [python, "-W", "ignore", "-c", HEAD + MAPPERS + script + TAIL, str(src), str(dst), str(layers)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr)
        return json.loads(done.stdout.splitlines()[-1])
    finally:
        shutil.rmtree(dst, ignore_errors=True)


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--d9d", metavar="PYTHON", help="a Python that can import d9d")
    parser.add_argument("--folder", help="where there is room for twice the size")
    asked = parser.parse_args(arguments)
    ways = {
        "plain copy": (sys.executable, PLAIN.format(start=START, sync=False)),
        "plain copy, on the disk": (sys.executable, PLAIN.format(start=START, sync=True)),
        "nnsplice, renamed": (sys.executable, OURS.format(start=START, stack=None)),
        "nnsplice, experts stacked": (sys.executable, OURS.format(start=START, stack="ck.StackTensors")),
    }
    if asked.d9d:
        ways["d9d, renamed"] = (asked.d9d, D9D.format(start=START, stack=None))
        ways["d9d, experts stacked"] = (asked.d9d, D9D.format(start=START, stack="Stack"))
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        free = shutil.disk_usage(folder).free
        if free < 2.5e9 * asked.gb:
            sys.exit(
                f"{folder} has {free / 1e9:.0f} GB of room, and {2.5 * asked.gb:.0f} GB are needed: --gb or --folder"
            )
        src, dst = Path(folder) / "src", Path(folder) / "dst"
        layers = make(src, asked.gb)
        rounds: dict[str, list[list[float]]] = {name: [] for name in ways}
        for number in range(asked.rounds):
            names = list(ways)
            for name in names[number % len(names) :] + names[: number % len(names)]:
                rounds[name].append(measured(*ways[name], src, dst, layers))
    size = layers * 7 * 64 * 1024**2 / 1e9
    print(machine())
    print(f"\n{f'{size:.1f} GB':28}{'seconds':>9}{'cpu s':>8}{'GB/cpu s':>10}{'x copy':>8}{'peak MB':>9}")
    for name, runs in rounds.items():
        wall, cpu, peak = (statistics.median(run[i] for run in runs) for i in range(3))
        times = statistics.median(a[1] / b[1] for a, b in zip(runs, rounds["plain copy"], strict=True))
        print(f"{name:28}{wall:9.1f}{cpu:8.2f}{size / cpu:10.2f}{times:8.2f}{peak / 1024:9.0f}")


if __name__ == "__main__":
    main()
