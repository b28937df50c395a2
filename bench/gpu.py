"""What nnsplice takes on a GPU: seconds, peak memory, and the share of what the card's own matrix products reach.

    python -m bench.gpu                          GPT-2-small, SmolLM2-135M, and Llamas of 1B and 8B in bf16
    python -m bench.gpu --shapes gpt2 --tokens 128
    python -m bench.gpu --device cpu --shapes tiny    that it runs, where there is no GPU

Weights are random, so nothing is downloaded. A sweep is of every block's output at every token of one pair of prompts;
the two naive ways run one forward for each cell, so some cells are timed and scaled. Operations are those that results
count: a run that packs saves operations, so its share of the card can be low and its time too.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf

import nnsplice as ns
from bench.activations import tokenizer
from bench.sweeps import METRIC, by_hooks, by_nnsight
from bench.timing import machine

_TOKENS = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}


def _llama(width: int, inner: int, layers: int, heads: int, groups: int, vocabulary: int) -> hf.LlamaConfig:
    return hf.LlamaConfig(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=groups, vocab_size=vocabulary, max_position_embeddings=2048, **_TOKENS,
    )  # fmt: skip


#: Name -> its config, and the dtype it is measured in.
SHAPES: Mapping[str, tuple[Callable[[], Any], torch.dtype]] = {
    "gpt2": (lambda: hf.GPT2Config(**_TOKENS), torch.float32),
    "smollm2-135m": (lambda: _llama(576, 1536, 30, 9, 3, 49152), torch.float32),
    "llama-1b": (lambda: _llama(2048, 8192, 16, 32, 8, 128256), torch.bfloat16),
    "llama-8b": (lambda: _llama(4096, 14336, 32, 32, 8, 128256), torch.bfloat16),
    "tiny": (lambda: _llama(64, 128, 2, 4, 2, 300), torch.float32),
}
GENERATED = 32


@dataclass(frozen=True)
class Measured:
    """One way of doing something, in the middle of some rounds."""

    seconds: float
    #: Bytes beside the model's own; nothing where they are not counted.
    peak: int | None
    #: Operations, where a result counts them.
    flops: float | None


class Clock:
    """Seconds and bytes of one device: by its own events where it has them."""

    def __init__(self, device: torch.device, rounds: int) -> None:
        self.device, self.rounds, self.counts = device, rounds, device.type == "cuda"

    def __call__(self, way: Callable[[], Any]) -> Measured:
        """Run a way once for warmth, then some rounds."""
        made = way()
        seconds, peaks = [], []
        for _ in range(self.rounds):
            if self.counts:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                made = way()
                stop.record()
                torch.cuda.synchronize()
                seconds.append(start.elapsed_time(stop) / 1000)
                peaks.append(torch.cuda.max_memory_allocated() - before)
            else:
                begun = time.perf_counter()
                made = way()
                seconds.append(time.perf_counter() - begun)
        run = getattr(made, "run", None)
        return Measured(statistics.median(seconds), max(peaks) if peaks else None, getattr(run, "flops", None))


def reached(clock: Clock, dtype: torch.dtype) -> float:
    """The operations a second of one large product of matrices."""
    size = 8192 if clock.counts else 512
    a, b = (torch.randn(size, size, device=clock.device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / clock(lambda: a @ b).seconds


def build(name: str, device: torch.device) -> Any:
    """A model of random weights, made where it runs."""
    make, dtype = SHAPES[name]
    config, before = make(), torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with device:
            module = hf.AutoModelForCausalLM.from_config(config).eval()
    finally:
        torch.set_default_dtype(before)
    module.generation_config.eos_token_id = None
    return ns.load(module, tokenizer=tokenizer(256))


def ways(model: Any, tokens: int, sample: int) -> dict[str, Callable[[Clock], Measured]]:
    """What is measured, by name."""
    device, module = model.device, model._module
    made = torch.Generator().manual_seed(0)
    clean, corrupted = (torch.randint(10, 250, (1, tokens), generator=made).to(device) for _ in range(2))
    layers = len(ns.Atlas.of(model).towers["decoder"].blocks)
    vector = ns.capture(model, clean, f"layers[{layers // 2}].output[-1]")

    def naive(way: Callable[..., float]) -> Callable[[Clock], Measured]:
        """Those time themselves, on some of the cells."""

        def measure(clock: Clock) -> Measured:
            with torch.no_grad():
                found = [way(model, clean, corrupted, sample) for _ in range(clock.rounds)]
            return Measured(statistics.median(found), None, None)

        return measure

    def swept(executor: str) -> Callable[[Clock], Measured]:
        return lambda clock: clock(
            lambda: ns.sweep(model, clean, corrupted, "layers[:].output[:]", METRIC, executor=executor, progress=False)
        )

    def steered() -> None:
        with ns.steering.steer(model, vector, 2.0):
            module.generate(
                clean, attention_mask=torch.ones_like(clean), max_new_tokens=GENERATED, do_sample=False, pad_token_id=0
            )

    return {
        "nnsight, one trace per cell": naive(by_nnsight),
        "torch hooks, one forward per cell": naive(by_hooks),
        "ns.sweep, batched": swept("batched"),
        "ns.sweep, packed": swept("packed"),
        "ns.attribute, heads": lambda clock: clock(
            lambda: ns.attribute(
                model, clean, corrupted, "layers[:].heads[:].output", METRIC, method="atp", progress=False
            )
        ),
        "ns.capture, every block": lambda clock: clock(lambda: ns.capture(model, clean, "layers[:].output[:]")),
        f"steered, {GENERATED} tokens": lambda clock: clock(steered),
    }


def table(name: str, chosen: argparse.Namespace) -> None:
    """Measure one shape and print its rows."""
    device = torch.device(chosen.device)
    clock, dtype = Clock(device, chosen.rounds), SHAPES[name][1]
    speed = reached(clock, dtype)
    model = build(name, device)
    size = sum(parameter.numel() for parameter in model._module.parameters())
    print(
        f"\n{name}, {size / 1e6:.1f}M in {str(dtype)[6:]}, {chosen.tokens} tokens, {speed / 1e12:.2f} TFLOP/s reached"
    )
    print(f"{'':36}{'seconds':>10}{'peak MB':>10}{'share':>8}")
    for way, measure in ways(model, chosen.tokens, chosen.sample).items():
        found = measure(clock)
        peak = "" if found.peak is None else f"{found.peak / 1e6:.0f}"
        share = "" if found.flops is None else f"{found.flops / found.seconds / speed:.0%}"
        print(f"{way:36}{found.seconds:10.4f}{peak:>10}{share:>8}")


def main(arguments: list[str] | None = None) -> None:
    """Print the tables, with the card's name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=[name for name in SHAPES if name != "tiny"])
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sample", type=int, default=12, help="cells that the naive ways are timed on")
    chosen = parser.parse_args(arguments)
    on_gpu = torch.device(chosen.device).type == "cuda"
    if on_gpu and not torch.cuda.is_available():
        parser.exit(1, "there is no GPU here; --device cpu --shapes tiny shows that the table can be made\n")
    print(f"{torch.cuda.get_device_name(chosen.device)}, {machine()}" if on_gpu else machine())
    for name in chosen.shapes:
        table(name, chosen)


if __name__ == "__main__":
    main()
