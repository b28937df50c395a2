"""What the same sweep costs in other packages, in an environment of their own.

    OTHER/bin/python bench/peers.py --tokens 20          prints one line of JSON
    python -m bench.sweeps --peers OTHER/bin/python      runs it, and puts it into the table

This file knows nothing of nnsplice. Beside each package it times bare torch hooks on the same model, so that times of
two environments can be linked: what counts is how many times the hooks' time a package takes.

GPT-2-small's shape, random weights, float32: one pair, every block input at every position, the difference of two
logits. TransformerLens (3 or 4) runs its own `generic_activation_patch`; pyvene an intervention for each cell, from a
source that is run once a cell (its default) or given as a tensor.
"""

from __future__ import annotations

# pyright: reportMissingImports=false, reportCallIssue=false
import argparse
import json
import sys
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch
import transformers as hf

Run = Callable[[], object]


def config() -> Any:
    return hf.GPT2Config(bos_token_id=1, eos_token_id=1, attn_implementation="sdpa")


def by_hooks(model: Any, clean: torch.Tensor, corrupted: torch.Tensor, cells: list[tuple[int, int]]) -> Run:
    kept: dict[int, torch.Tensor] = {}
    blocks = model.transformer.h
    hooks = [
        block.register_forward_pre_hook(lambda _m, args, n=n: kept.__setitem__(n, args[0]))
        for n, block in enumerate(blocks)
    ]
    model(clean)
    for hook in hooks:
        hook.remove()

    def run() -> None:
        for layer, position in cells:

            def patch(_module: Any, args: Any, layer: int = layer, position: int = position) -> Any:
                new = args[0].clone()
                new[:, position] = kept[layer][:, position]
                return (new, *args[1:])

            hook = blocks[layer].register_forward_pre_hook(patch)
            logits = model(corrupted).logits[0, -1]
            float(logits[5] - logits[7])
            hook.remove()

    return run


def by_lens(model: Any, clean: torch.Tensor, corrupted: torch.Tensor, positions: list[int]) -> Run:
    import pandas as pd
    from transformer_lens import patching

    layers = model.config.n_layer
    lens = _lens(model)
    _, cache = lens.run_with_cache(clean)
    rows = [{"layer": layer, "pos": position} for layer in range(layers) for position in positions]

    def run() -> None:
        patching.generic_activation_patch(
            lens, corrupted, cache, lambda logits: logits[0, -1, 5] - logits[0, -1, 7],
            patching.layer_pos_patch_setter, "resid_pre", index_df=pd.DataFrame(rows),
        )  # fmt: skip

    return run


def _lens(model: Any) -> Any:
    if metadata.version("transformer-lens") >= "4":
        from transformer_lens.model_bridge.sources import build_bridge_from_module

        return build_bridge_from_module(model, "GPT2LMHeadModel", hf_config=model.config).eval()
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    heads, width = model.config.n_head, model.config.n_embd
    return HookedTransformer(
        HookedTransformerConfig(
            n_layers=model.config.n_layer, d_model=width, d_head=width // heads, n_heads=heads, n_ctx=1024,
            act_fn="gelu_new", d_vocab=model.config.vocab_size, normalization_type="LN",
        )
    ).eval()  # fmt: skip


def by_pyvene(
    model: Any, clean: torch.Tensor, corrupted: torch.Tensor, cells: list[tuple[int, int]], *, given: bool
) -> Run:
    import pyvene

    kept: dict[int, torch.Tensor] = {}
    hooks = [
        block.register_forward_pre_hook(lambda _m, args, n=n: kept.__setitem__(n, args[0]))
        for n, block in enumerate(model.transformer.h)
    ]
    model(clean)
    for hook in hooks:
        hook.remove()

    def run() -> None:
        for layer, position in cells:
            kind = {"layer": layer, "component": "block_input", "intervention_type": pyvene.VanillaIntervention}
            whole = pyvene.IntervenableModel(pyvene.IntervenableConfig([kind]), model)
            if given:
                name = next(iter(whole.interventions))
                sources: Any = {"source_representations": {name: kept[layer][:, position]}}
            else:
                sources = {"sources": [{"input_ids": clean}]}
            _, out = whole({"input_ids": corrupted}, unit_locations={"sources->base": position}, **sources)
            float(out.logits[0, -1, 5] - out.logits[0, -1, 7])

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = hf.GPT2LMHeadModel(config()).eval()
    clean, corrupted = (torch.randint(10, model.config.vocab_size, (1, chosen.tokens)) for _ in range(2))
    layers = model.config.n_layer
    # One position of every layer is a fair sample: what a cell costs does not depend on where it is.
    cells = [(layer, chosen.tokens // 2) for layer in range(layers)]
    ways: dict[str, Run] = {"hooks": by_hooks(model, clean, corrupted, cells)}
    with torch.no_grad():
        for name, make in (
            ("TransformerLens", lambda: by_lens(model, clean, corrupted, [chosen.tokens // 2])),
            ("pyvene", lambda: by_pyvene(model, clean, corrupted, cells, given=False)),
            ("pyvene, source given", lambda: by_pyvene(model, clean, corrupted, cells, given=True)),
        ):
            try:
                ways[name] = make()
                ways[name]()
            except Exception as error:  # whatever keeps a package from running here is told, and the others are timed
                ways.pop(name, None)
                print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(chosen.rounds):
            for name, run in ways.items():
                start = time.process_time()
                run()
                seconds[name].append((time.process_time() - start) / len(cells))
    packages = {package.metadata["Name"].lower(): package.version for package in metadata.distributions()}
    versions = {name: packages[name] for name in ("transformers", "transformer-lens", "pyvene") if name in packages}
    print(json.dumps({"seconds per cell": seconds, "versions": versions}))


if __name__ == "__main__":
    main()
