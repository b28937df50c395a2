"""Unedited runs: the output of every sender, and the stream that they add up to."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nnsplice import engine, wire
from nnsplice.activations.prompts import Prompts
from nnsplice.atlas import Site
from nnsplice.attribution.branches import rounding_of
from nnsplice.circuits.wiring import LayerWires, Wiring
from nnsplice.errors import RefusedPlace


@dataclass(frozen=True)
class SenderValues:
    """The senders' values of runs over prompts of one length: `[prompt, token, width]` each."""

    #: The stream that enters the first layer.
    embed: Tensor
    #: By layer: the heads' input of the output projection, and the output of the MLP, before `Block.scale`.
    z: tuple[Tensor, ...]
    mlp: tuple[Tensor, ...]
    #: By layer and number: the output of each expert that is a sender.
    experts: Mapping[tuple[int, int], Tensor] = field(default_factory=dict)

    def map(self, change: Callable[[Tensor], Tensor]) -> SenderValues:
        """Something done to every value."""
        experts = {key: change(value) for key, value in self.experts.items()}
        return SenderValues(change(self.embed), tuple(map(change, self.z)), tuple(map(change, self.mlp)), experts)


@dataclass(frozen=True)
class OutputFormat:
    """The form of the outputs of blocks and projections."""

    #: How many elements a block returns; None where it returns a tensor.
    returns: tuple[int | None, ...]
    #: How wide the output of each projection is.
    widths: Mapping[str, int]


@dataclass(frozen=True)
class SenderRun:
    """One run: the values, and the logits of one position, `[prompt, vocab]`."""

    values: SenderValues
    frame: OutputFormat
    logits: Tensor


@torch.no_grad()
def record(
    root: nn.Module,
    model: engine.Model,
    wiring: Wiring,
    prompts: Prompts,
    rows: Sequence[int],
    at: int,
    experts: Collection[tuple[int, int]] = (),
) -> SenderRun:
    """Run prompts of one length unedited, and check that the stream is the sum of the senders' outputs.

    Args:
        at: the position whose logits are kept, counted from the end.
        experts: the experts whose outputs are recorded too, by layer and number.

    Raises:
        RefusedPlace: the stream is something else.
    """
    recorded: dict[Site, Tensor] = {}
    returns: list[int | None] = []
    widths: dict[str, int] = {}
    wanted: list[Site] = [Site(wiring.layers[0].block.module, "input")]
    for layer in wiring.layers:
        wanted += [Site(layer.z[0].module, "input"), layer.mlp_added, layer.attn_added]
    last = Site(wiring.layers[-1].block.module, "output")
    with ExitStack() as stack:
        for site in (*dict.fromkeys(wanted), last):
            stack.enter_context(_keeping(root, site, len(rows), recorded))
        for layer in wiring.layers:
            stack.enter_context(_after(root, layer.block.module, lambda out: returns.append(_returns(out))))
            for name in layer.projections:
                stack.enter_context(_after(root, name, lambda out, n=name: widths.__setitem__(n, out.shape[-1])))
        given: dict[int, tuple[Any, ...]] = {}
        for number in sorted({layer for layer, _ in experts}):
            stack.enter_context(given_to_experts(root, wiring.layers[number], number, given))
        logits = run_plainly(root, model, prompts, rows, at)
    values = SenderValues(
        recorded[wanted[0]],
        tuple(recorded[Site(layer.z[0].module, "input")] for layer in wiring.layers),
        tuple(recorded[layer.mlp_added] for layer in wiring.layers),
        {key: expert_of(root, wiring.layers[key[0]], given[key[0]], key[1], len(rows)) for key in experts},
    )
    stream = values.embed
    for layer, z in zip(wiring.layers, values.z, strict=True):
        added = recorded[layer.attn_added]
        _check(ended(root, layer, projected(root, layer, z)), added, layer, f"more than {layer.block.o} stands")
        stream = stream + (added + recorded[layer.mlp_added]) * layer.block.scale
    _check(stream, recorded[last], wiring.layers[-1], "more than attention and MLP stands")
    return SenderRun(values, OutputFormat(tuple(returns), widths), logits)


@contextmanager
def given_to_experts(
    root: nn.Module, layer: LayerWires, number: int, into: dict[int, tuple[Any, ...]]
) -> Iterator[None]:
    """Record the arguments of a layer's experts: tokens, chosen experts, their weights."""

    def before(_module: nn.Module, args: tuple, kwargs: dict) -> None:
        into[number] = (*args, *kwargs.values())

    hook = root.get_submodule(str(layer.block.experts)).register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def expert_of(root: nn.Module, layer: LayerWires, given: tuple[Any, ...], expert: int, rows: int) -> Tensor:
    """The output of one expert, `[row, token, width]`: the experts' own code, with the weights of all others at zero.

    Raises:
        RefusedPlace: they are not called with tokens, the chosen experts and their weights.
    """
    chosen = [one for one in given if isinstance(one, Tensor) and one.dtype in (torch.int64, torch.int32)]
    if len(given) != 3 or len(chosen) != 1 or chosen[0] is not given[1] or not isinstance(given[2], Tensor):
        raise RefusedPlace(
            "these experts are not given the chosen experts and their weights, so one cannot be told apart",
            path=f"layers[{layer.block.index}].experts[{expert}]",
            write=f"layers[{layer.block.index}].mlp",
        )
    tokens, numbers, weights = given
    module: Any = root.get_submodule(str(layer.block.experts))
    made = module.forward(tokens, numbers, torch.where(numbers == expert, weights, torch.zeros_like(weights)))
    return made.reshape(rows, -1, made.shape[-1])


def run_plainly(root: nn.Module, model: engine.Model, prompts: Prompts, rows: Sequence[int], at: int) -> Tensor:
    """The logits of one position, counted from the end: `[prompt, vocab]`."""
    inputs = prompts.inputs(rows, model.device)
    assert isinstance(inputs, Mapping)
    fewer = {"logits_to_keep": -at} if engine.keeps_logits(model) else {}
    return root(**inputs, **fewer, use_cache=False).logits[:, at].clone()


def projected(root: nn.Module, layer: LayerWires, z: Tensor) -> Tensor:
    """The output projection of all heads, with its bias."""
    return root.get_submodule(layer.z[0].module)(z)


def ended(root: nn.Module, layer: LayerWires, projection: Tensor) -> Tensor:
    """The attention's addition to the stream, before `Block.scale`, from the output of its projection."""
    if layer.norm is None:
        return projection
    return root.get_submodule(layer.norm)(projection)


def _check(computed: Tensor, recorded: Tensor, layer: LayerWires, why: str) -> None:
    off = float((computed - recorded.to(computed)).abs().max())
    size = float(recorded.abs().max())
    if not off <= rounding_of(recorded.dtype) * (1 + size):
        raise RefusedPlace(
            f"{why} between the heads and the stream of layer {layer.block.index}: they are {off:.2g} apart, of "
            f"{size:.2g}",
            path=f"layers[{layer.block.index}]",
            expected="a layer that adds its attention and its MLP to the stream",
        )


def _returns(out: Any) -> int | None:
    return len(out) if isinstance(out, tuple | list) else None


@contextmanager
def _keeping(root: nn.Module, site: Site, rows: int, into: dict[Site, Tensor]) -> Iterator[None]:
    """Keep the value at an end of a module, in memory of its own, as some blocks add into tensors in place."""

    def keep(value: Tensor) -> None:
        into[site] = wire.as_rows(value, rows, site.columns is not None).clone()

    with engine.reading(root, site, keep):
        yield


@contextmanager
def _after(root: nn.Module, name: str, note: Callable[[Any], Any]) -> Any:
    hook = root.get_submodule(name).register_forward_hook(lambda _m, _a, out: note(out) and None)
    try:
        yield
    finally:
        hook.remove()
