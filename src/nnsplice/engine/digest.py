"""The digest of a model's weights, in which every number counts.

It covers parameters, and buffers that are saved with a model: routers' biases, running means, quantised weights.
Buffers that a model computes (rotary frequencies, caches) are left out: they follow from the config, and may change in
a run.

A tensor is not read again while torch reports no write to it. torch does not report writes through `tensor.data` or
past torch, so for files all tensors are read (`anew=True`).

Sharded tensors are gathered, so that every process has the digest of the whole model.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nnsplice.atlas import unwrap
from nnsplice.digests import summed
from nnsplice.engine.process_group import ProcessGroup
from nnsplice.engine.sharding import is_dtensor
from nnsplice.errors import BadArgument

#: A tensor, its state when it was read, and its checksum.
_Checksum = tuple[weakref.ref[Tensor], tuple[Any, ...], int]
#: Model -> known checksums, by the tensor's `id`.
_CHECKSUMS: weakref.WeakKeyDictionary[nn.Module, dict[int, _Checksum]] = weakref.WeakKeyDictionary()


def weights_digest(model: Any, *, anew: bool = False) -> str:
    """A short digest that differs between two models of one name, even if only one number differs.

    It includes whether adapters are on. Weights that accelerate keeps on the CPU or on disk are read there.

    Args:
        anew: read every number again, also if torch reports no write.

    Raises:
        BadArgument: some weights cannot be read, so that other models would have the same digest.
    """
    root = unwrap(model)
    found: dict[int, tuple[str, Tensor]] = {}  # a tied parameter once, by its first name
    buffers: list[tuple[str, Tensor]] = []
    adapters: list[Any] = []
    for home, module in root.named_modules():  # a single walk, as this runs before every sweep
        front = f"{home}." if home else ""
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(id(parameter), (front + name, parameter))
        if module._buffers:
            computed = module._non_persistent_buffers_set
            buffers += [(front + n, b) for n, b in module._buffers.items() if b is not None and n not in computed]
        # PEFT's layers, recognised by their attributes so that this room does not import PEFT.
        if "_active_adapter" in module.__dict__:
            adapters.append((home, module.__dict__["_active_adapter"], getattr(module, "_disable_adapters", False)))
    parameters = list(found.values())
    digest = hashlib.sha256(str([(name, tuple(p.shape)) for name, p in parameters]).encode())
    if buffers:
        digest.update(str([(name, tuple(b.shape)) for name, b in buffers]).encode())
    for adapter in adapters:
        digest.update(str(adapter).encode())
    before: dict[int, _Checksum] = {} if anew else _CHECKSUMS.get(root, {})
    group = ProcessGroup.of(root)
    stored = [
        _offloaded(root, name) if plain.is_meta else plain
        for name, tensor in (*parameters, *buffers)
        for plain in _stored(tensor)
    ]
    states = [_state(tensor, group.size) for tensor in stored]
    known = [_known(before, tensor, state) for tensor, state in zip(stored, states, strict=True)]
    if group.size > 1 and not group.minimum(
        int(all(n is not None for n, t in zip(known, stored, strict=True) if is_dtensor(t)))
    ):
        known = [None] * len(known)  # all processes gather, or none
    sums = _on_host([number if number is not None else _summed(t) for number, t in zip(known, stored, strict=True)])
    for number in sums:
        digest.update(b"%d" % number)
    _CHECKSUMS[root] = {
        id(tensor): (weakref.ref(tensor), state, number)
        for tensor, state, number in zip(stored, states, sums, strict=True)
        if state is not None
    }
    return digest.hexdigest()[:16]


def _state(tensor: Any, processes: int) -> tuple[Any, ...] | None:
    """A value that changes with every write to a tensor; None if there is no such value."""
    if is_dtensor(tensor):
        tensor = tensor._local_tensor
    elif processes > 1:
        return None  # `fully_shard` gathers weights into tensors without a version
    if tensor.is_inference():  # these have no version either
        return None
    return tensor.data_ptr(), tensor._version, tensor.shape, tensor.stride(), tensor.dtype


def _known(before: dict[int, _Checksum], tensor: Tensor, state: tuple[Any, ...] | None) -> int | None:
    """The checksum of a tensor that was read before and not changed since."""
    known = None if state is None else before.get(id(tensor))
    return known[2] if known is not None and known[0]() is tensor and known[1] == state else None


def _summed(tensor: Any) -> int | Tensor:
    return summed((tensor.full_tensor() if is_dtensor(tensor) else tensor).detach())


def _on_host(sums: Sequence[int | Tensor]) -> list[int]:
    """Checksums as numbers, with one copy from each device."""
    by_device: dict[torch.device, list[int]] = {}
    for index, number in enumerate(sums):
        if isinstance(number, Tensor):
            by_device.setdefault(number.device, []).append(index)
    found = list(sums)
    for indices in by_device.values():
        copied = torch.stack([torch.as_tensor(sums[index]) for index in indices]).tolist()
        for index, number in zip(indices, copied, strict=True):
            found[index] = number
    return [int(number) for number in found]


def _stored(tensor: Any) -> Iterator[Any]:
    """The plain tensors that store a tensor: itself, or the parts of a quantised one."""
    if is_dtensor(tensor) or not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _stored(getattr(tensor, name))


def _offloaded(root: nn.Module, name: str) -> Tensor:
    """The weights of a parameter on the meta device, which hooks of accelerate keep between its uses."""
    parts = name.split(".")
    for cut in range(len(parts) - 1, -1, -1):
        hook = root.get_submodule(".".join(parts[:cut])).__dict__.get("_hf_hook")
        for single in getattr(hook, "hooks", (hook,)):
            weights = getattr(single, "weights_map", None)
            try:
                found = None if weights is None else weights[".".join(parts[cut:])]
            except KeyError:
                found = None
            if isinstance(found, Tensor) and not found.is_meta:
                return found
    raise BadArgument(
        f"{name} is on the meta device, and no hook of accelerate says where its numbers are, so this model cannot be "
        "told from another of its kind",
        expected="a model whose weights are here, or offloaded by accelerate",
        write="ns.load(name), or accelerate.cpu_offload(model)",
    )
