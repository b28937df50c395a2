"""Change a value however the model is called: directly, in `generate`, in a trace.

nnsight edits have no effect when the Hugging Face module itself is called, and a trace does not see what a torch hook
makes of an output. So outputs are changed in the body that nnsight's controller calls, which runs in every case, and
inputs in a torch hook, which runs before the controller.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from nnsplice.engine.tracing import Arguments, Body

#: The value at an end of a module -> the new value. An input is the call's `(args, kwargs)`.
Change = Callable[[Any], Any]


class _Tap:
    """The changes at one end of one module, in the order in which they were added."""

    def __init__(self, module: nn.Module, end: str) -> None:
        self.end: str = end
        self.changes: list[Change] = []
        self._call: Callable[..., Any] | None = None
        if end == "output":
            self.body: Body = Body(module)
            self.inner: Callable[..., Any] = self.body.function
            self.attach()
        else:
            self.hook: RemovableHandle = module.register_forward_pre_hook(self._before, with_kwargs=True)

    def attach(self) -> None:
        """Wrap the body again if another one replaced it (`.source` rebuilds a module's body)."""
        if self.end == "output" and self.body.function is not self._call:
            self.inner = self.body.function
            self._call = _around(self.inner, self.changes)
            self.body.function = self._call

    def _before(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        value: Any = (args, kwargs)
        for change in tuple(self.changes):  # another thread may remove one
            value = change(value)
        return value

    def remove(self) -> None:
        """Leave the module as it was."""
        if self.end == "input":
            self.hook.remove()
        elif self.body.function is self._call:
            self.body.function = self.inner


def _around(inner: Callable[..., Any], changes: list[Change]) -> Callable[..., Any]:
    def body(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        value = inner(module, *args, **kwargs)
        for change in tuple(changes):
            value = change(value)
        return value

    return body


#: For adding and removing changes.
_guard = threading.Lock()
_taps: weakref.WeakKeyDictionary[nn.Module, dict[str, _Tap]] = weakref.WeakKeyDictionary()


class Interception:
    """One change in a model until it is removed; several at one site may be removed in any order."""

    def __init__(self, module: nn.Module, end: str, change: Change) -> None:
        self.module: nn.Module = module
        self.end: str = end
        self.change: Change = change
        with _guard:
            taps = _taps.setdefault(module, {})
            self.tap: _Tap = taps.get(end) or taps.setdefault(end, _Tap(module, end))
            self.tap.changes.append(change)

    def attach(self) -> None:
        """Make sure that the change runs, whatever happened to the module meanwhile."""
        with _guard:
            self.tap.attach()

    def remove(self) -> None:
        """Remove the change; without any changes the module is as it was."""
        with _guard:
            self.tap.changes.remove(self.change)
            if not self.tap.changes:
                self.tap.remove()
                del _taps[self.module][self.end]
