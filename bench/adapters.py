"""What it costs to look at an adapter: the map of an optimizer's ids, and the comparison of a step with factors.

python -m bench.adapters
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from bench.timing import machine, race, table
from nnsplice.adapters import ExpertManifoldAligner, LoRAMatrices, map_param_ids_to_layers

LAYERS, RANK, WIDTH, INNER = 32, 16, 512, 1376
#: What a Llama block has, in the order in which it registers it.
SHAPES = {"self_attn": dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (WIDTH, WIDTH)),
          "mlp": {"gate_proj": (INNER, WIDTH), "up_proj": (INNER, WIDTH), "down_proj": (WIDTH, INNER)}}  # fmt: skip


def factors() -> dict[str, torch.Tensor]:
    """The tensors of an adapter on every matrix of 32 layers, by the names in its file."""
    found = {}
    for layer in range(LAYERS):
        for part, modules in SHAPES.items():
            for module, (out, width) in modules.items():
                name = f"base_model.model.model.layers.{layer}.{part}.{module}"
                found[f"{name}.lora_A.weight"] = torch.randn(RANK, width)
                found[f"{name}.lora_B.weight"] = torch.randn(out, RANK)
    return found


def naive(lora: LoRAMatrices, update: torch.Tensor) -> float:
    """The cosine by way of the whole product."""
    product = (lora.lora_B @ lora.lora_A).double()
    return float((product * update.double()).sum() / (product.norm() * update.double().norm()))


def main(arguments: list[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args(arguments).rounds
    torch.set_num_threads(1)
    print(machine())
    held = factors()
    with tempfile.TemporaryDirectory() as folder:
        save_file(held, Path(folder) / "adapter_model.safetensors")
        by_id = dict(enumerate(held.items()))
        state = {
            "state": {n: {"exp_avg": torch.empty(t.shape, device="meta")} for n, (_, t) in by_id.items()},
            "param_groups": [{"params": list(by_id)}],
        }
        names = {n: name for n, (name, _) in by_id.items()}
        ways = {
            "order": lambda: map_param_ids_to_layers(folder, len(held)),
            "names": lambda: map_param_ids_to_layers(folder, len(held), names=names),
            "shapes": lambda: map_param_ids_to_layers(folder, len(held), state=state),
        }
        print(f"\n{len(held)} ids -> {LAYERS} layers, known by\n{table(race(ways, rounds=rounds, repeats=3), 'order')}")
    aligner = ExpertManifoldAligner(torch.nn.Linear(1, 1))
    lora, update = LoRAMatrices(torch.randn(RANK, 4096), torch.randn(4096, RANK)), torch.randn(4096, 4096)
    compare = {
        "the whole product": lambda: naive(lora, update),
        "cosine": lambda: aligner.compute_subspace_alignment(lora, update),
        "subspace share": lambda: aligner.compute_subspace_alignment(lora, update, mode="subspace"),
    }
    title = f"\none update of a 4096 x 4096 matrix against factors of rank {RANK}"
    print(f"{title}\n{table(race(compare, rounds=rounds, repeats=1), 'the whole product')}")


if __name__ == "__main__":
    main()
