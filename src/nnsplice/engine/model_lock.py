"""Locks on shared models, for threads that run one model or models with the same config.

Packed runs exchange attention by a name in the model's config, and several models may share a config. So the config
objects are locked. A thread that runs such a model without the lock meets the exchanged attention, which refuses it.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from nnsplice.atlas import unwrap
from nnsplice.errors import BadArgument

#: The lock of each shared object by its id, and the number of threads that hold or await it.
_locks: dict[int, tuple[threading.RLock, int]] = {}
_guard = threading.Lock()
#: By model: the config it had when all configs were collected, and these configs.
_configs: weakref.WeakKeyDictionary[nn.Module, tuple[Any, list[Any]]] = weakref.WeakKeyDictionary()


@contextmanager
def locked(model: Any) -> Iterator[None]:
    """Run a model while no other thread exchanges its attention, or that of a model with which it shares a config."""
    root = unwrap(model)
    own = getattr(root, "config", None)
    known = _configs.get(root)
    if known is None or known[0] is not own:
        known = _configs[root] = own, configs_of(root)
    with ExitStack() as stack:
        for key in sorted({id(shared) for shared in (root, *known[1])}):  # in one order, against deadlocks
            stack.enter_context(_locked(key))
        yield


@contextmanager
def _locked(key: int) -> Iterator[None]:
    with _guard:
        lock, users = _locks.get(key, (threading.RLock(), 0))
        _locks[key] = lock, users + 1
    try:
        with lock:
            yield
    finally:
        with _guard:
            lock, users = _locks.pop(key)
            if users > 1:
                _locks[key] = lock, users - 1


def configs_of(root: nn.Module) -> list[Any]:
    """All config objects of a model's modules, each before the configs inside it."""
    found: dict[int, Any] = {}

    def visit(config: Any) -> None:
        if config is None or id(config) in found:
            return
        found[id(config)] = config
        for name in getattr(config, "sub_configs", None) or ():
            visit(getattr(config, name, None))

    for module in root.modules():
        visit(module.__dict__.get("config"))
    return list(found.values())


@contextmanager
def other_attention(root: nn.Module, name: str) -> Iterator[dict[int, str]]:
    """Set the attention implementation of a model; yields the implementations before, by the config's id."""
    with locked(root), ExitStack() as stack:
        configs = [config for config in configs_of(root) if hasattr(config, "_attn_implementation")]
        before = {id(config): config._attn_implementation for config in configs}
        # Setting a config also sets the configs inside it, so outer ones are restored first (entered last).
        for config in reversed(configs):
            stack.callback(setattr, config, "_attn_implementation", before[id(config)])
        for config in configs:
            config._attn_implementation = name
        yield before


def other_thread_error() -> BadArgument:
    """The error for a thread that meets an attention exchanged by another thread."""
    return BadArgument(
        "another thread sweeps this model, or one with the same config object, so its attention is not its own now",
        expected="one thread at a time; sweeps and captures take turns by themselves, a plain call does not",
        write="copy.deepcopy(model) for a thread of its own",
    )
