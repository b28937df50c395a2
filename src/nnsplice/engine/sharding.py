"""Models over several processes: values are gathered when read and sharded when written.

Under `fully_shard` weights and values of a layer are whole while it runs. Under tensor parallelism some values are
DTensors, which are gathered when read. Plain tensors must be the same in every process, which is checked for each
value, as a shard would differ.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, distributed, nn

from nnsplice import wire
from nnsplice.atlas import unwrap, whole_here
from nnsplice.errors import BadArgument

_accepts_sharded: ContextVar[bool] = ContextVar("accepts_sharded", default=False)


@contextmanager
def accepting_sharded(model: Any) -> Iterator[None]:
    """Accept models over several processes in this block, for code that reads values through `gather`."""
    _refuse_two_ways(unwrap(model))
    token = _accepts_sharded.set(True)
    try:
        yield
    finally:
        _accepts_sharded.reset(token)


def check_unsharded(root: nn.Module) -> None:
    """Raise for a model of which this process may have a part only, unless sharded models are accepted.

    Raises:
        BadArgument: it is sharded, or in an unknown way.
    """
    if not (_accepts_sharded.get() and meshes_of(root)):
        whole_here(root, "what is read or written")


def meshes_of(root: nn.Module) -> list[Any]:
    """The device meshes of a model's DTensors; none if any parameter is sharded in another way."""
    if not distributed.is_available() or not distributed.is_initialized():
        return []
    parameters = list(root.parameters())
    sharded = [p for p in parameters if wire.sharding_text(p)]
    if getattr(root, "_tp_size", None) not in (None, 1) or not all(hasattr(p, "device_mesh") for p in sharded):
        return []
    return list({id(p.device_mesh): p.device_mesh for p in sharded}.values())  # type: ignore[attr-defined]


def _refuse_two_ways(root: nn.Module) -> None:
    found = meshes_of(root)
    if len(found) > 1 or any(mesh.ndim > 1 for mesh in found):
        raise BadArgument(
            "this model is spread over processes in two ways at once, and which part is here is not known",
            expected="tensor parallelism or fully_shard, one of them, over one mesh",
        )


def is_dtensor(tensor: Any) -> bool:
    """Whether a tensor is a DTensor."""
    return hasattr(tensor, "full_tensor")


def gather(root: nn.Module, value: Any, item: int | None, name: str) -> tuple[Any, Any]:
    """A module's value with its tensor gathered, and the DTensor, or None if it was whole.

    Raises:
        BadArgument: a plain tensor that differs between processes, so that it may be a part.
    """
    over = meshes_of(root)
    if not over:
        return value, None
    parts = [value] if isinstance(value, Tensor) else list(value.values() if isinstance(value, dict) else value)
    held: Any = parts[item or 0]
    if is_dtensor(held):
        return wire.repack(value, item, held.full_tensor()), held
    if not _is_fully_sharded(root):
        plain, group = held.detach(), over[0].get_group()
        shape = torch.tensor([plain.dim(), *plain.shape, *[0] * 8][:8], device=plain.device)
        same = _agreed(shape, group) and _agreed(plain.double(), group)
        if not same:
            raise BadArgument(
                f"{name} is another tensor in each process: a part, or a summand, of what it is called",
                expected="a site that every process has whole, such as the stream, attention, the MLP",
                write="use_local_output=False in the plan of its module, which says how it is spread",
            )
    return value, None


def read_logits(model: Any, at: int | None = None) -> Tensor:
    """Inside a trace: the logits `[prompt, token, vocab]`, or those of one token `[prompt, vocab]`, in a copy.

    With several processes, all get the logits of the first, bit for bit, so that they take the same decisions.
    """
    logits = wire.logits_of(model)
    logits = logits if at is None else logits[:, at]
    root = unwrap(model)
    over = meshes_of(root)
    if not over:
        return logits.clone()
    found, _ = gather(root, logits, None, "the logits")
    found, group = found.detach().clone(memory_format=torch.contiguous_format), over[0].get_group()
    distributed.broadcast(found, distributed.get_global_rank(group, 0), group)
    return found


def shard_like(tensor: Tensor, other: Any) -> Any:
    """Shard a tensor like another one: each process has it whole and keeps its part, without communication."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(other.dtype), other.device_mesh, other.placements, src_data_rank=None)


def _agreed(tensor: Tensor, group: Any) -> bool:
    """Whether all processes have the same numbers."""
    low, high = tensor.clone(), tensor.clone()
    distributed.all_reduce(low, distributed.ReduceOp.MIN, group)
    distributed.all_reduce(high, distributed.ReduceOp.MAX, group)
    return bool((low == high).all())


def _is_fully_sharded(root: nn.Module) -> bool:
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in root.modules())
