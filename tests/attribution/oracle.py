"""What attribution is checked against: torch hooks on bare modules, one thing at a time, every name spelled out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zoo import build


def bare(family: str, **config: Any) -> Any:
    """The same weights without any wrapper."""
    return build(family, **config).double()


def ids(text: str) -> Tensor:
    """Token ids of a text of the tests' tokenizer."""
    return torch.tensor([[int(word[1:]) for word in text.split()]])


def first(value: Any) -> Tensor:
    """The tensor in a module's output."""
    return value[0] if isinstance(value, tuple) else value


def with_first(value: Any, tensor: Tensor) -> Any:
    """The module's output with another tensor in it."""
    return (tensor, *value[1:]) if isinstance(value, tuple) else tensor


@dataclass(frozen=True)
class Point:
    """One end of a module, and which columns of it."""

    module: str
    end: str = "output"
    columns: tuple[int, int] | None = None

    def part(self, tensor: Tensor) -> Tensor:
        """A view of the columns."""
        return tensor if self.columns is None else tensor[..., self.columns[0] : self.columns[1]]


#: What is done to a value: it comes in, and what the run goes on with comes out.
Change = Callable[[Tensor], Tensor]


@contextmanager
def hooked(module: nn.Module, changes: list[tuple[Point, Change]]) -> Iterator[None]:
    """Values changed by hooks, in the order of the list where several are at one end."""
    with ExitStack() as stack:
        for point, change in changes:
            part = module.get_submodule(point.module)
            if point.end == "output":
                hook = part.register_forward_hook(lambda _m, _a, out, c=change: with_first(out, c(first(out))))
            else:

                def before(_m: nn.Module, args: tuple, kwargs: dict, c: Change = change) -> Any:
                    if args:
                        return ((c(args[0]), *args[1:]), kwargs)
                    name = next(iter(kwargs))
                    return (args, {**kwargs, name: c(kwargs[name])})

                hook = part.register_forward_pre_hook(before, with_kwargs=True)
            stack.callback(hook.remove)
        yield


def kept(module: nn.Module, tokens: Tensor, points: list[Point]) -> dict[Point, Tensor]:
    """The values of a run at these points, all columns."""
    found: dict[Point, Tensor] = {}

    def keep(point: Point) -> Change:
        def change(tensor: Tensor) -> Tensor:
            found[point] = tensor.detach().clone()
            return tensor

        return change

    with torch.no_grad(), hooked(module, [(point, keep(point)) for point in points]):
        module(tokens)
    return found


def logit_diff(module: nn.Module, tokens: Tensor, answer: int = 7, wrong: int = 8, at: int = -1) -> Tensor:
    """The metric of the tests."""
    logits = module(tokens).logits[0, at]
    return logits[answer] - logits[wrong]


def ends(module: nn.Module, tokens: Tensor) -> float:
    """The metric of a run as it is."""
    with torch.no_grad():
        return float(logit_diff(module, tokens))


# --- gradients --------------------------------------------------------------------------------------------------------


def worth(
    module: nn.Module,
    clean: Tensor,
    corrupted: Tensor,
    points: list[Point],
    more: list[tuple[Point, Change]] | None = None,
) -> dict[Point, Tensor]:
    """(clean - corrupted) times the gradient in the corrupted run, per token: `[token]`."""
    there, here = kept(module, clean, points), kept(module, corrupted, points)
    live: dict[Point, Tensor] = {}

    def watch(point: Point) -> Change:
        def change(tensor: Tensor) -> Tensor:
            live[point] = tensor if tensor.requires_grad else tensor.requires_grad_()
            return live[point]

        return change

    changes = [(point, watch(point)) for point in points] + (more or [])
    with torch.enable_grad(), hooked(module, changes):
        value = logit_diff(module, corrupted)
        found = torch.autograd.grad(value, [live[point] for point in points], allow_unused=True)
    scores = {}
    for point, gradient in zip(points, found, strict=True):
        gradient = torch.zeros_like(here[point]) if gradient is None else gradient
        product = (there[point] - here[point]) * gradient
        scores[point] = point.part(product).reshape(clean.shape[1], -1).sum(-1)
    return scores


# --- paths ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Names:
    """What a family calls its parts; heads are counted in columns of what goes into the output projection."""

    attn: str
    mlp: str
    o: str
    head: int
    layers: int = 3

    def branches(self) -> list[Point]:
        """Everything that adds to the stream."""
        return [Point(name.format(n)) for n in range(self.layers) for name in (self.attn, self.mlp)]

    def z(self, layer: int, head: int) -> Point:
        """What one head brings to the output projection."""
        return Point(self.o.format(layer), "input", (head * self.head, (head + 1) * self.head))


NAMES: Mapping[str, Names] = {
    "gpt2": Names("transformer.h.{}.attn", "transformer.h.{}.mlp", "transformer.h.{}.attn.c_proj", 4),
    "llama": Names("model.layers.{}.self_attn", "model.layers.{}.mlp", "model.layers.{}.self_attn.o_proj", 6),
    "gpt_neox": Names(
        "gpt_neox.layers.{}.attention", "gpt_neox.layers.{}.mlp", "gpt_neox.layers.{}.attention.dense", 4
    ),
    "mixtral": Names("model.layers.{}.self_attn", "model.layers.{}.mlp", "model.layers.{}.self_attn.o_proj", 6),
}  # fmt: skip


def three_passes(
    module: nn.Module,
    branches: list[Point],
    clean: Tensor,
    corrupted: Tensor,
    sender: Point,
    own: Point | None,
    receivers: list[Point],
    *,
    sent: slice | list[int] = slice(None),
    received: slice | list[int] = slice(None),
) -> float:
    """Path patching as it is told: run and keep, run with everything held still, run with what the receivers then had.

    Args:
        own: the branch that the sender is in, which is not held still.
    """
    value = kept(module, clean, [sender])[sender]
    still = kept(module, corrupted, branches)

    def send(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        sender.part(tensor)[:, sent] = sender.part(value)[:, sent]
        return tensor

    had: dict[Point, Tensor] = {}

    def hear(point: Point) -> Change:
        def change(tensor: Tensor) -> Tensor:
            had[point] = point.part(tensor).detach().clone()
            return tensor

        return change

    held = [(branch, lambda tensor, b=branch: still[b].reshape(tensor.shape)) for branch in branches if branch != own]
    with torch.no_grad(), hooked(module, [(sender, send), *((r, hear(r)) for r in receivers), *held]):
        module(corrupted)

    def give(point: Point) -> Change:
        def change(tensor: Tensor) -> Tensor:
            tensor = tensor.clone()
            point.part(tensor)[:, received] = had[point][:, received]
            return tensor

        return change

    with torch.no_grad(), hooked(module, [(point, give(point)) for point in receivers]):
        return float(logit_diff(module, corrupted))
