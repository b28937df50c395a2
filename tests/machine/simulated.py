"""Simulated GPUs, for tests of device code on a machine that has none.

    with Machine(count=2, capacity=8 << 30) as machine:  # torch.cuda.is_available() is True in here
        module.to("cuda:0")
        with machine.measured() as spent:
            run(module)
    assert 0 < spent.launches < 400 and spent.waits <= 2
    print(spent.lines["waits"].most_common(12))

Tensors stay plain CPU tensors, so that parameters, ties, autograd, views and pickles are the real ones. Each storage
has a tag, the device that it is said to be on, and three things go by the tag: the properties `Tensor.device` and
`is_cuda`; calls from Python (`.to`, `.cpu`, `.tolist`, `.numpy`, `device=`); and every operation below autograd, which
refuses tensors of several devices as a GPU does, tags what it makes, and counts.

Rules. A CPU tensor without dimensions may join pointwise operations, and a CPU tensor may index (it is copied); all
else that mixes devices raises torch's RuntimeError. An allocation beyond `capacity` raises torch.OutOfMemoryError. The
host waits at `item`, `bool`, `tolist`, `nonzero`, `masked_select`, `unique`, indexing by a mask, and at copies that are
not `non_blocking`.

Limits. What this cannot show:

* Numbers are the CPU's: rounding, dtypes without a kernel, and non-determinism of a GPU are not tested.
* A launch is an ATen operation as the CPU splits them up. A GPU fuses some and splits others, so counts are compared
  with each other (T = 8 beside T = 32), and no count is a number of kernels.
* The work areas of kernels are not in the peak, nor is what an allocator rounds up or cannot reuse.
* There are no seconds: what is counted is what usually takes them.
* There are no streams, so a race after a `non_blocking` copy is not seen; `pin_memory` does nothing.
* No torch.compile, CUDA graphs, DTensor, nor kernels that are not PyTorch's.
* On a way back through autograd, what a step makes anew is taken to be where the operation before it ran.
* Inside functions of torch.nn.functional that are written in Python, `.to` moves nothing.
* A test has to assert that something was launched: a run that stayed on the CPU has no waits either.

Libraries ask once whether there is a GPU and remember the answer, so a machine is entered before they are asked, and
what transformers remembers is forgotten at both ends.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch._dynamo  # modes import it late, and it cannot be imported while it is watched
from torch import Tensor

from machine.modes import CPU, Calls, Operations
from machine.spent import Spent, line_of_code

_REAL_DEVICE: Any = torch._C.TensorBase.device


class Machine:
    """A machine with simulated GPUs, while it is entered."""

    def __init__(self, count: int = 1, capacity: int = 80 << 30) -> None:
        self.count, self.capacity = count, capacity
        #: Device -> bytes that are alive.
        self.live: Counter[torch.device] = Counter()
        self._homes: dict[int, torch.device] = {}  # the storage's address -> its device
        self._open: list[Spent] = []
        self._making = threading.local()
        #: Where the last operation ran.
        self.last: torch.device | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Machine:
        def exchange(owner: Any, **new: Any) -> None:
            for name, value in new.items():
                self._stack.enter_context(mock.patch.object(owner, name, value, create=True))

        run = threading.Thread.run  # a mode holds in its own thread, so each new one enters them
        exchange(threading.Thread, run=lambda thread: self._watching(run, thread))
        device, is_cuda = property(self.device_of), property(lambda tensor: self.device_of(tensor).type == "cuda")
        exchange(Tensor, device=device, is_cuda=is_cuda)
        nothing = ("_lazy_init", "empty_cache", "manual_seed", "manual_seed_all", "reset_peak_memory_stats")
        exchange(
            torch.cuda,
            is_available=lambda: True,
            device_count=lambda: self.count,
            current_device=lambda: 0,
            get_device_capability=lambda *_: (9, 0),
            get_device_name=lambda *_: "simulated",
            is_bf16_supported=lambda *_: True,
            synchronize=lambda *_: self.wait(),
            get_rng_state=lambda *_: torch.random.get_rng_state(),
            set_rng_state=lambda *_, **__: None,
            mem_get_info=lambda device=0: (self.capacity - self.live[self.device(device)], self.capacity),
            **dict.fromkeys(nothing, lambda *_: None),
        )
        asked = vars(sys.modules.get("transformers.utils.import_utils", sys))
        for forget in [
            f.cache_clear for n, f in asked.items() if n.startswith("is_torch") and hasattr(f, "cache_clear")
        ]:
            forget()
            self._stack.callback(forget)
        self._stack.enter_context(self._watched())
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    @contextmanager
    def _watched(self) -> Iterator[None]:
        with Operations(self), Calls(self):
            yield

    def _watching(self, run: Any, thread: threading.Thread) -> None:
        with self._watched():
            run(thread)

    # --- where tensors are

    def device(self, device: Any) -> torch.device:
        """A device by its name or number.

        Raises:
            RuntimeError: there is no such device.
        """
        device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        if device.type != "cuda":
            return torch.device(device.type)
        if (device.index or 0) >= self.count:
            raise RuntimeError("CUDA error: invalid device ordinal")
        return torch.device("cuda", device.index or 0)

    def device_of(self, tensor: Tensor) -> torch.device:
        """Where a tensor is said to be."""
        with torch._C.DisableTorchFunction():
            real = _REAL_DEVICE.__get__(tensor)
            return self._homes.get(tensor.untyped_storage()._cdata, CPU) if real.type == "cpu" else real

    def put(self, tensor: Tensor, device: torch.device) -> None:
        """Tag the storage of a tensor that was made now.

        Raises:
            torch.OutOfMemoryError: the device has no room for it.
        """
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._homes or device.type != "cuda" or _REAL_DEVICE.__get__(tensor).type != "cpu":
            return
        if self.live[device] + size > self.capacity:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size:,} bytes on simulated {device}.")
        self._homes[key] = device
        self.live[device] += size
        for spent in self._open:
            spent.peak[str(device)] = max(spent.peak[str(device)], self.live[device])
        weakref.finalize(storage, self._freed, key, size).atexit = False

    def _freed(self, key: int, size: int) -> None:
        self.live[self._homes.pop(key)] -= size

    def move(
        self, tensor: Tensor, device: torch.device, dtype: Any = None, *, waits: bool = True, copy: bool = False
    ) -> Any:
        """`tensor.to(device, dtype)`."""
        source, dtype = self.device_of(tensor), dtype or tensor.dtype
        if source == device:
            with self.making(None):
                return tensor.to(dtype=dtype, copy=copy)
        if "meta" in (source.type, device.type):
            return tensor.to(device=device if device.type == "meta" else "cpu", dtype=dtype)
        if tensor.requires_grad and torch.is_grad_enabled():
            return _Move.apply(tensor, self, device, dtype, waits)
        self.copied(source, device, tensor, waits=waits)
        self.last = device
        with torch._C.DisableTorchFunction(), self.making(device):
            return tensor.to(dtype=dtype, copy=True)

    @contextmanager
    def making(self, wanted: torch.device | None, around: torch.device | None = None) -> Iterator[None]:
        """What is made meanwhile goes to `wanted`; where nothing is, to where the tensors of the call are."""
        before, self._making.value = self.made_on, (wanted, around)
        try:
            yield
        finally:
            self._making.value = before

    @property
    def made_on(self) -> tuple[torch.device | None, torch.device | None]:
        """See `making`."""
        return getattr(self._making, "value", (None, None))

    # --- what is counted

    @contextmanager
    def measured(self) -> Iterator[Spent]:
        """Count what this block spends."""
        alive = {f"cuda:{number}": self.live[torch.device("cuda", number)] for number in range(self.count)}
        spent = Spent(peak=dict(alive), before=alive)
        self._open.append(spent)
        try:
            yield spent
        finally:
            self._open = [other for other in self._open if other is not spent]

    def wait(self) -> None:
        """The host waits for a device."""
        for spent in self._open:
            spent.waits += 1
            spent.lines["waits"][line_of_code()] += 1

    def copied(self, source: torch.device, target: torch.device, tensor: Tensor, *, waits: bool = True) -> None:
        """A tensor is copied from one device to another."""
        size, kind = tensor.nbytes, "2".join("h" if place == CPU else "d" for place in (source, target))
        if not size:
            return
        for spent in self._open:
            spent.copied_bytes[kind] += size
            spent.copies[kind] += 1
            spent.lines[kind][line_of_code()] += 1
        if waits and kind != "d2d":
            self.wait()

    def launched(self, name: str) -> None:
        """A kernel starts."""
        for spent in self._open:
            spent.launches += 1
            spent.operations[name] += 1
            spent.lines["launches"][line_of_code()] += 1


class _Move(torch.autograd.Function):
    """A move that gradients go through, back to the device that the tensor came from."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, machine: Machine, target: torch.device, dtype: Any, waits: bool) -> Tensor:
        ctx.machine, ctx.source, ctx.dtype = machine, machine.device_of(tensor), tensor.dtype
        return machine.move(tensor.detach(), target, dtype, waits=waits)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return ctx.machine.move(gradient, ctx.source, ctx.dtype), None, None, None, None
