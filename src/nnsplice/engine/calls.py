"""Outside a trace: the tokens of a forward pass, from the calls of the model's modules.

A pass of a decoder with a cache computes the newest tokens only, a padded batch holds columns that are no tokens, and
`generate` runs the model many times for one prompt. `Watch` listens to the calls and says for each pass which columns
of the run it computes, which of them are padding, and where the prompt ends.
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
class Sequence:
    """The rows of one prompt batch, from the prompt to the last token that is generated."""

    #: How many columns the prompt takes; None where that was before anybody listened.
    prompt: int | None = None
    #: How many rows were given; a beam search runs several for each.
    rows: int | None = None
    #: Whether the cache that goes on with them is known.
    cached: bool = False


@dataclass(eq=False)
class Call:
    """One pass of one tower: the columns `cached` to `cached + new` of its rows."""

    sequence: Sequence
    rows: int
    new: int
    #: How many tokens came before, in the cache; where the call does not tell, what is to be said of that.
    before: int | str
    device: torch.device
    #: `[row, column]`, whether a token stands there; None where no row is padded.
    mask: Tensor | None
    #: How often each listener was met in this pass.
    visits: dict[Any, int] = field(default_factory=dict)

    def visit(self, listener: Any) -> int:
        """How often the listener's module ran before in this pass; one module may serve several layers."""
        number = self.visits.get(listener, 0)
        self.visits[listener] = number + 1
        return number

    @property
    def cached(self) -> int:
        """How many tokens came before, in the cache.

        Raises:
            BadArgument: the call does not tell.
        """
        if isinstance(self.before, str):
            raise BadArgument(self.before)
        return self.before

    @cached_property
    def positions(self) -> Tensor:
        """`[row or 1, new]`: which own token of its row each column is; -1 for padding."""
        cached = self.cached
        if self.mask is None:
            return torch.arange(cached, cached + self.new, device=self.device)[None]
        counted = self.mask.long().cumsum(-1) - 1
        return counted.masked_fill(~self.mask, -1)[:, cached:]

    @cached_property
    def prompt_lengths(self) -> Tensor:
        """`[row or 1]`: how many tokens of its own each row's prompt has."""
        columns = self.prompt_columns
        if self.mask is None:
            return torch.tensor([columns], device=self.device)
        # Not the tokens are counted but the padding: of a long prompt only a part may have come so far.
        return columns - (~self.mask[:, :columns]).long().sum(-1)

    @property
    def prompt_columns(self) -> int:
        """How many columns the prompt takes.

        Raises:
            BadArgument: nobody listened when the prompt ran.
        """
        if self.sequence.prompt is None:
            if isinstance(self.before, str):
                raise BadArgument(self.before)
            raise BadArgument(
                "this run goes on with a cache that was filled before, so where its prompt ends is unknown",
                expected="the prompt and what follows it in one steering block",
                write='where="all", or from_token(p) with p counted from the first token',
            )
        return self.sequence.prompt


class _Running(threading.local):
    """What runs in one thread: the pass of each tower, with the module that began it, and the generation around it."""

    def __init__(self) -> None:
        self.passes: dict[str, tuple[nn.Module, Call]] = {}
        self.generation: Sequence | None = None


class Watch:
    """Listens to a model: `current(tower)` is the pass that this thread runs now."""

    def __init__(self, model: Any) -> None:
        self.root: nn.Module = unwrap(model)
        self._running: _Running = _Running()
        self._caches: weakref.WeakKeyDictionary[Any, Sequence] = weakref.WeakKeyDictionary()
        self.before_pass: list[Callable[[], None]] = []
        self.users = 0

    def current(self, tower: str) -> Call | None:
        """The pass of this tower that runs now in this thread; None where a module is called by itself."""
        found = self._running.passes.get(tower)
        return None if found is None else found[1]

    # --- coming and going

    def start(self) -> None:
        """Listen."""
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
            self.root.generate = self._listening(self.root.generate)

    def stop(self) -> None:
        """Leave the model as it was."""
        for hook in self._hooks:
            hook.remove()
        if self._patched:
            del self.root.generate

    def _listening(self, generate: Any) -> Any:
        @wraps(generate)
        def listening(*args: Any, **kwargs: Any) -> Any:
            before, self._running.generation = self._running.generation, _begun(args, kwargs, self._two)
            try:
                return generate(*args, **kwargs)
            finally:
                self._running.generation = before

        return listening

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
                        for told in tuple(self.before_pass):
                            told()

        return begin

    def _after(self, module: nn.Module, _args: Any, output: Any) -> None:
        for tower, (owner, call) in list(self._running.passes.items()):
            if owner is module:
                del self._running.passes[tower]
                if not call.sequence.cached:
                    self._remember(cache_of(output), call.sequence)

    def _remember(self, cache: Any, sequence: Sequence) -> None:
        if hasattr(cache, "get_seq_length"):
            self._caches[cache], sequence.cached = sequence, True

    def _read(self, module: nn.Module, tower: str, args: tuple, kwargs: dict, prefix: str | None) -> Call | None:
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
            except BadArgument as untold:  # raised where somebody asks: what steers every token need not know
                before = str(untold)
        mask = None if isinstance(before, str) else _columns(mask_of(given, own), before + new)
        return Call(self._sequence(tower, cache_of(given), before, rows, new), rows, new, before, ids.device, mask)

    def _sequence(self, tower: str, cache: Any, before: int | str, rows: int, new: int) -> Sequence:
        if tower == "encoder":
            return Sequence(new, rows)
        if self._running.generation is not None:
            if self._running.generation.prompt is None and isinstance(before, int):
                self._running.generation.prompt = before + new
            return self._running.generation
        if before:  # some, or an unknown number
            return self._remembered(cache) or Sequence(None, rows)
        sequence = Sequence(new, rows)
        self._remember(cache, sequence)
        return sequence

    def _remembered(self, cache: Any) -> Sequence | None:
        return self._caches.get(cache) if hasattr(cache, "get_seq_length") else None


def _begun(args: tuple, kwargs: Mapping[str, Any], two_towers: bool) -> Sequence:
    """What a call of `generate` tells about its prompts; the rest its first pass does."""
    given = [*args[:1], *(kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds"))]
    ids = next((value for value in given if isinstance(value, Tensor)), None)
    # A long prompt may come in several passes, so its width is known from here where it can be; a decoder that reads
    # an encoder begins with a prompt of its own, which its first pass tells.
    return Sequence(None if ids is None or two_towers else ids.shape[1], None if ids is None else ids.shape[0])


def _columns(mask: Tensor | None, width: int) -> Tensor | None:
    """`[row, column]`, whether a token stands there."""
    if mask is None:
        return None
    if mask.dim() == 4:  # the newest token sees every token of its row
        last = mask[:, 0, -1, :width]
        return last if last.dtype == torch.bool else last == 0
    return mask[:, :width] != 0


_guard = threading.Lock()
_watches: weakref.WeakKeyDictionary[nn.Module, Watch] = weakref.WeakKeyDictionary()


def watch(model: Any) -> Watch:
    """The listener of a model; it is the same for all who ask, and goes with the last of them (`unwatch`)."""
    root = unwrap(model)
    with _guard:
        found = _watches.get(root)
        if found is None:
            found = _watches[root] = Watch(model)
            found.start()
        found.users += 1
    return found


def unwatch(found: Watch) -> None:
    """Stop listening, if nobody else does."""
    with _guard:
        found.users -= 1
        if not found.users:
            found.stop()
            del _watches[found.root]
