"""One forward pass outside of traces, with the values that promises are measured on.

Between the projections of an attention and its output projection the pass is differentiable, layer by layer: the
outputs of q, k and v are leaves, and what the output projection makes is cut off. So gradients say which of their
columns a slice depends on, at the price of the attention's core, which has no matrices.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nnsplice import engine, wire
from nnsplice.atlas import Atlas, Block, unwrap
from nnsplice.atlas.families import CROSS
from nnsplice.atlas.tree import is_norm

#: A module's value: what arrives at it (`given`), what it reads after hooks of others (`input`), what it makes
#: (`output`), what the model goes on with after hooks of others (`passed`).
End = str
#: The module, its end, and which of its calls.
Key = tuple[str, End, int]

#: What a module was called with.
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class PassValues:
    """What one pass went through."""

    values: dict[Key, Tensor] = field(default_factory=dict)
    #: Outputs of the projections of q, k and v, and inputs of output projections, tied to them.
    leaves: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    slots: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    #: What attention modules return in the place of probabilities.
    patterns: dict[tuple[str, int], Any] = field(default_factory=dict)
    #: What modules of experts were called with.
    calls: dict[tuple[str, int], Arguments] = field(default_factory=dict)
    visits: dict[Key, int] = field(default_factory=dict)
    #: What the model returned, where it says so.
    logits: Tensor | None = None

    def at(self, module: str | None, end: End, visit: int) -> Tensor | None:
        """A value, or None where it was not met."""
        return None if module is None else self.values.get((module, end, visit))


#: A change of the stream where it is met between attention and MLP: what stands there -> what is to stand there.
Written = Callable[[Tensor], Tensor]


def record_pass(
    model: object, example: tuple[tuple[Any, ...], dict[str, Any]], write: Written | None = None
) -> PassValues:
    """Run a model once and keep what its closures need.

    Args:
        write: put into every site between attention and MLP, as a replay would; no gradients are kept then.
    """
    root, atlas = unwrap(model), Atlas.of(model)
    args, kwargs = example
    with ExitStack() as stack:
        hooks = _Hooks(root, stack)
        for block in {block.module: block for tower in atlas.towers.values() for block in tower.blocks}.values():
            _watch(hooks, atlas, block)
            if write is not None:
                hooks.write(block, write)
                continue
            for attention in block.attentions:
                _tie(hooks, atlas, attention)
        call = stack.enter_context(engine.undisturbed(model))
        stack.enter_context(torch.set_grad_enabled(write is None))
        logits = getattr(call(*args, **kwargs), "logits", None)
    hooks.recorded.logits = logits.detach() if isinstance(logits, Tensor) else None
    return hooks.recorded


def norms_of(atlas: Atlas, block: Block) -> Iterator[str]:
    """The norms of a layer, at any depth."""
    for home in block.modules:
        yield from (name for name in (home, *atlas.tree.under(home)) if is_norm(atlas.tree, name))


def _watch(hooks: _Hooks, atlas: Atlas, block: Block) -> None:
    for module in block.modules:
        hooks.keep(module, "given", "input", "output", "passed")
    for module in (block.mixer_added, block.mlp_added, block.mixes, block.mlp, *block.mlp_beside, block.o, block.down):
        hooks.keep(module, "output", "passed")
    for module in norms_of(atlas, block):
        hooks.keep(module, "given", "output", "passed")
    if block.cross is not None:
        for module in (block.cross.attn_added, block.cross.o):
            hooks.keep(module, "output", "passed")
    if block.mid is not None:
        hooks.keep(block.mid[0], "given", "passed")
    if block.experts is not None and not block.experts_are_modules:
        hooks.calls(block.experts)


def _tie(hooks: _Hooks, atlas: Atlas, block: Block) -> None:
    if block.o is None or block.layout is None:
        return
    gate = block.gate_of(0)
    for module in dict.fromkeys(filter(None, (block.q, block.k, block.v, block.fused, gate and gate[0]))):
        hooks.leaf(module)
    hooks.slots(block.o)
    home = block.attn or (block.pattern and block.pattern[0])
    for module in atlas.tree.under(home) if home else ():
        if is_norm(atlas.tree, module) and module != block.attn_added and not CROSS & set(module.split(".")):
            hooks.straight(module)
    if block.pattern is not None:
        hooks.pattern(block.pattern[0])


class _Hooks:
    """Hooks of torch on a plain module, for the calls of this thread."""

    def __init__(self, root: nn.Module, stack: ExitStack) -> None:
        self.root, self.stack, self.recorded = root, stack, PassValues()
        self.thread = threading.get_ident()
        self.known: set[tuple[str, str]] = set()

    def _new(self, name: str | None, what: str) -> nn.Module | None:
        """The module, the first time that this is asked of it."""
        if name is None or (name, what) in self.known:
            return None
        self.known.add((name, what))
        return self.root.get_submodule(name)

    def _visit(self, name: str, end: str) -> int:
        key = (name, end, 0)
        self.recorded.visits[key] = self.recorded.visits.get(key, -1) + 1
        return self.recorded.visits[key]

    def _before(self, module: nn.Module, meet: Callable[[tuple, dict], Any], *, first: bool = False) -> None:
        def hook(_: nn.Module, args: tuple, kwargs: dict) -> Any:
            return meet(args, kwargs) if threading.get_ident() == self.thread else None

        self.stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True, prepend=first).remove)

    def _after(self, module: nn.Module, meet: Callable[[tuple, Any], Any], *, first: bool = False) -> None:
        def hook(_: nn.Module, args: tuple, output: Any) -> Any:
            return meet(args, output) if threading.get_ident() == self.thread else None

        self.stack.callback(module.register_forward_hook(hook, prepend=first).remove)

    def keep(self, name: str | None, *ends: End) -> None:
        """Keep copies of a module's values; a block may add to the very tensor that a branch gave it."""
        for end in ends:
            module = self._new(name, end)
            if module is None:
                continue

            def meet(value: Any, end: str = end) -> None:
                tensor = _tensor(value)
                visit = self._visit(str(name), end)
                if tensor is not None:
                    self.recorded.values[str(name), end, visit] = tensor.detach().clone()

            if end in ("given", "input"):
                self._before(module, lambda args, kwargs, meet=meet: meet(_first(args, kwargs)), first=end == "given")
            else:
                self._after(module, lambda _, output, meet=meet: meet(output), first=end == "output")

    def calls(self, name: str) -> None:
        """Keep what a module is called with."""
        module = self._new(name, "call")
        if module is not None:
            self._before(module, lambda args, kwargs: self._called(name, args, kwargs))

    def _called(self, name: str, args: tuple, kwargs: dict) -> None:
        copied = tuple(_copy(value) for value in args), {key: _copy(value) for key, value in kwargs.items()}
        self.recorded.calls[name, self._visit(name, "call")] = copied

    def leaf(self, name: str) -> None:
        """Let the run go on with an output that gradients arrive at."""
        module = self._new(name, "leaf")
        if module is not None:
            self._after(module, lambda _, output: self._leaf(name, output))

    def _leaf(self, name: str, output: Any) -> Any:
        tensor = _tensor(output)
        if tensor is None or not tensor.is_floating_point():
            return None
        leaf = tensor.detach().clone().requires_grad_()
        self.recorded.leaves[name, self._visit(name, "leaf")] = leaf
        return wire.repack(output, None, leaf.clone())  # code may change it in place, which no leaf allows

    def slots(self, name: str) -> None:
        """Keep what an output projection is given, and cut off what it makes."""
        module = self._new(name, "slots")
        if module is not None:
            self._before(module, lambda args, kwargs: self._slots(name, _first(args, kwargs)))
            self._after(module, lambda _, output: replaced(output, lambda tensor: tensor.detach()))

    def _slots(self, name: str, value: Any) -> None:
        tensor = _tensor(value)
        if tensor is not None:
            self.recorded.slots[name, self._visit(name, "slots")] = tensor

    def straight(self, name: str) -> None:
        """Let gradients pass a norm as if it were not there: it may tie all heads, which is no part of the question."""
        module = self._new(name, "straight")

        def meet(args: tuple, output: Any) -> Any:
            before = _tensor(args)
            if before is None or not isinstance(output, Tensor) or before.shape != output.shape:
                return None
            return output.detach() + (before - before.detach()).to(output.dtype)

        if module is not None:
            self._after(module, meet)

    def pattern(self, name: str) -> None:
        """Keep what an attention module returns."""
        module = self._new(name, "pattern")
        if module is not None:
            self._after(module, lambda _, output: self._pattern(name, output))

    def _pattern(self, name: str, output: Any) -> None:
        self.recorded.patterns[name, self._visit(name, "pattern")] = output

    def write(self, block: Block, written: Written) -> None:
        """Change the stream between attention and MLP as a replay would, and keep what stands there then."""
        if block.mid is None:
            return
        name, end = block.mid
        module = self._new(name, "write")
        if module is None:
            return

        def change(tensor: Tensor) -> Tensor:
            new = written(tensor)
            self.recorded.values[name, "written", self._visit(name, "written")] = new.clone()
            return new

        if block.mid_kind == "stream":
            self._before(module, lambda args, kwargs: _in_place(_first(args, kwargs), change), first=True)
        elif end == "input":
            self._before(module, lambda args, kwargs: _with_first(args, kwargs, change), first=True)
        else:
            self._after(module, lambda _, output: replaced(output, change), first=True)


def _in_place(value: Any, written: Written) -> None:
    tensor = _tensor(value)
    if tensor is not None:
        tensor.copy_(written(tensor))


def _with_first(args: tuple, kwargs: dict, written: Written) -> tuple[tuple, dict] | None:
    tensor = _tensor(_first(args, kwargs))
    return None if tensor is None else engine.with_first_input((args, kwargs), written(tensor))


def replaced(value: Any, change: Written) -> Any:
    """A module's output with its tensor changed; None where it has none."""
    tensor = _tensor(value)
    return None if tensor is None else wire.repack(value, None, change(tensor))


def _first(args: tuple, kwargs: dict) -> Any:
    return args[0] if args else next(iter(kwargs.values()), None)


def _tensor(value: Any) -> Tensor | None:
    """The tensor that a site without an element number means."""
    try:
        return wire.unpack(value, None)
    except (ValueError, IndexError, TypeError, StopIteration):
        return None


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value
