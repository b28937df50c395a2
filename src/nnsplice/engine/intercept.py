"""Change a value wherever the model is called from: by hand, in `generate`, in a trace.

An nnsight edit is passed by when somebody calls the Hugging Face module itself, and what a torch hook makes of an
output is not seen inside a trace. So an output is changed in the body that nnsight's controller calls, which every way
of calling the model goes through; and an input in a torch hook, which comes before the controller.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from nnsplice.engine.tracing import Arguments, Body

#: What a module holds at one of its ends -> what the run goes on with. An input is the call's `(args, kwargs)`.
Change = Callable[[Any], Any]


class _Tap:
    """The changes at one end of one module, in the order in which they were asked for."""

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
        """Stand in the way again where another took the place (`.source` builds a module's body anew)."""
        if self.end == "output" and self.body.function is not self._call:
            self.inner = self.body.function
            self._call = _around(self.inner, self.changes)
            self.body.function = self._call

    def _before(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        value: Any = (args, kwargs)
        for change in tuple(self.changes):  # another thread may take one out
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


#: One thread at a time puts changes in and takes them out.
_guard = threading.Lock()
_taps: weakref.WeakKeyDictionary[nn.Module, dict[str, _Tap]] = weakref.WeakKeyDictionary()


class Interception:
    """One change that stands in a model until it is removed; several may stand at one site, whatever their order."""

    def __init__(self, module: nn.Module, end: str, change: Change) -> None:
        self.module: nn.Module = module
        self.end: str = end
        self.change: Change = change
        with _guard:
            taps = _taps.setdefault(module, {})
            self.tap: _Tap = taps.get(end) or taps.setdefault(end, _Tap(module, end))
            self.tap.changes.append(change)

    def attach(self) -> None:
        """See to it that the change is met, whatever happened to the module meanwhile."""
        with _guard:
            self.tap.attach()

    def remove(self) -> None:
        """Take the change out; the module is as it was when no other is left."""
        with _guard:
            self.tap.changes.remove(self.change)
            if not self.tap.changes:
                self.tap.remove()
                del _taps[self.module][self.end]
