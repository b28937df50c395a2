"""The digest of a model's weights, in which every number counts.

Parameters count, and those buffers that are saved with a model: routers' biases, running means, quantised weights. What
a model computes for itself (rotary frequencies, caches) does not: it follows from the config, and may change in a run.

A tensor that was read once is not read again while torch says that nothing was written to it. torch does not count what
is written through `tensor.data`, or past torch; so where a file is at stake, all of it is read (`anew=True`).

A tensor that is spread over processes is gathered, so that the digest is the one of the whole model, in each of them.
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
from nnsplice.engine.spread import is_dtensor
from nnsplice.engine.team import Team
from nnsplice.errors import BadArgument

#: A tensor that was read, the state it was in, and its checksum.
_Read = tuple[weakref.ref[Tensor], tuple[Any, ...], int]
#: Model -> what was read of it, by the tensor's `id`.
_READ: weakref.WeakKeyDictionary[nn.Module, dict[int, _Read]] = weakref.WeakKeyDictionary()


def weights_digest(model: Any, *, anew: bool = False) -> str:
    """A short digest that tells two models of one name apart: every number counts, as one edited head may differ.

    Of an adapter it also tells whether it is switched on. What accelerate keeps on the CPU or on disk is read there.

    Args:
        anew: read every number again, also where torch says that none was written since.

    Raises:
        BadArgument: some numbers are nowhere to be read, so that other models would have the same digest.
    """
    root = unwrap(model)
    found: dict[int, tuple[str, Tensor]] = {}  # a tied parameter once, by its first name
    buffers: list[tuple[str, Tensor]] = []
    adapters: list[Any] = []
    for home, module in root.named_modules():  # one walk for all, as this is done before every sweep
        front = f"{home}." if home else ""
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(id(parameter), (front + name, parameter))
        if module._buffers:
            computed = module._non_persistent_buffers_set
            buffers += [(front + n, b) for n, b in module._buffers.items() if b is not None and n not in computed]
        # PEFT's layers, told by their parts so that this room needs no PEFT.
        if "_active_adapter" in module.__dict__:
            adapters.append((home, module.__dict__["_active_adapter"], getattr(module, "_disable_adapters", False)))
    parameters = list(found.values())
    told = hashlib.sha256(str([(name, tuple(p.shape)) for name, p in parameters]).encode())
    if buffers:
        told.update(str([(name, tuple(b.shape)) for name, b in buffers]).encode())
    for adapter in adapters:
        told.update(str(adapter).encode())
    before: dict[int, _Read] = {} if anew else _READ.get(root, {})
    team = Team.of(root)
    held = [
        _offloaded(root, name) if plain.is_meta else plain
        for name, tensor in (*parameters, *buffers)
        for plain in _stored(tensor)
    ]
    states = [_state(tensor, team.size) for tensor in held]
    known = [_known(before, tensor, state) for tensor, state in zip(held, states, strict=True)]
    if team.size > 1 and not team.least(
        int(all(n is not None for n, t in zip(known, held, strict=True) if is_dtensor(t)))
    ):
        known = [None] * len(known)  # all of them gather, or none
    read = _read([number if number is not None else _summed(t) for number, t in zip(known, held, strict=True)])
    noted = [None if s is None else (id(t), weakref.ref(t), s) for t, s in zip(held, states, strict=True)]
    for number in read:
        told.update(b"%d" % number)
    _READ[root] = {note[0]: (*note[1:], number) for note, number in zip(noted, read, strict=True) if note is not None}
    return told.hexdigest()[:16]


def _state(tensor: Any, processes: int) -> tuple[Any, ...] | None:
    """What is another once a tensor was written to; None where nothing tells."""
    if is_dtensor(tensor):
        tensor = tensor._local_tensor
    elif processes > 1:
        return None  # `fully_shard` gathers weights into tensors of which torch does not count that
    if tensor.is_inference():  # torch does not count what is written to those
        return None
    return tensor.data_ptr(), tensor._version, tensor.shape, tensor.stride(), tensor.dtype


def _known(before: dict[int, _Read], tensor: Tensor, state: tuple[Any, ...] | None) -> int | None:
    """The checksum of a tensor that was read before and not written to since."""
    known = None if state is None else before.get(id(tensor))
    return known[2] if known is not None and known[0]() is tensor and known[1] == state else None


def _summed(tensor: Any) -> int | Tensor:
    return summed((tensor.full_tensor() if is_dtensor(tensor) else tensor).detach())


def _read(sums: Sequence[int | Tensor]) -> list[int]:
    """Numbers of which some are on devices: each device is waited for once."""
    there: dict[torch.device, list[int]] = {}
    for at, one in enumerate(sums):
        if isinstance(one, Tensor):
            there.setdefault(one.device, []).append(at)
    found = list(sums)
    for places in there.values():
        for at, number in zip(places, torch.stack([torch.as_tensor(sums[at]) for at in places]).tolist(), strict=True):
            found[at] = number
    return [int(number) for number in found]


def _stored(tensor: Any) -> Iterator[Any]:
    """The plain tensors that hold a tensor's numbers: itself, or the parts of a quantised one, which cannot be cut."""
    if is_dtensor(tensor) or not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _stored(getattr(tensor, name))


def _offloaded(root: nn.Module, name: str) -> Tensor:
    """The numbers of a parameter that is on the meta device between its uses, as accelerate's hooks keep them."""
    parts = name.split(".")
    for cut in range(len(parts) - 1, -1, -1):
        hook = root.get_submodule(".".join(parts[:cut])).__dict__.get("_hf_hook")
        for one in getattr(hook, "hooks", (hook,)):
            held = getattr(one, "weights_map", None)
            try:
                found = None if held is None else held[".".join(parts[cut:])]
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
