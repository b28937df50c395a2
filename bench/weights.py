"""What masks cost: every head of a model of 7B shape, all of them alive at once; and a sweep of weights.

python -m bench.weights            both tables
python -m bench.weights --quick    a smaller sweep
"""

from __future__ import annotations

import argparse
import copy
import resource
import subprocess
import sys
import time
from typing import Any

import torch
import transformers as hf

import nnsplice as ns
from bench.activations import tokenizer
from bench.timing import machine

#: Restrictions of one kind, by their number of layers and heads.
SHAPE = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}


def peak() -> float:
    """The most memory that this process ever held, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def masks() -> None:
    """Every head's masks of a 7B-shaped model on the meta device."""
    with torch.device("meta"):
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**SHAPE))
    parameters = sum(p.numel() for p in model.parameters())
    ns.weights.create_param_masks(model, "l0h0")  # imports and the reading of the model are not the masks' cost
    before, start = peak(), time.process_time()
    held = [ns.weights.create_param_masks(model, f"l{layer}h{head}") for layer in range(32) for head in range(32)]
    spent, grown = time.process_time() - start, peak() - before
    tensors = [mask for one in held for mask in one.values() if mask is not None]
    own = sum(mask.untyped_storage().nbytes() for mask in tensors) / 2**20
    dense = sum(mask.numel() for mask in tensors) / 2**30
    start = time.process_time()
    selections = [ns.weights.select(model, f"l{layer}h{head}") for layer in range(32) for head in range(32)]
    union = selections[0]
    for selection in selections[1:]:
        union = union | selection
    algebra = time.process_time() - start
    print(f"{parameters / 1e9:.2f}B parameters, {len(held)} heads, {len(tensors)} masks")
    print(f"masks            {spent:7.2f} s CPU   {own:8.1f} MB held   {grown:8.1f} MB more at the peak   "
          f"(dense: {dense:.0f} GB)")  # fmt: skip
    print(f"selections, union {algebra:6.2f} s CPU   {union.numel():,} numbers")


def sweep(layers: int, width: int) -> None:
    """A grid of layer by head, against a run of the whole model for each cell."""
    torch.manual_seed(0)
    config = hf.GPT2Config(n_embd=width, n_layer=layers, n_head=8, vocab_size=1000, n_positions=64,
                           bos_token_id=1, eos_token_id=1)  # fmt: skip
    model = ns.load(hf.GPT2LMHeadModel(config).eval(), tokenizer=tokenizer(1000))
    tuned: Any = copy.deepcopy(model._module)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    ids = torch.randint(10, 1000, (4, 32))
    metric = ns.logit_diff(3, 4)
    start = time.process_time()
    result = ns.sweep_weights(model, tuned, ids, "layers[:].heads[:]", metric, progress=False)
    spent = time.process_time() - start
    module = model._module
    start = time.process_time()
    with torch.no_grad():
        for _ in range(8):
            module(ids, use_cache=False)
    one = (time.process_time() - start) / 8
    cells = len(result.cells)
    print(f"\nGPT-2 of {layers} layers, width {width}: {cells} cells, 4 prompts of 32 tokens")
    print(f"ns.sweep_weights            {spent:6.2f} s CPU")
    print(f"one whole run for each cell {one * cells:6.2f} s CPU, without exchanging any weights")
    print(f"blocks run: {result.run.block_calls} of {cells * layers}")


def main(arguments: list[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller sweep")
    parser.add_argument("--masks", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if chosen.masks:
        masks()
        return
    print(machine())
    # In a process of its own: the peak is that of a whole process.
    subprocess.run([sys.executable, "-m", "bench.weights", "--masks"], check=True)
    sweep(*((6, 128) if chosen.quick else (12, 512)))


if __name__ == "__main__":
    main()
