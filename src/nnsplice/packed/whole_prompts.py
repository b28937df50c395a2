"""Attention modules that are called with whole prompts (GPT-J, GPT-Neo, BLOOM, Falcon, CodeGen and others).

These modules do not use transformers' attention registry. But their output is a function of all tokens of a prompt, and
these are known: the recorded tokens before a row's first one, then the row's own. So the module runs a whole prompt for
each row, with its recorded arguments, and its outputs at the row's own tokens go back into the pack. The rest of the
block, about two thirds of it, stays packed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nnsplice import engine
from nnsplice.packed.indices import on_device
from nnsplice.packed.layout import Find, PackLayout
from nnsplice.packed.masks import refuse_later

#: The arguments of an attention module with the values of the run: its input, and the stream if the module adds to it.
_LIVE = ("hidden_states", "residual")
#: Arguments with prompts and heads on one axis, and arguments shared by all prompts.
_BY_HEAD = ("alibi",)
_SHARED = ("position_bias",)
#: A call has at most this many times as many tokens as the pack.
MOST_TIMES = 4


@dataclass(frozen=True)
class ModuleCall:
    """The arguments of an attention module in a recorded pass of prompts of one length, by name."""

    #: The arguments with values of the run, `[prompt, token, width]`; rows replace these.
    live: Mapping[str, Tensor]
    given: Mapping[str, Any]

    @property
    def prompts(self) -> int:
        """The number of prompts."""
        return next(iter(self.live.values())).shape[0]

    @property
    def length(self) -> int:
        """The number of tokens of each prompt."""
        return next(iter(self.live.values())).shape[1]


@contextmanager
def recording_calls(modules: Sequence[nn.Module], module_calls: dict[nn.Module, ModuleCall]) -> Iterator[None]:
    """Record the arguments of attention modules."""

    def record(module: nn.Module, args: tuple, kwargs: dict) -> None:
        if module in module_calls:
            raise NotImplementedError("one attention module runs several times in a pass")
        given = engine.arguments_of(module, args, kwargs)
        live = {name: given.pop(name) for name in (engine.parameters_of(type(module))[0], *_LIVE) if name in given}
        if isinstance(mask := given.get("attention_mask"), Tensor):
            _refuse_later(mask)
        module_calls[module] = ModuleCall(live, given)

    hooks = [module.register_forward_pre_hook(record, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _refuse_later(mask: Tensor) -> None:
    """Raise for a mask by which a token sees later ones; in a bool mask, True may mean visible or hidden."""
    if mask.dtype is torch.bool and mask.shape[-1] == mask.shape[-2]:
        refuse_later(mask != mask.diagonal(dim1=-2, dim2=-1)[..., None, :1].logical_not())
    elif mask.is_floating_point():
        refuse_later(mask)


@dataclass(frozen=True)
class WholePrompts:
    """The recorded calls of each attention module, one per pass; empty if attention goes through the registry."""

    calls: Mapping[nn.Module, Sequence[ModuleCall]]
    #: The index of a prompt's first recorded token -> (the index of its call, its index in that call).
    places: Mapping[int, tuple[int, int]]

    @classmethod
    def of(cls, passes: Sequence[Mapping[nn.Module, ModuleCall]], bases: Sequence[Sequence[int]]) -> WholePrompts:
        """The calls of several passes, with the indices of their prompts' first recorded tokens."""
        places = {base: (one, row) for one, members in enumerate(bases) for row, base in enumerate(members)}
        return cls({module: [calls[module] for calls in passes] for module in passes[0]}, places)

    def length(self, base: int) -> int:
        """The length of the prompt whose first recorded token has this index."""
        one, _ = self.places[base]
        return next(iter(self.calls.values()))[one].length

    @contextmanager
    def running(self, layout: PackLayout, finds: Callable[[Find | None], None]) -> Iterator[None]:
        """In this block, attention modules take and return packed tokens, and run whole prompts inside.

        Args:
            finds: called before each run with the function that finds a row's token in the batch of whole prompts, and
                with None after it.
        """
        before = {module: module.__dict__.get("forward") for module in self.calls}
        for module in self.calls:
            module.forward = self._packed(module, module.forward, layout, finds)  # type: ignore[method-assign]
        try:
            yield
        finally:
            for module, own in before.items():
                if own is None:
                    del module.forward
                else:
                    module.forward = own

    def _packed(
        self, module: nn.Module, forward: Callable[..., Any], layout: PackLayout, finds: Callable[[Find | None], None]
    ) -> Callable[..., Any]:
        first = engine.parameters_of(type(module))[0]

        def run(*args: Any, **kwargs: Any) -> Any:
            given = engine.arguments_of(module, args, kwargs)
            out: Any = None
            parts: list[tuple[Tensor, Tensor]] = []
            for number, call in enumerate(self.calls[module]):
                for members in self._batches(layout, number, call):
                    device = given[first].device
                    prompts = on_device([self.places[layout.rows[n].base][1] for n in members], device)
                    own, there = _token_indices(layout, members, device)
                    live = {name: tensor[prompts] for name, tensor in call.live.items()}
                    for name, tensor in live.items():
                        tensor[there] = given[name][0, own]
                    finds(_finder(layout, members, call.length))
                    more = {name: _argument_for(name, value, call, prompts) for name, value in call.given.items()}
                    out = forward(**live, **more)
                    finds(None)
                    parts.append((own, (out[0] if isinstance(out, tuple | list) else out)[there]))
            packed = torch.cat([made for _, made in parts])[torch.cat([own for own, _ in parts]).argsort()][None]
            if not isinstance(out, tuple | list):
                return packed
            given = [packed, *[None] * (len(out) - 1)]
            return given if isinstance(out, list) else tuple(given)

        return run

    def _batches(self, layout: PackLayout, number: int, call: ModuleCall) -> Iterator[list[int]]:
        """The rows of the prompts of one recorded call, in batches."""
        members = [n for n in layout.full if self.places[layout.rows[n].base][0] == number]
        step = max(MOST_TIMES * layout.size // call.length, 1)
        for start in range(0, len(members), step):
            yield members[start : start + step]


def _token_indices(
    layout: PackLayout, members: Sequence[int], device: torch.device
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The indices of the tokens of these rows in the pack, and in `[row, token]` of the whole prompts."""
    rows = [layout.rows[n] for n in members]
    own = np.concatenate([np.arange(row.length) + layout.offsets[n] for n, row in zip(members, rows, strict=True)])
    at = np.concatenate([np.arange(row.start, row.last + 1) for row in rows])
    order = np.repeat(np.arange(len(rows)), [row.length for row in rows])
    return on_device(own, device), (on_device(order, device), on_device(at, device))


def _finder(layout: PackLayout, members: Sequence[int], length: int) -> Find:
    order = {n: place for place, n in enumerate(members)}

    def find(number: int, position: int) -> int | None:
        if number not in order or layout.find(number, position) is None:
            return None
        return order[number] * length + position

    return find


def _argument_for(name: str, value: Any, call: ModuleCall, rows: Tensor) -> Any:
    """A recorded argument for some of the prompts."""
    if isinstance(value, tuple):
        return tuple(_argument_for(name, part, call, rows) for part in value)
    if not isinstance(value, Tensor) or value.dim() < 2 or name in _SHARED:
        return value
    if name in _BY_HEAD:
        return value.unflatten(0, (call.prompts, -1))[rows].flatten(0, 1)
    if value.shape[0] == call.prompts:
        return value[rows]
    if value.shape[0] == 1:
        return value
    raise NotImplementedError(f"its attention is given {name}, of which it is not known what belongs to a prompt")
