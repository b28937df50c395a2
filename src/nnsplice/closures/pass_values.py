"""One forward pass outside of traces, with the values that promises are measured on.

The pass has an autograd graph within each attention only: the outputs of q, k and v are leaves, and the output of the
output projection is detached. So gradients show which columns of q, k and v a head's slice depends on, at the cost of
the attention scores, without that of the matrices.
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

#: A value of a module: its argument before (`given`) and after other hooks (`input`), its return value before
#: (`output`) and after other hooks (`passed`).
End = str
#: The module, the value, and the index of the call.
Key = tuple[str, End, int]

#: The arguments of a call of a module.
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class PassValues:
    """The values of one pass."""

    values: dict[Key, Tensor] = field(default_factory=dict)
    #: By module and call: outputs of the projections of q, k and v, and inputs of output projections (`slots`), in one
    #: autograd graph with the former as leaves.
    leaves: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    slots: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    #: The outputs of attention modules, which may include probabilities.
    patterns: dict[tuple[str, int], Any] = field(default_factory=dict)
    #: The arguments of modules of experts.
    calls: dict[tuple[str, int], Arguments] = field(default_factory=dict)
    visits: dict[Key, int] = field(default_factory=dict)
    #: The logits, if the model returns any.
    logits: Tensor | None = None

    def at(self, module: str | None, end: End, visit: int) -> Tensor | None:
        """A value; None if the module was not called."""
        return None if module is None else self.values.get((module, end, visit))


#: A change of the stream between attention and MLP: a function of the current value.
Written = Callable[[Tensor], Tensor]


def record_pass(
    model: object, example: tuple[tuple[Any, ...], dict[str, Any]], write: Written | None = None
) -> PassValues:
    """Run a model once and keep the values that its checks need.

    Args:
        write: a change to make at every `mid` site, as a replay would; the pass has no gradients then.
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
            hooks.identity_gradient(module)
    if block.pattern is not None:
        hooks.pattern(block.pattern[0])


class _Hooks:
    """Hooks on a plain module that record values, for calls in this thread only."""

    def __init__(self, root: nn.Module, stack: ExitStack) -> None:
        self.root, self.stack, self.recorded = root, stack, PassValues()
        self.thread = threading.get_ident()
        self.known: set[tuple[str, str]] = set()

    def _new(self, name: str | None, what: str) -> nn.Module | None:
        """The module, if it has no hook of this kind yet."""
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
        """Keep copies of a module's values; copies, as some blocks add into a branch's output in place."""
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
        """Keep the arguments of a module."""
        module = self._new(name, "call")
        if module is not None:
            self._before(module, lambda args, kwargs: self._called(name, args, kwargs))

    def _called(self, name: str, args: tuple, kwargs: dict) -> None:
        copied = tuple(_copy(value) for value in args), {key: _copy(value) for key, value in kwargs.items()}
        self.recorded.calls[name, self._visit(name, "call")] = copied

    def leaf(self, name: str) -> None:
        """Replace a module's output by a leaf of the autograd graph."""
        module = self._new(name, "leaf")
        if module is not None:
            self._after(module, lambda _, output: self._leaf(name, output))

    def _leaf(self, name: str, output: Any) -> Any:
        tensor = _tensor(output)
        if tensor is None or not tensor.is_floating_point():
            return None
        leaf = tensor.detach().clone().requires_grad_()
        self.recorded.leaves[name, self._visit(name, "leaf")] = leaf
        return wire.repack(output, None, leaf.clone())  # a clone, as leaves must not be changed in place

    def slots(self, name: str) -> None:
        """Keep the input of an output projection, and detach its output."""
        module = self._new(name, "slots")
        if module is not None:
            self._before(module, lambda args, kwargs: self._slots(name, _first(args, kwargs)))
            self._after(module, lambda _, output: replaced(output, lambda tensor: tensor.detach()))

    def _slots(self, name: str, value: Any) -> None:
        tensor = _tensor(value)
        if tensor is not None:
            self.recorded.slots[name, self._visit(name, "slots")] = tensor

    def identity_gradient(self, name: str) -> None:
        """Make the gradient of a norm the identity: through a norm over all heads each head depends on all others."""
        module = self._new(name, "identity gradient")

        def meet(args: tuple, output: Any) -> Any:
            before = _tensor(args)
            if before is None or not isinstance(output, Tensor) or before.shape != output.shape:
                return None
            return output.detach() + (before - before.detach()).to(output.dtype)

        if module is not None:
            self._after(module, meet)

    def pattern(self, name: str) -> None:
        """Keep the output of an attention module."""
        module = self._new(name, "pattern")
        if module is not None:
            self._after(module, lambda _, output: self._pattern(name, output))

    def _pattern(self, name: str, output: Any) -> None:
        self.recorded.patterns[name, self._visit(name, "pattern")] = output

    def write(self, block: Block, written: Written) -> None:
        """Change the stream between attention and MLP, as a replay would, and keep the new value."""
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
    """The tensor of a value: the first element of a container; None if there is none."""
    try:
        return wire.unpack(value, None)
    except (ValueError, IndexError, TypeError, StopIteration):
        return None


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value
