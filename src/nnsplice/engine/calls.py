"""Outside a trace: the tokens of a forward pass, from the calls of the model's modules.

A pass of a decoder with a cache computes the newest tokens only, a padded batch has columns of padding, and `generate`
runs the model many times for one prompt. `CallWatcher` tells for each pass which columns of the run it computes, which
of them are padding, and where the prompt ends.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, wraps
from typing import Any

import torch
from torch import Tensor, nn

from nnsplice.atlas import Atlas, unwrap
from nnsplice.engine.arguments import arguments_of, cache_of, mask_of, parameters_of, tokens_before
from nnsplice.errors import BadArgument


@dataclass(eq=False)
class Generation:
    """One batch of prompts with the tokens generated after them."""

    #: The number of columns of the prompts; None if they ran before the watcher was there.
    prompt: int | None = None
    #: The number of rows given; a beam search runs several for each.
    rows: int | None = None
    #: Whether the cache of these rows is known.
    cached: bool = False


@dataclass(eq=False)
class ForwardCall:
    """One pass of one tower: the columns `cached` to `cached + new` of its rows."""

    generation: Generation
    rows: int
    new: int
    #: The number of cached tokens; an error message if the call does not tell it.
    before: int | str
    device: torch.device
    #: `[row, column]`, False for padding; None if no row is padded.
    mask: Tensor | None
    #: The number of calls of each listener's module in this pass so far.
    visits: dict[Any, int] = field(default_factory=dict)

    def visit(self, listener: Any) -> int:
        """The number of earlier calls of the listener's module in this pass; one module may serve several layers."""
        number = self.visits.get(listener, 0)
        self.visits[listener] = number + 1
        return number

    @property
    def cached(self) -> int:
        """The number of cached tokens.

        Raises:
            BadArgument: the call does not tell it.
        """
        if isinstance(self.before, str):
            raise BadArgument(self.before)
        return self.before

    @cached_property
    def positions(self) -> Tensor:
        """`[row or 1, new]`: the position of each column among its row's own tokens; -1 for padding."""
        cached = self.cached
        if self.mask is None:
            return torch.arange(cached, cached + self.new, device=self.device)[None]
        counted = self.mask.long().cumsum(-1) - 1
        return counted.masked_fill(~self.mask, -1)[:, cached:]

    @cached_property
    def prompt_lengths(self) -> Tensor:
        """`[row or 1]`: the number of own tokens of each row's prompt."""
        columns = self.prompt_columns
        if self.mask is None:
            return torch.tensor([columns], device=self.device)
        # The padding is counted and not the tokens, as only a part of a long prompt may have run so far.
        return columns - (~self.mask[:, :columns]).long().sum(-1)

    @property
    def prompt_columns(self) -> int:
        """The number of columns of the prompt.

        Raises:
            BadArgument: the prompt ran before the watcher was there.
        """
        if self.generation.prompt is None:
            if isinstance(self.before, str):
                raise BadArgument(self.before)
            raise BadArgument(
                "this run goes on with a cache that was filled before, so where its prompt ends is unknown",
                expected="the prompt and what follows it in one steering block",
                write='where="all", or from_token(p) with p counted from the first token',
            )
        return self.generation.prompt


class _Running(threading.local):
    """The state of one thread: the current pass of each tower with the module that began it, and the generation."""

    def __init__(self) -> None:
        self.passes: dict[str, tuple[nn.Module, ForwardCall]] = {}
        self.generation: Generation | None = None


class CallWatcher:
    """Watches the calls of a model: `current(tower)` is the pass that this thread runs now."""

    def __init__(self, model: Any) -> None:
        self.root: nn.Module = unwrap(model)
        self._running: _Running = _Running()
        self._caches: weakref.WeakKeyDictionary[Any, Generation] = weakref.WeakKeyDictionary()
        self.before_pass: list[Callable[[], None]] = []
        self.users = 0

    def current(self, tower: str) -> ForwardCall | None:
        """The current pass of this tower in this thread; None if a module is called by itself."""
        found = self._running.passes.get(tower)
        return None if found is None else found[1]

    # --- start and stop

    def start(self) -> None:
        """Register the hooks."""
        towers = Atlas.of(self.root).towers
        self._two = len(towers) > 1
        names: dict[str, set[str]] = {"": set(towers) or {"decoder"}}
        for name, tower in towers.items():
            parts = tower.prefix.split(".")
            for n in range(1, len(parts) + 1):
                names.setdefault(".".join(parts[:n]), set()).add(name)
        self._hooks: list[Any] = []
        for name, of in names.items():
            module = self.root.get_submodule(name)
            own = len(of) == 1 and len(towers) > 1
            self._hooks.append(module.register_forward_pre_hook(self._before(of, own), with_kwargs=True, prepend=True))
            self._hooks.append(module.register_forward_hook(self._after, always_call=True))
        self._patched = "generate" not in self.root.__dict__ and hasattr(self.root, "generate")
        if self._patched:
            self.root.generate = self._watched(self.root.generate)

    def stop(self) -> None:
        """Leave the model as it was."""
        for hook in self._hooks:
            hook.remove()
        if self._patched:
            del self.root.generate

    def _watched(self, generate: Any) -> Any:
        @wraps(generate)
        def watched(*args: Any, **kwargs: Any) -> Any:
            before, self._running.generation = self._running.generation, _begun(args, kwargs, self._two)
            try:
                return generate(*args, **kwargs)
            finally:
                self._running.generation = before

        return watched

    # --- passes

    def _before(self, towers: set[str], own: bool) -> Any:
        """
        Args:
            own: whether the module is a tower of its own, so that its arguments have no prefix.
        """

        def begin(module: nn.Module, args: tuple, kwargs: dict) -> None:
            for tower in towers:
                if tower not in self._running.passes:
                    call = self._read(module, tower, args, kwargs, "" if own else None)
                    if call is not None:
                        self._running.passes[tower] = (module, call)
                        for listener in tuple(self.before_pass):
                            listener()

        return begin

    def _after(self, module: nn.Module, _args: Any, output: Any) -> None:
        for tower, (owner, call) in list(self._running.passes.items()):
            if owner is module:
                del self._running.passes[tower]
                if not call.generation.cached:
                    self._remember(cache_of(output), call.generation)

    def _remember(self, cache: Any, generation: Generation) -> None:
        if hasattr(cache, "get_seq_length"):
            self._caches[cache], generation.cached = generation, True

    def _read(self, module: nn.Module, tower: str, args: tuple, kwargs: dict, prefix: str | None) -> ForwardCall | None:
        given = arguments_of(module, args, kwargs)
        two = prefix is None and "decoder_input_ids" in parameters_of(type(module))
        own = "decoder_" if two and tower == "decoder" else ""
        tokens = (given.get(own + name) for name in ("input_ids", "inputs_embeds", "hidden_states"))
        ids = next((value for value in tokens if isinstance(value, Tensor)), None)
        if ids is None or ids.dim() < 2:
            return None
        rows, new = ids.shape[:2]
        before: int | str = 0
        if tower != "encoder":
            try:
                before = tokens_before(given, new, own)
            except BadArgument as error:  # raised by `cached`: steering of all tokens does not need the number
                before = str(error)
        mask = None if isinstance(before, str) else _columns(mask_of(given, own), before + new)
        generation = self._generation_of(tower, cache_of(given), before, rows, new)
        return ForwardCall(generation, rows, new, before, ids.device, mask)

    def _generation_of(self, tower: str, cache: Any, before: int | str, rows: int, new: int) -> Generation:
        if tower == "encoder":
            return Generation(new, rows)
        if self._running.generation is not None:
            if self._running.generation.prompt is None and isinstance(before, int):
                self._running.generation.prompt = before + new
            return self._running.generation
        if before:  # cached tokens, or an unknown number of them
            return self._remembered(cache) or Generation(None, rows)
        generation = Generation(new, rows)
        self._remember(cache, generation)
        return generation

    def _remembered(self, cache: Any) -> Generation | None:
        return self._caches.get(cache) if hasattr(cache, "get_seq_length") else None


def _begun(args: tuple, kwargs: Mapping[str, Any], two_towers: bool) -> Generation:
    """A generation as far as the call of `generate` tells it; its first pass tells the rest."""
    given = [*args[:1], *(kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds"))]
    ids = next((value for value in given if isinstance(value, Tensor)), None)
    # A long prompt may run in several passes, so its width is taken from here if possible. A decoder beside an encoder
    # begins with a prompt of its own, known from its first pass.
    return Generation(None if ids is None or two_towers else ids.shape[1], None if ids is None else ids.shape[0])


def _columns(mask: Tensor | None, width: int) -> Tensor | None:
    """`[row, column]`, False for padding."""
    if mask is None:
        return None
    if mask.dim() == 4:  # the newest token attends to every token of its row
        last = mask[:, 0, -1, :width]
        return last if last.dtype == torch.bool else last == 0
    return mask[:, :width] != 0


_guard = threading.Lock()
_watchers: weakref.WeakKeyDictionary[nn.Module, CallWatcher] = weakref.WeakKeyDictionary()


def watch_calls(model: Any) -> CallWatcher:
    """The watcher of a model, shared by all users, until the last of them calls `unwatch_calls`."""
    root = unwrap(model)
    with _guard:
        found = _watchers.get(root)
        if found is None:
            found = _watchers[root] = CallWatcher(model)
            found.start()
        found.users += 1
    return found


def unwatch_calls(found: CallWatcher) -> None:
    """Give the watcher back; it stops after its last user."""
    with _guard:
        found.users -= 1
        if not found.users:
            found.stop()
            del _watchers[found.root]
