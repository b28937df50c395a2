"""What an exhaustive patching sweep costs: every block output at every position, one pair of prompts.

    python -m bench.sweeps                        the table: GPT-2-small's shape and a Llama-like one, 20 tokens
    python -m bench.sweeps --tokens 192           a long prompt
    python -m bench.sweeps --common 10            pairs that begin with 10 equal tokens
    python -m bench.sweeps --peers OTHER/bin/python    with packages that live in an environment of their own

Naive ways run one forward for each cell, so a sample of cells is timed and scaled; nnsplice's sweeps run whole, with
everything that `ns.sweep` does: plan, clean and corrupted runs, metric, result. With a GPU the same is timed there.

The floor is the least work that gives all cells exactly: what a change can reach and nothing else, a clean and a
corrupted run, at the speed of one large matrix product measured in the same rounds.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers as hf

import nnsplice as ns
from bench.activations import tokenizer
from bench.timing import machine

METRIC = ns.logit_diff(5, 7)


def gpt2() -> Any:
    """GPT-2-small's shape."""
    return hf.GPT2LMHeadModel(hf.GPT2Config(bos_token_id=1, eos_token_id=1))


def llama() -> Any:
    """A Llama-like decoder of 67M parameters with grouped queries."""
    config = hf.LlamaConfig(
        vocab_size=32000, hidden_size=512, intermediate_size=1536, num_hidden_layers=12, num_attention_heads=8,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    return hf.LlamaForCausalLM(config)


def cells(layers: int, tokens: int, sample: int) -> list[tuple[int, int]]:
    """Some of the cells, spread over the grid."""
    every = [(layer, position) for layer in range(layers) for position in range(tokens)]
    return every[:: max(len(every) // sample, 1)][:sample]


def by_hooks(model: Any, clean: torch.Tensor, corrupted: torch.Tensor, sample: int) -> float:
    """Torch hooks, one forward for each cell; seconds for the whole grid."""
    module, blocks = model._module, _blocks(model)
    kept: dict[int, torch.Tensor] = {}
    hooks = [
        b.register_forward_hook(lambda _m, _a, o, n=n: kept.__setitem__(n, _first(o))) for n, b in enumerate(blocks)
    ]
    module(clean)
    for hook in hooks:
        hook.remove()

    def one(layer: int, position: int) -> None:
        def patch(_module: Any, _args: Any, out: Any) -> Any:
            new = _first(out).clone()
            new[:, position] = kept[layer][:, position]
            return (new, *out[1:]) if isinstance(out, tuple) else new

        hook = blocks[layer].register_forward_hook(patch)
        METRIC(module(corrupted).logits[:, -1])
        hook.remove()

    return _scaled(one, len(blocks), clean.shape[1], sample)


def by_nnsight(model: Any, clean: torch.Tensor, corrupted: torch.Tensor, sample: int) -> float:
    """nnsight, one trace for each cell; seconds for the whole grid."""
    saved = ns.capture(model, clean, "layers[:].output[:]")
    stack = [saved[f"layers[{layer}].output[:]"] for layer in range(len(_blocks(model)))]
    envoys = [_envoy(model, layer) for layer in range(len(stack))]

    def one(layer: int, position: int) -> None:
        envoy = envoys[layer]
        with model.trace(input_ids=corrupted):
            new = envoy.output.clone()
            new[:, position] = stack[layer][:, position]
            envoy.output = new
            logits = model.output.logits[:, -1].save()
        METRIC(logits)

    return _scaled(one, len(stack), clean.shape[1], sample)


def _scaled(one: Callable[[int, int], None], layers: int, tokens: int, sample: int) -> float:
    chosen = cells(layers, tokens, sample)
    one(*chosen[0])
    start = _clock()
    for layer, position in chosen:
        one(layer, position)
    return (_clock() - start) / len(chosen) * layers * tokens


def by_sweep(
    model: Any, clean: torch.Tensor, corrupted: torch.Tensor, executor: str, flops: list[float] | None = None
) -> float:
    """`ns.sweep`, whole; seconds. The operations that it tells are added to `flops`."""
    start = _clock()
    result = ns.sweep(model, clean, corrupted, "layers[:].output[:]", METRIC, executor=executor, progress=False)
    spent = _clock() - start
    if flops is not None:
        flops.append(result.run.flops)
    return spent


def first_sweep(model: Any, clean: torch.Tensor, corrupted: torch.Tensor, flops: list[float]) -> float:
    """`ns.sweep` as it is called, of a model of which nothing is known yet; seconds."""
    new = ns.load(copy.deepcopy(model._module), tokenizer=tokenizer(256))
    return by_sweep(new, clean, corrupted, "auto", flops)


def _clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def _blocks(model: Any) -> list[Any]:
    return [model._module.get_submodule(block.module) for block in ns.Atlas.of(model).towers["decoder"].blocks]


def _envoy(model: Any, layer: int) -> Any:
    name = ns.Atlas.of(model).towers["decoder"].blocks[layer].module
    return model.get(name)


def _first(value: Any) -> torch.Tensor:
    return value[0] if isinstance(value, tuple) else value


def floor(model: Any, tokens: int, common: int) -> float:
    """The fewest operations, in FLOP: of a block's matrices only what a changed token needs.

    A cell at layer l and token p changes p alone in the queries, keys and values of layer l + 1, every token from p on
    behind that, and in the last layer keys and values of those, and the one token that is read. The scores of attention
    and the unembedding are left out, so the true floor is a little higher.
    """
    root, (block, *_) = model._module, ns.Atlas.of(model).towers["decoder"].blocks
    layers, changed = len(_blocks(model)), tokens - common

    def flop(name: str | None) -> int:
        return 0 if name is None else 2 * sum(p.numel() for p in root.get_submodule(name).parameters() if p.dim() == 2)

    whole = flop(block.module)
    queries, keys = (flop(n) for n in (block.q, block.k)) if block.q else (flop(block.fused) // 3,) * 2
    inputs, suffixes = queries + 2 * keys, changed * (changed + 1) // 2
    cost = 2 * layers * tokens * whole
    for layer in range(layers - 1):
        through = layers - 2 - layer  # blocks behind it but the last
        cost += through * suffixes * whole + (suffixes * 2 * keys + changed * (whole - 2 * keys))
        cost -= (suffixes - changed) * (inputs if through else 2 * keys)
    return cost


def peak() -> float:
    """FLOP a second of one large matrix product."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a, b = torch.randn(2048, 1024, device=device), torch.randn(1024, 4096, device=device)
    a @ b
    start = _clock()
    for _ in range(3):
        a @ b
    return 3 * 2 * 2048 * 1024 * 4096 / (_clock() - start)


def peers(python: str, tokens: int, rounds: int) -> dict[str, float]:
    """How many times the time of torch hooks other packages take, measured in their own environment."""
    command = [python, "bench/peers.py", "--tokens", str(tokens), "--rounds", str(rounds)]
    told = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
    print("peers:", ", ".join(f"{name} {version}" for name, version in told["versions"].items()))
    seconds = told["seconds per cell"]
    hooks = seconds.pop("hooks")
    return {
        name: statistics.median(a / b for a, b in zip(spent, hooks, strict=True)) for name, spent in seconds.items()
    }


def table(build: Callable[[], Any], chosen: argparse.Namespace, times: dict[str, float]) -> None:
    """Time every way in turn, some rounds, and print medians and ratios."""
    tokens, common, sample = chosen.tokens, chosen.common, chosen.sample
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = ns.load(build().eval().to(device), tokenizer=tokenizer(256))
    root: Any = model._module
    vocabulary = root.config.vocab_size
    clean, corrupted = (torch.randint(10, vocabulary, (1, tokens), device=device) for _ in range(2))
    flops: dict[str, list[float]] = {"packed": [], "first": []}
    ways: dict[str, Callable[[], float]] = {
        "nnsight, one trace per cell": lambda: by_nnsight(model, clean, corrupted, sample),
        "torch hooks, one forward per cell": lambda: by_hooks(model, clean, corrupted, sample),
        "ns.sweep, batched": lambda: by_sweep(model, clean, corrupted, "batched"),
        "ns.sweep, packed": lambda: by_sweep(model, clean, corrupted, "packed", flops["packed"]),
        "ns.sweep, the first of a model": lambda: first_sweep(model, clean, corrupted, flops["first"]),
    }
    corrupted[:, :common] = clean[:, :common]
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    speeds: list[float] = []
    with torch.no_grad():
        ns.sweep(model, clean, corrupted, "layers[:].output[:]", METRIC, progress=False)  # probed and warm
        for _ in range(chosen.rounds):
            for name, way in ways.items():
                speeds.append(peak())
                seconds[name].append(way())
    base, hooks = seconds["nnsight, one trace per cell"], seconds["torch hooks, one forward per cell"]
    speed = statistics.median(speeds)
    least = floor(model, tokens, common) / speed
    parameters = sum(parameter.numel() for parameter in model._module.parameters())
    name, count = type(model._module).__name__, len(_blocks(model)) * tokens
    shared = f", the first {common} of a pair equal" if common else ""
    print(f"\n{name}, {parameters / 1e6:.0f}M, {tokens} tokens{shared}, {count} cells, {speed / 1e9:.0f} GFLOP/s")
    print(f"{'':36}{'seconds':>9}{'times faster':>14}")
    for peer, ratio in times.items():
        spent = statistics.median(hooks) * ratio
        print(f"{peer:36}{spent:9.2f}{statistics.median(base) / spent:14.2f}")
    for name, spent in seconds.items():
        gain = statistics.median(a / b for a, b in zip(base, spent, strict=True))
        print(f"{name:36}{statistics.median(spent):9.2f}{gain:14.2f}")
    packed = statistics.median(seconds["ns.sweep, packed"])
    first = statistics.median(seconds["ns.sweep, the first of a model"])
    more = flops["first"][0] / flops["packed"][0]
    print(f"{'the first / a plain packed run':36}{first / packed:9.2f}{'':14}   {more:.2f} times its operations")
    above = flops["packed"][0] / floor(model, tokens, common)
    print(f"{'its operations / those of the floor':36}{above:9.2f}")
    print(f"{'the floor':36}{least:9.2f}{statistics.median(base) / least:14.2f}   packed reaches {least / packed:.0%}")


def main(arguments: list[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sample", type=int, default=12, help="cells that the naive ways are timed on")
    parser.add_argument("--common", type=int, default=0, help="how many tokens both prompts begin with")
    parser.add_argument("--peers", help="a Python that has TransformerLens or pyvene")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print(machine())
    # Their shape is GPT-2's; how many times the hooks' time they take is what carries over.
    times = peers(chosen.peers, chosen.tokens, chosen.rounds) if chosen.peers else {}
    for build in (gpt2, llama):
        table(build, chosen, times if build is gpt2 else {})


if __name__ == "__main__":
    main()
