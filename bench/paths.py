"""What a path patch costs a cell, beside a sweep of the same heads and three passes with torch hooks.

    python -m bench.paths                     a Llama-like shape, random weights
    python -m bench.paths --model FOLDER      a checkpoint of one's own
    python -m bench.paths --pairs 4 --rounds 5

Every head of every layer is a cell. It is sent to the logits, or to the queries, keys and values of one later layer.
The three passes by hooks are those of the literature: the clean run for the sender's value; a run with it written in
and every branch behind it held still, for what the receivers read; and a run with that written into the receivers. A
sample of cells is timed and scaled. CPU seconds of this process; the ways take turns, and ratios are medians over the
rounds. Peak memory is what the process grew to in the whole, so it is told for one way at a time (`--only`).
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch

import nnsplice as ns
from bench.activations import tokenizer
from bench.sweeps import llama
from bench.timing import machine
from nnsplice import engine
from nnsplice.activations.access import site_of

METRIC = ns.logit_diff(5, 7)
HEADS = "layers[:].heads[:]"


class Hooks:
    """Three passes with torch's hooks on the bare module."""

    def __init__(self, model: Any, clean: torch.Tensor, corrupted: torch.Tensor, layer: int) -> None:
        self.root, self.clean, self.corrupted = model._module, clean, corrupted
        blocks = ns.Atlas.of(model).tower().blocks
        self.added = [name for block in blocks for name in (block.attn_added, block.mlp_added)]
        self.layout, self.blocks = blocks[0].layout, blocks
        parts = [f"layers[{layer}].heads[:].q", f"layers[{layer}].groups[:].k", f"layers[{layer}].groups[:].v"]
        self.receivers = list(dict.fromkeys(site_of(path).module for path in engine.expand(model, parts)))
        with torch.no_grad():
            self.still = self._kept(corrupted, self.added)
            self.slices = self._kept(clean, [str(block.o) for block in blocks], ends="input")

    def _kept(self, ids: torch.Tensor, names: list[Any], ends: str = "output") -> dict[str, torch.Tensor]:
        kept: dict[str, torch.Tensor] = {}
        with ExitStack() as stack:
            for name in names:
                module = self.root.get_submodule(name)
                if ends == "input":
                    hook = module.register_forward_pre_hook(lambda _m, a, n=name: kept.__setitem__(n, a[0].clone()))
                else:
                    hook = module.register_forward_hook(lambda _m, _a, o, n=name: kept.__setitem__(n, _first(o)))
                stack.callback(hook.remove)
            self.root(ids, use_cache=False)
        return kept

    def one(self, layer: int, head: int, direct: bool) -> float:
        """One cell."""
        width, o = self.layout.head_dim, str(self.blocks[layer].o)
        columns = slice(head * width, (head + 1) * width)

        def send(_m: Any, args: Any) -> Any:
            new = args[0].clone()
            new[..., columns] = self.slices[o][..., columns]
            return (new, *args[1:])

        read: dict[str, torch.Tensor] = {}
        with ExitStack() as stack, torch.no_grad():
            self.slices[o] = self._kept(self.clean, [o], ends="input")[o]  # the clean run, for the sender's value
            stack.callback(self.root.get_submodule(o).register_forward_pre_hook(send).remove)
            for name in self.added:
                if name != self.blocks[layer].attn_added:
                    hook = lambda _m, _a, out, n=name: _with_first(out, self.still[n])  # noqa: E731
                    stack.callback(self.root.get_submodule(name).register_forward_hook(hook).remove)
            for name in self.receivers:
                hook = lambda _m, _a, out, n=name: read.__setitem__(n, out.clone())  # noqa: E731
                stack.callback(self.root.get_submodule(name).register_forward_hook(hook).remove)
            logits = self.root(self.corrupted, use_cache=False).logits
        if direct:
            return float(METRIC(logits[:, -1])[0])
        with ExitStack() as stack, torch.no_grad():
            for name in self.receivers:
                hook = lambda _m, _a, _o, n=name: read[n]  # noqa: E731
                stack.callback(self.root.get_submodule(name).register_forward_hook(hook).remove)
            return float(METRIC(self.root(self.corrupted, use_cache=False).logits[:, -1])[0])


def _first(value: Any) -> torch.Tensor:
    return value[0] if isinstance(value, tuple) else value


def _with_first(value: Any, tensor: torch.Tensor) -> Any:
    return (tensor, *value[1:]) if isinstance(value, tuple) else tensor


def _timed(way: Callable[[], Any]) -> float:
    start = time.process_time()
    way()
    return time.process_time() - start


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder with a checkpoint; random weights in a Llama-like shape otherwise")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=1)
    parser.add_argument("--sample", type=int, default=8, help="cells that hooks are timed on")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=["sweep", "direct", "qkv"], help="one way alone, for its peak memory")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = ns.load(chosen.model) if chosen.model else ns.load(llama().eval(), tokenizer=tokenizer(256))
    tower, size = ns.Atlas.of(model).tower(), (chosen.pairs, chosen.tokens)
    layers, heads, later = tower.n_layers, tower.blocks[0].n_heads, 2 * tower.n_layers // 3
    clean = torch.randint(10, model._module.config.vocab_size, size)
    corrupted = clean.clone()
    corrupted[:, 2:] = torch.randint(10, model._module.config.vocab_size, (chosen.pairs, chosen.tokens - 2))
    qkv = [f"layers[{later}].heads[:].q", f"layers[{later}].groups[:].k", f"layers[{later}].groups[:].v"]
    before = f"layers[0:{later}].heads[:]"

    def sweep(sites: str) -> Any:
        plan = ns.plan_sweep(model, clean, corrupted, sites, METRIC, together=True)
        return ns.run(plan, model, progress=False)

    ways: dict[str, tuple[Callable[[], Any], int]] = {
        "sweep": (lambda: sweep(HEADS), layers * heads),
        "direct": (
            lambda: ns.path_patch(model, clean, corrupted, HEADS, "unembed", METRIC, progress=False),
            layers * heads,
        ),
        "qkv": (
            lambda: ns.path_patch(model, clean, corrupted, before, qkv, METRIC, progress=False),
            later * heads,
        ),
    }
    print(machine())
    if chosen.only:
        start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        ways[chosen.only][0]()
        print(f"{chosen.only}: {start / 1024:.0f} MB before, {resource.getrusage(0).ru_maxrss / 1024:.0f} MB at most")
        return
    hooks = Hooks(model, clean[:1], corrupted[:1], later)
    cells = [(layer, head) for layer in range(later) for head in range(heads)]
    cells = cells[:: max(len(cells) // chosen.sample, 1)][: chosen.sample]
    spent: dict[str, list[float]] = {}
    for round_ in range(chosen.rounds + 1):
        for name, (way, count) in ways.items():
            seconds = _timed(way) / count / chosen.pairs
            if round_:  # the first is probed and warmed
                spent.setdefault(name, []).append(seconds)
        for name, direct in (("hooks, direct", True), ("hooks, qkv", False)):
            seconds = _timed(lambda direct=direct: [hooks.one(*cell, direct) for cell in cells]) / len(cells)
            if round_:
                spent.setdefault(name, []).append(seconds)
    print(f"{layers} layers, {heads} heads, {chosen.tokens} tokens, {chosen.pairs} pairs; milliseconds of CPU a cell")
    print(f"{'':24}{'ms':>9}{'x a sweep':>12}{'hooks / it':>12}")
    for name, column in spent.items():
        to_sweep = statistics.median(a / b for a, b in zip(column, spent["sweep"], strict=True))
        rival = spent.get(f"hooks, {name}")
        gain = statistics.median(a / b for a, b in zip(rival, column, strict=True)) if rival else float("nan")
        print(f"{name:24}{1000 * statistics.median(column):9.2f}{to_sweep:12.2f}{gain:12.1f}")


if __name__ == "__main__":
    main()
