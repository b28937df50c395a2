"""Measure that neurons and experts add up to the MLP's output."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from nnsplice import engine
from nnsplice.atlas import Atlas, Block, Tower, text_config, unwrap
from nnsplice.closures.pass_values import Arguments, PassValues
from nnsplice.closures.promises import Closure, gap, tolerance


def neurons(tower: Tower, block: Block, recorded: PassValues) -> Iterator[Closure]:
    """The output of the last matrix is the output of the MLP, up to a factor."""
    made = recorded.at(block.down, "passed", block.occurrence)
    if made is None or block.is_sparse:
        return
    ends = [recorded.at(block.mlp_added, end, block.occurrence) for end in ("output", "given")]
    ends.append(None if block.mlp_is_bare else recorded.at(block.mlp, "output", block.occurrence))
    found = [gap([made * _factor(made, end)], end) for end in ends if end is not None and end.shape == made.shape]
    if found:  # else there is no output of the MLP to compare with
        text = f"{block.down} does not make what the MLP makes"
        yield Closure("neurons", tower.name, block.index, min(found), tolerance(made), text)


def _factor(made: Tensor, end: Tensor) -> float:
    a, b = made.double().flatten(), end.double().flatten()
    factor = float((a @ b) / (a @ a).clamp_min(1e-300))
    return 1.0 if abs(factor - 1) < 1e-2 else factor


def experts(tower: Tower, block: Block, calls: Mapping[tuple[str, int], Arguments], model: object) -> Iterator[Closure]:
    """The experts with even numbers and those with odd numbers add up to the output of all experts.

    Yields nothing if the module is not called with the chosen experts and their weights: sites of single experts are
    refused elsewhere then.
    """
    if block.experts is None or block.experts_are_modules:
        return
    args, kwargs = calls.get((block.experts, block.occurrence), ((), {}))
    given = [*args, *kwargs.values()]
    if len(given) != 3 or not all(isinstance(value, Tensor) for value in given) or given[1].is_floating_point():
        return
    tokens, numbers, weights = given
    if numbers.shape != weights.shape:
        return
    module = engine.callable_of(model, block.experts)
    zero = torch.zeros_like(weights)
    even, odd = (module(tokens, numbers, torch.where(numbers % 2 == rest, weights, zero)) for rest in (0, 1))
    whole = module(tokens, numbers, weights)
    size = float(whole.double().abs().max().clamp_min(1e-300))
    missed = float((even.double() + odd.double() - whole.double()).abs().max()) / size
    found = "even and odd ones do not make all"
    yield Closure("experts", tower.name, block.index, missed, tolerance(whole, weights, computed=True), found)


def share_of_experts(model: object) -> float:
    """The cost of `experts` in all layers, in forward passes: three calls of each module of experts.

    Estimated by the sizes of matrices; of the experts, those of one token count.
    """
    root = unwrap(model)
    one, whole = 0.0, float(sum(p.numel() for p in root.parameters() if p.dim() > 1))
    chosen = getattr(text_config(root), "num_experts_per_tok", None) or 1
    for tower in Atlas.of(root).towers.values():
        for block in tower.blocks:
            if block.experts is not None and not block.experts_are_modules:
                own = sum(p.numel() for p in root.get_submodule(block.experts).parameters())
                used = own * min(chosen / max(block.n_experts, 1), 1.0)
                one, whole = one + used, whole - own + used
    return 3 * one / whole if whole else 0.0
