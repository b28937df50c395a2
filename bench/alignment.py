"""What distributed alignment search costs on a pretrained model: SmolLM2-135M, which of two names comes again.

    python -m bench.alignment                               every layer, three roles, 256 pairs, k=8, 4 epochs
    python -m bench.alignment --layers 5 --journal FOLDER   every fifth layer; continued after a stop

Both models (pretrained and random weights), all controls and the held-out measurement are in the time. CPU seconds of
this process, and the accuracies that came out.
"""

from __future__ import annotations

import argparse
import random
import time
from typing import Any

import torch

import nnsplice as ns
from bench.timing import machine

ROLES = ("s2", "thing")


def pairs_of(model: Any, count: int) -> list[tuple[Any, Any]]:
    """Base and source prompts of other people that differ in which name comes again, with their roles aligned."""
    records = ns.tasks.ioi(model, count * 3, seed=3).filter(model, by="top").records
    rng, pairs = random.Random(0), []
    for base in records:
        names = {base.variables["io"], base.variables["s"]}
        length = len(model.tokenizer(base.clean)["input_ids"])
        fitting = [
            source
            for source in records
            if source.variables["order"] != base.variables["order"]
            and not {source.variables["io"], source.variables["s"]} & names
            and all(source.spans[role] == base.spans[role] for role in ROLES)
            and len(model.tokenizer(source.clean)["input_ids"]) == length
        ]
        if fitting:
            pairs.append((base, rng.choice(fitting)))
    if len(pairs) < count:
        raise SystemExit(f"only {len(pairs)} of {count} pairs could be made")
    return pairs[:count]


def main(arguments: list[str] | None = None) -> None:
    """Train, and print seconds and accuracies."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=256)
    parser.add_argument("--layers", type=int, default=1, help="every n-th layer")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--journal", help="a folder that keeps finished layers")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print(machine())
    model = ns.load("smollm2")
    pairs = pairs_of(model, chosen.pairs)
    layers = f"layers[::{chosen.layers}].output"
    start = time.process_time()
    found = ns.align(
        model,
        [base.clean for base, _ in pairs],
        [source.clean for _, source in pairs],
        [" " + base.variables["s"] for base, _ in pairs],
        [*(f'{layers}["{role}"]' for role in ROLES), f"{layers}[-1]"],
        k=8,
        epochs=chosen.epochs,
        learning_rate=0.03,
        spans={
            side: {role: [pair[number].spans[role] for pair in pairs] for role in ROLES}
            for number, side in enumerate(("corrupted", "clean"))
        },
        journal=chosen.journal,
    )
    print(f"\n{len(found.frame())} sites, {len(pairs)} pairs, {time.process_time() - start:.0f} CPU s")
    print(found.frame().round(2).to_string())


if __name__ == "__main__":
    main()
