"""Threads: locks on shared models, and the thread that a block belongs to.

Attention is exchanged by a name in a model's config, and a config may serve several models. So what is locked are the
config objects, and a thread that runs such a model meanwhile without a turn is refused by the attention that it meets.
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from nnsplice.atlas import unwrap
from nnsplice.errors import BadArgument

#: A lock for each object that is shared, by its id, and how many use it or wait for it.
_locks: dict[int, tuple[threading.RLock, int]] = {}
_guard = threading.Lock()
#: By model: its own config when it was looked through, and all that were found.
_configs: weakref.WeakKeyDictionary[nn.Module, tuple[Any, list[Any]]] = weakref.WeakKeyDictionary()


@contextmanager
def turn(model: Any) -> Iterator[None]:
    """Run a model while no other thread exchanges its attention, or that of a model with which it shares a config."""
    root = unwrap(model)
    own = getattr(root, "config", None)
    known = _configs.get(root)
    if known is None or known[0] is not own:
        known = _configs[root] = own, configs_of(root)
    shared = [root, *known[1]]
    with ExitStack() as stack:
        for key in sorted({id(one) for one in shared}):  # in one order, so that nobody waits for each other
            stack.enter_context(_held(key))
        yield


@contextmanager
def _held(key: int) -> Iterator[None]:
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
    """Every config object that a model's modules read, and those inside them; the outer before the inner."""
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
    """Let a model look its attention up under another name: those that stood there before, by the config's id."""
    with turn(root), ExitStack() as stack:
        configs = [config for config in configs_of(root) if hasattr(config, "_attn_implementation")]
        before = {id(config): config._attn_implementation for config in configs}
        # Setting a config sets those inside it too, so the outer ones are put back first (the last that is entered).
        for config in reversed(configs):
            stack.callback(setattr, config, "_attn_implementation", before[id(config)])
        for config in configs:
            config._attn_implementation = name
        yield before


def elsewhere() -> BadArgument:
    """What is said to a thread that meets an attention which another thread has put there."""
    return BadArgument(
        "another thread sweeps this model, or one with the same config object, so its attention is not its own now",
        expected="one thread at a time; sweeps and captures take turns by themselves, a plain call does not",
        write="copy.deepcopy(model) for a thread of its own",
    )


Home = tuple[int, object]


def home() -> Home:
    """Where this runs: the thread, and the task of its event loop, if it has one."""
    try:
        task: object = asyncio.current_task()
    except RuntimeError:
        task = None
    return threading.get_ident(), task


class _Aside(threading.local):
    now: bool = False


_aside = _Aside()


@contextmanager
def aside() -> Iterator[None]:
    """Run a model only to see how it runs: in this thread no steering block is meant."""
    before, _aside.now = _aside.now, True
    try:
        yield
    finally:
        _aside.now = before


def is_aside() -> bool:
    """Whether this thread only looks."""
    return _aside.now
