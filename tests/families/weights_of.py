"""Are the masks of heads and groups the numbers that the model's own gradients say, and is none left out?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import nnsplice as ns
from families.subject import Subject, before, hooks
from nnsplice.atlas import Block


def judge_weights(subject: Subject) -> None:
    """Heads, groups and the ends of the model."""
    with subject.check("weights: embedding"):
        names = ns.weights.create_param_masks(subject.model, "embed")
        table = subject.bare.get_input_embeddings().weight
        held = [name for name in names if subject.bare.get_parameter(name).shape == table.shape]
        subject.claim("weights: embedding", any(subject.bare.get_parameter(name) is table for name in held),
                      f"{', '.join(names)} is not the token embedding")  # fmt: skip
    layers = [block for block in subject.blocks if block.has_attention]
    for block in layers:
        with subject.check("weights: heads", f"layer {block.index}"):
            _layer(subject, block)


def _layer(subject: Subject, block: Block) -> None:
    heads, groups = block.n_heads, block.n_kv
    masks = [ns.weights.create_param_masks(subject.model, f"l{block.index}h{head}") for head in range(max(heads, 1))]
    if block.o is None:
        return  # heads that are an axis of the parameters: tests/weights
    slots = _slots(subject, block)
    if not slots.requires_grad:
        subject.claim("weights: heads", False, f"layer {block.index}: the call that is read makes no gradients")
        return
    width = slots.shape[-1] // heads
    subject.claim("weights: heads", slots.shape[-1] == width * heads and heads % groups == 0,
                  f"{slots.shape[-1]} columns for {heads} heads in {groups} groups")  # fmt: skip
    parameters = _parameters(subject, block, masks)
    slices = [slots[:, head * width : (head + 1) * width] for head in range(heads)]
    needed = [_support(part, parameters) for part in slices]
    per_group = heads // groups
    keys, wrong, homeless, shared = block.projection("k"), [], set(), set()
    for name, parameter in parameters.items():
        if name.startswith(f"{block.o}."):
            continue
        needs = torch.stack([need[name] for need in needed])
        claims = torch.stack([_dense(mask, name, parameter) for mask in masks])
        of_groups = needs.reshape(groups, per_group, *parameter.shape).any(1).sum(0)
        missing = needs & ~claims
        own = missing & (of_groups == 1)
        if own.any():
            homeless.add(name)
        elif missing.any():
            shared.add(name)
        stray = claims & ~needs
        if stray.any() and name != f"{keys}.bias":
            wrong.append(f"{name}: {int(stray.sum())} numbers of the masks do nothing to their heads")
        subject.claim("weights: heads", not wrong, f"layer {block.index}: " + "; ".join(wrong[:2]))
    names = ", ".join(sorted(homeless)[:3])
    text = f"layer {block.index}: {names} is of single heads and in no head's mask"
    subject.claim("weights: no number of a head is left out", not homeless, text)
    _read(subject, block, masks, width)
    _one_head(subject, block, slices[0], parameters)


def _slots(subject: Subject, block: Block) -> Tensor:
    """What the output projection reads, `[token, columns]`, with its graph; norms let their input through."""
    bare, seen = subject.bare, []
    made = [before(bare.get_submodule(block.o), lambda x: seen.append(x))]
    with hooks(*made, *through(bare, block)):
        bare(subject.ids)
    return seen[block.occurrence].reshape(-1, seen[0].shape[-1])


def through(bare: nn.Module, block: Block) -> list[Any]:
    """Hooks that let the input of every norm inside the attention pass: one over all heads would mix them."""
    home = bare.get_submodule(block.attn) if block.attn else None

    def skip(_: nn.Module, args: tuple, out: Any) -> Any:
        return args[0] if isinstance(out, Tensor) and args and args[0].shape == out.shape else None

    inside = home.modules() if home is not None else ()
    return [module.register_forward_hook(skip) for module in inside if "Norm" in type(module).__name__]


def _parameters(subject: Subject, block: Block, masks: list[dict]) -> dict[str, nn.Parameter]:
    """All that stands under the attention module, and what the masks name beside it."""
    under = f"{block.attn}." if block.attn else None
    named = {name for mask in masks for name in mask}
    return {
        name: parameter
        for name, parameter in subject.bare.named_parameters()
        if parameter.is_floating_point() and (name in named or (under and name.startswith(under)))
    }


def _support(value: Tensor, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    weights = torch.randn(value.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(value)
    grads = torch.autograd.grad(
        (value * weights).sum(), list(parameters.values()), retain_graph=True, allow_unused=True
    )
    return {
        name: torch.zeros(p.shape, dtype=torch.bool) if grad is None else grad.ne(0)
        for (name, p), grad in zip(parameters.items(), grads, strict=True)
    }


def _dense(mask: dict[str, Tensor | None], name: str, parameter: nn.Parameter) -> Tensor:
    found = mask.get(name, torch.zeros(parameter.shape, dtype=torch.bool))
    return torch.ones(parameter.shape, dtype=torch.bool) if found is None else found


def _read(subject: Subject, block: Block, masks: list[dict], width: int) -> None:
    """The output projection's numbers that meet a head's columns are the head's."""
    assert block.o is not None
    projection = subject.bare.get_submodule(block.o)
    # By its first name, where layers share it.
    name = next(name for name, one in subject.bare.named_parameters() if one is projection.weight)
    columns = width * block.n_heads
    for head, mask in enumerate(masks):
        given = torch.zeros(3, columns).to(projection.weight)
        given[:, head * width : (head + 1) * width] = torch.randn(3, width).to(given)
        (grad,) = torch.autograd.grad(projection(given).square().sum(), [projection.weight])
        meets = grad.ne(0)
        subject.claim("weights: output projection", torch.equal(meets, _dense(mask, name, projection.weight)),
                      f"layer {block.index}, head {head}: other numbers of {name} meet its columns")  # fmt: skip


def _one_head(subject: Subject, block: Block, part: Tensor, parameters: dict[str, nn.Parameter]) -> None:
    """All columns of one head read the same queries: else it is more heads than one."""
    if block.q is None or f"{block.q}.weight" not in parameters:
        return
    asked = {name: parameters[name] for name in (f"{block.q}.weight",)}
    supports = [
        _support(part[:, column : column + 1], asked)[f"{block.q}.weight"] for column in (0, part.shape[-1] - 1)
    ]
    # Where gates lie beside the queries, each column has one of its own, and nothing else of its own.
    alone = [int((mine & ~other).any(1).sum()) for mine, other in (supports, supports[::-1])]
    gated = block.layout is not None and block.layout.gate_dim > 0
    subject.claim("weights: a head is one head", alone == [int(gated)] * 2,
                  f"layer {block.index}: columns of one head read different queries")  # fmt: skip
