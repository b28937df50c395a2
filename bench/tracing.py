"""What a causal trace costs beside ROME's own way: hooks, and for each cell one batch of the clean and the noised rows.

    python -m bench.tracing                    a Llama-like shape, random weights
    python -m bench.tracing --model FOLDER     a checkpoint of one's own
    python -m bench.tracing --tokens 24 --starts 1 8 16

A cell is a layer and a token, and its number the mean over the noised samples. The experiment of ROME runs the whole
batch for every cell, with the state of its first row restored in all others. The farther back the subject stands, the
more of these cells lie before it, where nothing is noised: they are known. A sample of cells is timed and scaled;
`ns.causal_trace` runs whole. CPU seconds of this process, the ways in turns, medians over the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from contextlib import ExitStack
from typing import Any

import torch

import nnsplice as ns
from bench.activations import tokenizer
from bench.sweeps import cells, llama
from bench.timing import machine


def rome(model: Any, ids: torch.Tensor, subject: tuple[int, int], noise: torch.Tensor, some: list[tuple[int, int]]):
    """The mean probability of the clean run's first token in each of these cells."""
    root, (start, stop) = model._module, subject
    tower = ns.Atlas.of(model).tower()
    blocks = [root.get_submodule(block.module) for block in tower.blocks]
    batch = ids.repeat(len(noise) + 1, 1)

    def drown(_module: Any, _args: Any, out: torch.Tensor) -> torch.Tensor:
        out = out.clone()
        out[1:, start:stop] += noise.to(out)
        return out

    def restore(position: int) -> Any:
        def hook(_module: Any, _args: Any, out: Any) -> Any:
            new = (out[0] if isinstance(out, tuple) else out).clone()
            new[1:, position] = new[:1, position]
            return (new, *out[1:]) if isinstance(out, tuple) else new

        return hook

    found = []
    with torch.no_grad():
        answer = int(root(ids, use_cache=False).logits[0, -1].argmax())
        for layer, position in some:
            with ExitStack() as stack:
                stack.callback(root.get_input_embeddings().register_forward_hook(drown).remove)
                stack.callback(blocks[layer].register_forward_hook(restore(position)).remove)
                logits = root(batch, use_cache=False).logits
                found.append(float(logits[1:, -1].softmax(-1)[:, answer].mean()))
    return found


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder with a checkpoint; random weights in a Llama-like shape otherwise")
    parser.add_argument("--tokens", type=int, default=12)
    parser.add_argument("--subject", type=int, default=3, help="how many tokens it has")
    parser.add_argument("--starts", type=int, nargs="+", default=[1, 5], help="where it stands")
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--sample", type=int, default=8, help="cells that hooks are timed on")
    parser.add_argument("--rounds", type=int, default=3)
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = ns.load(chosen.model) if chosen.model else ns.load(llama().eval(), tokenizer=tokenizer(256))
    config, layers = model._module.config, ns.Atlas.of(model).tower().n_layers
    ids = torch.randint(10, config.vocab_size, (1, chosen.tokens))
    some = cells(layers, chosen.tokens, chosen.sample)
    print(machine())
    print(
        f"{layers} layers, {chosen.tokens} tokens, a subject of {chosen.subject}, {chosen.samples} samples; CPU seconds"
    )
    print(f"{'':22}{'ROME':>9}{'trace':>9}{'x':>7}{'off':>10}")
    for start in chosen.starts:
        subject = (start, start + chosen.subject)
        noise = torch.randn(chosen.samples, chosen.subject, config.hidden_size) * 0.1

        def trace(subject: tuple[int, int] = subject, noise: torch.Tensor = noise) -> Any:
            return ns.causal_trace(model, ids, subject, noise=noise, progress=False)

        grid = trace().grid()  # probed and warmed
        spent: dict[str, list[float]] = {"rome": [], "trace": []}
        found: list[float] = []
        for _ in range(chosen.rounds):
            at = time.process_time()
            found = rome(model, ids, subject, noise, some)
            spent["rome"].append((time.process_time() - at) / len(some) * layers * chosen.tokens)
            at = time.process_time()
            trace()
            spent["trace"].append(time.process_time() - at)
        ratio = statistics.median(a / b for a, b in zip(spent["rome"], spent["trace"], strict=True))
        off = max(abs(a - float(grid[0, layer, at])) for a, (layer, at) in zip(found, some, strict=True))
        seconds = [statistics.median(spent[name]) for name in ("rome", "trace")]
        print(f"{f'subject at {start}':22}{seconds[0]:9.2f}{seconds[1]:9.2f}{ratio:7.1f}{off:10.1e}")


if __name__ == "__main__":
    main()
