"""What the simulated machine sees of a program: calls of torch from Python, and operations below autograd."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from machine.simulated import Machine

CPU = torch.device("cpu")
_parse_to: Any = getattr(torch._C, "_nn")._parse_to  # noqa: B009  # its stubs do not have it
#: Operations whose result has a shape that depends on numbers, so that the host waits for them.
SHAPED_BY_DATA = {"nonzero", "masked_select", "unique_dim", "_unique2", "unique_consecutive", "equal", "bincount"}
#: Operations that allocate or look, and launch nothing. Views are told by their schema.
WITHOUT_LAUNCH = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh", "_unsafe_view", "detach",
    "alias", "is_same_size", "_local_scalar_dense",
}  # fmt: skip
#: Operations that take tensors of indices, which may stand on the host: they are copied.
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
#: Operations beside the pointwise ones that take a single number of the host.
FILLING = {"fill_", "masked_fill", "masked_fill_", "where"}


def tensors_in(*values: Any) -> list[Tensor]:
    """All tensors in these, in whatever containers they stand."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


class Calls(TorchFunctionMode):
    """Calls from Python: moves between devices, tensors made on a device, ways to the host."""

    def __init__(self, machine: Machine) -> None:
        super().__init__()
        self.machine = machine

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """One call of a function or method of torch."""
        machine, kwargs, name = self.machine, dict(kwargs or {}), getattr(func, "__name__", "")
        if func is torch.device:
            return func(*(("cuda", *args) if args and type(args[0]) is int else args), **kwargs)
        if func in (Tensor.to, Tensor.cpu, Tensor.cuda):
            return self._move(name, args[0], args[1:], kwargs)
        if func is Tensor.pin_memory:
            return args[0]
        devices = map(machine.device_of, tensors_in(args, kwargs))
        around = next((device for device in devices if device.type == "cuda"), None)
        if around is not None and name in ("numpy", "__array__"):
            raise TypeError(f"can't convert {around} device type tensor to numpy. Use Tensor.cpu() first")
        if around is not None and name == "tolist":
            machine.copied(around, CPU, args[0])
        asked = kwargs.get("device")
        own = machine.device_of(args[0]) if name == "new_tensor" else None
        target = own if asked is None else machine.device(asked)
        if target is None or target.type not in ("cpu", "cuda"):
            with machine.making(None, around):
                return func(*args, **kwargs)
        kwargs["device"] = "cpu"
        if name in ("tensor", "as_tensor", "new_tensor"):
            leaf = kwargs.pop("requires_grad", False)
            given = args[-1] if isinstance(args[-1], Tensor) else func(*args, **kwargs)
            made = machine.move(given, target, kwargs.get("dtype"))
            return made.requires_grad_() if leaf else made
        with machine.making(target):
            return func(*args, **kwargs)

    def _move(self, name: str, tensor: Tensor, rest: Any, kwargs: Any) -> Tensor:
        machine, copy = self.machine, kwargs.pop("copy", False)
        if name in ("cpu", "cuda"):
            given = [*rest, kwargs.get("device", 0)][0]
            return machine.move(tensor, CPU if name == "cpu" else machine.device(given))
        other = rest[0] if rest else kwargs.get("other")
        if isinstance(other, Tensor):
            waits = not kwargs.get("non_blocking", False)
            return machine.move(tensor, machine.device_of(other), other.dtype, waits=waits, copy=copy)
        rest = [machine.device(value) if type(value) is int else value for value in rest]
        named = {key: machine.device(value) if type(value) is int else value for key, value in kwargs.items()}
        device, dtype, free, _ = _parse_to(*rest, **named)
        target = machine.device(device or machine.device_of(tensor))
        return machine.move(tensor, target, dtype, waits=not free, copy=copy)


class Operations(TorchDispatchMode):
    """Operations that reach a device: each is one kernel there, but for views."""

    def __init__(self, machine: Machine) -> None:
        super().__init__()
        self.machine = machine

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """One operation of ATen."""
        machine, kwargs = self.machine, kwargs or {}
        if func._can_decompose() and "attention" not in str(func):  # those of inference mode come here whole
            with self:
                return func.decompose(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            name, (wanted, around) = func._overloadpacket.__name__, machine.made_on
            if torch._C._current_graph_task_id() != -1:  # on a way back, where each step makes tensors where it is
                around = machine.last
            tensors = tensors_in(args, kwargs)
            homes = [machine.device_of(tensor) for tensor in tensors]
            home = next((device for device in homes if device.type == "cuda"), None)
            if home is not None:
                self._check(func, name, args, tensors, homes, home)
            asked = kwargs.get("device")
            if asked is not None and asked.type == "cuda":
                wanted, kwargs = wanted or machine.device(asked), {**kwargs, "device": CPU}
            target = wanted or home or (None if tensors else around)
            out = func(*args, **kwargs)
            if target is not None and target.type == "cuda":
                machine.last = target
                for made in tensors_in(out):
                    machine.put(made, target)
                views = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
                if not views and name not in WITHOUT_LAUNCH:
                    machine.launched(name)
            return out

    def _check(self, func: Any, name: str, args: Any, tensors: Any, homes: Any, home: torch.device) -> None:
        """Refuse what a GPU refuses, and count waits and copies."""
        machine = self.machine
        if name == "copy_" and homes[0] != homes[1]:
            return machine.copied(homes[1], homes[0], tensors[1], waits=not (len(args) > 2 and args[2]))
        indices = [index for index in (args[1] or ()) if index is not None] if name in INDEXING else []
        masks = any(index.dtype in (torch.bool, torch.uint8) for index in indices)
        masks = masks and (name == "index" or args[2].numel() > 1)  # a single number is filled in instead
        if masks or name in SHAPED_BY_DATA or func is torch.ops.aten.repeat_interleave.Tensor:
            machine.wait()
        joins = torch.Tag.pointwise in func.tags or name in INDEXING | FILLING
        for tensor, its in zip(tensors, homes, strict=True):
            if its == CPU != home and any(tensor is index for index in indices):
                machine.copied(CPU, home, tensor)
            elif its != home and not (its == CPU and tensor.dim() == 0 and joins):
                raise RuntimeError(
                    "Expected all tensors to be on the same device, but found at least two devices, "
                    f"{home} and {its}! (when checking arguments of aten::{name})"
                )
        if name == "_local_scalar_dense":
            machine.copied(home, CPU, tensors[0])
        return None
