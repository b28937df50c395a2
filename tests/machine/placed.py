"""Tiny models on the CPU, on one simulated GPU, or with their layers on two, by accelerate's own hooks."""

from __future__ import annotations

import warnings
from typing import Any

from accelerate import dispatch_model

import nnsplice as ns
import zoo
from nnsplice.atlas import Atlas

PLACES = ("cpu", "one", "split")


def split(module: Any) -> Any:
    """The first layer and what comes before it on the first device, the others and what comes after on the second.

    Weights that are tied stay together, so a head that is the embedding is on the first.
    """
    tower = Atlas.of(module).tower()
    blocks = {block.module: min(block.index, 1) for block in tower.blocks}
    tied = module.get_output_embeddings().weight is module.get_input_embeddings().weight
    late = {tower.final_norm, None if tied else tower.unembed}
    device_map: Any = dict(blocks)

    def fill(home: str) -> None:
        for name, _ in module.get_submodule(home).named_children():
            path = f"{home}.{name}".lstrip(".")
            if any(block.startswith(f"{path}.") for block in blocks):
                fill(path)
            elif path not in blocks:
                device_map[path] = int(path in late)

    fill("")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # accelerate says that tied weights are on one device, as they should be
        return dispatch_model(module, device_map, force_hooks=True)


def model(family: str, place: str, **overrides: Any) -> Any:
    """A model of the zoo in double precision, wrapped for nnsight."""
    module = zoo.build(family, **overrides).double()
    if place != "cpu":
        module = module.to("cuda:0") if place == "one" else split(module)
    return ns.load(module, tokenizer=zoo.tokenizer())
