"""What attribution costs and finds, beside the exact sweep of the same cells.

    python -m bench.attribution                 the toy, and random models of GPT-2's and Llama's kind
    python -m bench.attribution --layers 12     larger random models

For each method: CPU seconds of the whole call, Spearman's rank correlation with the exact effects, and how many of the
truly largest 20 cells are among the first 20, 40 and 80 by estimate: what verifying so many would find. The last line
of a table is what cells drawn at random would find.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers as hf

import nnsplice as ns
from bench.activations import tokenizer
from bench.timing import machine
from nnsplice.results.estimates import spearman

TOP = 20
BUDGETS = (20, 40, 80)
SITES = ["layers[:].attn", "layers[:].mlp", "layers[:].heads[:]", "layers[:].heads[:].q", "layers[:].groups[:].k",
         "layers[:].groups[:].v"]  # fmt: skip
METHODS: dict[str, dict[str, Any]] = {
    "atp": {"method": "atp"},
    "atp*": {"method": "atp*"},
    "ig, 5 steps": {"method": "ig"},
    "ig, 20 steps": {"method": "ig", "steps": 20},
}


@dataclass(frozen=True)
class Task:
    """A model and pairs of prompts."""

    name: str
    model: Any
    clean: Any
    corrupted: Any
    metric: Any


def toy() -> Task:
    """Sentences that the trained toy model answers."""
    pairs = ns.models.toy_prompts().ioi[:4]
    metric = ns.logit_diff([pair.answer for pair in pairs], [pair.wrong for pair in pairs])
    return Task("toy, indirect objects", ns.load("toy"), [p.clean for p in pairs], [p.corrupted for p in pairs], metric)


def gpt2(layers: int, width: int) -> Task:
    """Random weights in GPT-2's shape."""
    config = hf.GPT2Config(
        n_embd=width, n_layer=layers, n_head=8, vocab_size=256, n_positions=64, bos_token_id=1, eos_token_id=1
    )
    return _random("GPT-2's kind, random", hf.GPT2LMHeadModel(config))


def llama(layers: int, width: int) -> Task:
    """Random weights in Llama's shape, with grouped queries."""
    config = hf.LlamaConfig(
        vocab_size=256, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    return _random("Llama's kind, random", hf.LlamaForCausalLM(config))


def _random(name: str, module: Any) -> Task:
    with torch.no_grad():
        for parameter in module.parameters():  # larger than at the start of training, so that something depends on them
            parameter.mul_(2.0) if parameter.dim() > 1 else None
    generator = torch.Generator().manual_seed(0)
    clean, corrupted = (torch.randint(10, 250, (2, 12), generator=generator) for _ in range(2))
    return Task(name, ns.load(module.eval(), tokenizer=tokenizer(256)), clean, corrupted, ns.logit_diff(5, 7))


def sizes(result: ns.SweepResult) -> np.ndarray:
    """The mean size of each cell's effect over the prompts."""
    moved = np.abs(result.table.values - result.corrupted[:, None]) / np.abs(result.total_effect)[:, None]
    return np.nanmean(moved, 0)


def found(estimate: np.ndarray, exact: np.ndarray, budget: int, top: int = TOP) -> float:
    """Which share of the truly largest cells is among the first by estimate."""
    first = set(np.argsort(-estimate, kind="stable")[:budget].tolist())
    return len(first & set(np.argsort(-exact, kind="stable")[:top].tolist())) / top


def table(task: Task, rounds: int) -> None:
    """Run every way, and print what it costs and finds."""
    args = (task.model, task.clean, task.corrupted, SITES, task.metric)
    exact, seconds = _timed(lambda: ns.sweep(*args, progress=False), rounds)
    truth = sizes(exact)
    can = ~np.isnan(truth)
    cells = int(can.sum())
    print(f"\n{task.name}: {cells} sites, {len(exact.clean)} prompts, exact by the {exact.run.executor} executor")
    print(f"{'':16}{'cpu s':>8}{'faster':>8}{'rank':>7}" + "".join(f"{f'in {budget}':>8}" for budget in BUDGETS))
    print(f"{'exact':16}{seconds:8.2f}{1.0:8.1f}{1.0:7.2f}" + "".join(f"{1.0:8.0%}" for _ in BUDGETS))
    for name, options in METHODS.items():
        result, spent = _timed(lambda options=options: ns.attribute(*args, progress=False, **options), rounds)
        estimate = sizes(result)
        shares = "".join(f"{found(estimate[can], truth[can], budget):8.0%}" for budget in BUDGETS)
        print(f"{name:16}{spent:8.2f}{seconds / spent:8.1f}{spearman(estimate[can], truth[can]):7.2f}{shares}")
    shares = "".join(f"{budget / cells:8.0%}" for budget in BUDGETS)
    print(f"{'at random':16}{0.0:8.2f}{'':8}{0.0:7.2f}{shares}")


def _timed(run: Callable[[], ns.SweepResult], rounds: int) -> tuple[ns.SweepResult, float]:
    result = run()  # warm
    spent = []
    for _ in range(rounds):
        start = time.process_time()
        result = run()
        spent.append(time.process_time() - start)
    return result, sorted(spent)[rounds // 2]


def main(arguments: list[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(machine())
    for task in (toy(), gpt2(chosen.layers, chosen.width), llama(chosen.layers, chosen.width)):
        table(task, chosen.rounds)


if __name__ == "__main__":
    main()
