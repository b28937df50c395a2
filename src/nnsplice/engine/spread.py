"""Models over several processes: values gathered where they are read, split where they are written.

Under `fully_shard` a layer's weights are whole while it runs, and so is what it computes of this process's prompts.
Under tensor parallelism some values are spread: those that are DTensors are gathered where they are read. What is a
plain tensor has to be the same in every process, which is asked of each value, as a part of one would not be.
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

_reads: ContextVar[bool] = ContextVar("reads", default=False)


@contextmanager
def gathered(model: Any) -> Iterator[None]:
    """While this lasts, a model over several processes is taken, by those who read its values through `whole`."""
    _refuse_two_ways(unwrap(model))
    token = _reads.set(True)
    try:
        yield
    finally:
        _reads.reset(token)


def check_whole(root: nn.Module) -> None:
    """Raise for a model of which this process may hold a part only, unless that is taken care of.

    Raises:
        BadArgument: it is spread, or in a way that is not known.
    """
    if not (_reads.get() and meshes(root)):
        whole_here(root, "what is read or written")


def meshes(root: nn.Module) -> list[Any]:
    """The processes that parameters are spread over by name; none where anything is spread another way."""
    if not distributed.is_available() or not distributed.is_initialized():
        return []
    parameters = list(root.parameters())
    spread = [p for p in parameters if wire.spread(p)]
    if getattr(root, "_tp_size", None) not in (None, 1) or not all(hasattr(p, "device_mesh") for p in spread):
        return []
    return list({id(p.device_mesh): p.device_mesh for p in spread}.values())  # type: ignore[attr-defined]


def _refuse_two_ways(root: nn.Module) -> None:
    found = meshes(root)
    if len(found) > 1 or any(mesh.ndim > 1 for mesh in found):
        raise BadArgument(
            "this model is spread over processes in two ways at once, and which part is here is not known",
            expected="tensor parallelism or fully_shard, one of them, over one mesh",
        )


def is_dtensor(tensor: Any) -> bool:
    """Whether a tensor is spread by name: its shape is the whole one, and its numbers are gathered on demand."""
    return hasattr(tensor, "full_tensor")


def whole(root: nn.Module, value: Any, item: int | None, name: str) -> tuple[Any, Any]:
    """A module's value with its tensor gathered, and the spread tensor, or None where it was whole.

    Raises:
        BadArgument: it is another in each process, so that it may be a part.
    """
    over = meshes(root)
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

    Of a model over several processes every process gets those of the first, to the bit: what is decided by them is
    decided alike.
    """
    logits = wire.logits_of(model)
    logits = logits if at is None else logits[:, at]
    root = unwrap(model)
    over = meshes(root)
    if not over:
        return logits.clone()
    found, _ = whole(root, logits, None, "the logits")
    found, group = found.detach().clone(memory_format=torch.contiguous_format), over[0].get_group()
    distributed.broadcast(found, distributed.get_global_rank(group, 0), group)
    return found


def spread_like(tensor: Tensor, other: Any) -> Any:
    """A tensor that every process has whole, spread as another is: each keeps its own part, and nothing is sent."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(other.dtype), other.device_mesh, other.placements, src_data_rank=None)


def _agreed(tensor: Tensor, group: Any) -> bool:
    """Whether all processes hold the same numbers."""
    low, high = tensor.clone(), tensor.clone()
    distributed.all_reduce(low, distributed.ReduceOp.MIN, group)
    distributed.all_reduce(high, distributed.ReduceOp.MAX, group)
    return bool((low == high).all())


def _is_fully_sharded(root: nn.Module) -> bool:
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in root.modules())
