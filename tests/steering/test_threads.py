"""Threads: each pass is read with its own call, and a block steers the threads that are inside of it."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import nnsplice as ns
from steering.oracle import added, block
from steering.vectors import precise, vector

LONG, SHORT = torch.tensor([[3, 4, 5, 6, 7, 8]]), torch.tensor([[9, 10, 11]])
WAIT = 30.0


@pytest.fixture
def model() -> Any:
    return precise("gpt2")


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model._module(ids, use_cache=False).logits


def hooked(model: Any, ids: Tensor, coefficient: float, start: int) -> Tensor:
    """What a torch hook makes of it, alone and without us."""
    step = coefficient * vector(1)["layers[1].output[-1]"][0]
    handle = block(model._module, "gpt2", 1).register_forward_hook(added(step, lambda p, _n: p >= start, 0))
    found = logits(model, ids)
    handle.remove()
    return found


@contextmanager
def meeting(model: Any, parties: int) -> Iterator[None]:
    """Passes wait for each other before the first block, so that all of them have begun."""
    barrier = threading.Barrier(parties, timeout=WAIT)
    handle = block(model._module, "gpt2", 0).register_forward_pre_hook(lambda _m, _a: (barrier.wait(), None)[1])
    try:
        yield
    finally:
        handle.remove()


def together(*work: Callable[[], Any]) -> list[Any]:
    """Each in a thread of its own: what it returns, or the error that it raises."""
    found: list[Any] = [None] * len(work)

    def call(number: int) -> None:
        try:
            found[number] = work[number]()
        except Exception as error:
            found[number] = error

    threads = [threading.Thread(target=call, args=(number,)) for number in range(len(work))]
    for one in threads:
        one.start()
    for one in threads:
        one.join(WAIT)
    return found


def inside(work: Callable[[], Any]) -> Callable[[], Any]:
    """The same, in whatever blocks are open here."""
    context = contextvars.copy_context()
    return lambda: context.run(work)


def test_two_threads_in_one_block_are_each_read_with_their_own_call(model) -> None:
    expected = [hooked(model, ids, 2.0, 2) for ids in (LONG, SHORT)]
    with ns.steering.steer(model, vector(1), 2.0, where=ns.steering.from_token(2)), meeting(model, 2):
        found = together(*(inside(lambda ids=ids: logits(model, ids)) for ids in (LONG, SHORT)))
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() < 1e-12
    assert (expected[0] - logits(model, LONG)).abs().max() > 1e-3


def test_tasks_with_blocks_of_their_own_do_not_steer_each_other(model) -> None:
    coefficients = [-2.0, 1.0, 2.0, 3.0]
    expected = [hooked(model, LONG, coefficient, 1) for coefficient in coefficients]

    async def one(coefficient: float) -> Tensor:
        with ns.steering.steer(model, vector(1), coefficient, where=ns.steering.from_token(1)):
            return await asyncio.to_thread(logits, model, LONG)

    async def all_of_them() -> list[Tensor]:
        return await asyncio.gather(*map(one, coefficients))

    ns.steering.steer(model, vector(1))  # the order of the modules is learned from a pass, which meets nobody
    with meeting(model, len(coefficients)):
        found = asyncio.run(all_of_them())
    for got, other in zip(found, expected, strict=True):
        assert (got - other).abs().max() < 1e-12


def test_threads_with_blocks_of_their_own_do_not_steer_each_other(model) -> None:
    expected = [hooked(model, LONG, coefficient, 0) for coefficient in (2.0, -1.0)]
    opened = threading.Barrier(2, timeout=WAIT)
    closing = threading.Barrier(2, timeout=WAIT)

    def one(coefficient: float) -> Tensor:
        with ns.steering.steer(model, vector(1), coefficient):
            opened.wait()
            found = logits(model, LONG)
            closing.wait()
        return found

    found = together(lambda: one(2.0), lambda: one(-1.0))
    for got, other in zip(found, expected, strict=True):
        assert (got - other).abs().max() < 1e-12
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model._module.modules())


def test_one_value_may_be_open_in_two_threads_that_leave_it_crosswise(model) -> None:
    steering, expected = ns.steering.steer(model, vector(1), 2.0), hooked(model, LONG, 2.0, 0)
    opened, first_left = threading.Barrier(2, timeout=WAIT), threading.Event()

    def leaves_first() -> None:
        with steering:
            opened.wait()
            logits(model, LONG)
        first_left.set()

    def stays() -> Tensor:
        with steering:
            opened.wait()
            assert first_left.wait(WAIT)
            return logits(model, LONG)

    left, stayed = together(leaves_first, stays)
    assert left is None and (stayed - expected).abs().max() < 1e-12


def test_a_thread_without_a_block_is_refused_and_harms_nobody(model) -> None:
    expected, plain = hooked(model, LONG, 2.0, 0), logits(model, LONG)
    with ns.steering.steer(model, vector(1), 2.0):
        (refused,) = together(lambda: logits(model, SHORT))
        found = logits(model, LONG)
    assert isinstance(refused, ns.errors.BadArgument)
    assert "a steering block of another thread" in str(refused) and "copy_context" in str(refused)
    assert (found - expected).abs().max() < 1e-12
    assert torch.equal(logits(model, LONG), plain)
    assert torch.equal(together(lambda: logits(model, LONG))[0], plain)


def test_a_task_without_a_block_is_refused_while_another_task_waits_inside_its_own(model) -> None:
    """Both run in the thread of the event loop."""

    async def steers(opened: asyncio.Event, done: asyncio.Event) -> None:
        with ns.steering.steer(model, vector(1), 2.0):
            opened.set()
            await done.wait()
            logits(model, LONG)

    async def plain(opened: asyncio.Event, done: asyncio.Event) -> None:
        await opened.wait()
        try:
            with pytest.raises(ns.errors.BadArgument, match="is unknown"):
                logits(model, LONG)
        finally:
            done.set()

    async def both() -> None:
        opened, done = asyncio.Event(), asyncio.Event()
        await asyncio.gather(steers(opened, done), plain(opened, done))

    asyncio.run(both())
