"""`relp`: edges as `eap` scores them, with gradients by the rules of layer-wise relevance propagation.

While `rules` lasts, every run has the values that it has without them, and other gradients: scales of norms and
patterns of attention are constants, an activation has the slope act(x) / x, and each factor of a gate gets half of the
gradient of their product. So what is not a straight line at this point does not bend what comes back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nnsplice import engine, wire
from nnsplice.activations.access import site_of
from nnsplice.atlas import Atlas, Block, unwrap
from nnsplice.attribution.branches import branches_of
from nnsplice.attribution.edges import norm_behind
from nnsplice.attribution.norms import MeasuredNorm, norms_of
from nnsplice.errors import RefusedPlace

#: Modules without parameters that are no activation.
_PASSING = (nn.Dropout, nn.Identity)


@contextmanager
def rules(model: engine.Model) -> Iterator[None]:
    """Gradients by these rules, while this lasts.

    Raises:
        RefusedPlace: a norm stands behind its branches, or an MLP is not known as an activation between layers.
    """
    root = unwrap(model)
    tower = Atlas.of(root).tower()
    with ExitStack() as stack:
        for branch in branches_of(model).all:
            if norm_behind(branch) is not None:
                # A branch's output is read before the rule, so gradients would not pass through it.
                raise RefusedPlace(
                    "relp needs branches without a norm behind them, whose scale would have to stand still too",
                    path=branch.added,
                    write='method="eap-ig"',
                )
        inside = root.get_submodule(tower.prefix).named_modules(prefix=tower.prefix)
        names = [n for n, m in inside if "norm" in type(m).__name__.lower() and not list(m.children())]
        for name, norm in norms_of(model, names).items():
            _after(stack, root.get_submodule(name), partial(_frozen_scale, norm))
        for block in tower.blocks:
            _attention(stack, model, root, block)
            _mlp(stack, root, block)
        yield


def _attention(stack: ExitStack, model: engine.Model, root: nn.Module, block: Block) -> None:
    """Queries and keys pass no gradient back, so that patterns are constants."""
    start = f"layers[{block.index}]"
    if block.reads_beside is not None:
        raise RefusedPlace(
            f"relp has no rule for the attention of layer {block.index}: {block.reads_beside}",
            path=f"{start}.attn",
            write='method="eap-ig"',
        )
    columns: dict[str, list[tuple[int, int]]] = {}
    for part in ("heads[:].q", "groups[:].k"):
        for path in engine.expand(model, f"{start}.{part}"):
            site = site_of(path)
            columns.setdefault(site.module, []).append(site.columns or (0, 0))

    for name, some in columns.items():
        at = [n for first, last in some for n in range(first, last)]

        def constant(_module: nn.Module, _states: Tensor, out: Tensor, at: list[int] = at) -> Tensor:
            held = out.clone()
            held[..., at] = out[..., at].detach()
            return held

        _after(stack, root.get_submodule(name), constant)


def _mlp(stack: ExitStack, root: nn.Module, block: Block) -> None:
    where = f"layers[{block.index}].mlp"
    if block.mlp is None or block.down is None or block.is_sparse:
        raise RefusedPlace(
            "relp needs to know the activation and the gate of an MLP, and this one is none of known layers",
            path=where,
            write='method="eap-ig"',
        )
    home = root.get_submodule(block.mlp)
    parts = {block.gate, block.up, block.down, block.gate_up}
    beside = {block.attn, block.o, block.q, block.k, block.v, block.fused}
    found = [
        module
        for name, module in home.named_modules(prefix=block.mlp)
        if not list(module.children())
        and not list(module.parameters())
        and not isinstance(module, _PASSING)
        and name not in (parts | beside)
        and not any(one and name.startswith(f"{one}.") for one in (*parts, *beside))
    ]
    if len(found) != 1:
        raise RefusedPlace(
            f"relp needs the activation of an MLP as a module, and this one has {len(found)} that could be it",
            path=where,
            write='method="eap-ig"',
        )
    _after(stack, found[0], _frozen_slope)
    if block.gate is not None or block.gate_up is not None:
        hook = root.get_submodule(block.down).register_forward_pre_hook(_halved, prepend=True)
        stack.callback(hook.remove)


def _after(stack: ExitStack, module: Any, rule: Callable[..., Tensor]) -> None:
    """Give a module's output the gradient of a rule: `(module, input, output)` -> the new output."""
    own, forward = module.__dict__.get("forward"), module.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        states = args[0] if args else next(iter(kwargs.values()))
        return wire.repack(output, None, rule(module, states, wire.unpack(output)))

    def back() -> None:
        if own is None:
            del module.forward
        else:
            module.forward = own

    module.forward = run
    stack.callback(back)


def _valued(value: Tensor, line: Tensor) -> Tensor:
    """This value, with the gradient of another expression."""
    return value.detach() + (line - line.detach())


def _frozen_scale(norm: MeasuredNorm, _module: nn.Module, states: Tensor, out: Tensor) -> Tensor:
    """A norm with a constant scale, which is linear."""
    line = norm.line(states)
    return _valued(out, line * _ratio(out - norm.bias, line))


def _frozen_slope(_module: nn.Module, states: Tensor, out: Tensor) -> Tensor:
    """An activation as its value at this point times a constant."""
    return _valued(out, states * _ratio(out, states))


def _ratio(out: Tensor, states: Tensor) -> Tensor:
    with torch.no_grad():
        tiny = states.abs() < torch.finfo(states.dtype).tiny
        return torch.where(tiny, torch.zeros_like(out), out / torch.where(tiny, torch.ones_like(states), states))


def _halved(_module: nn.Module, args: tuple[Any, ...]) -> Any:
    """Half of the gradient: the other half of the product rule's is the other factor's."""
    half = args[0] * 0.5
    return (half + half.detach(), *args[1:])
