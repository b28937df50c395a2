"""Mappers between full tensors and DTensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from nnsplice.checkpoints.mapper.leaf import InPlace
from nnsplice.errors import MapperError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor.placement_types import Placement


def is_distributed(tensor: object) -> bool:
    """Whether it is a DTensor; does not import `torch.distributed.tensor`."""
    import sys

    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, cast("Any", module).DTensor)


def local_piece(tensor: Tensor) -> list[tuple[int, int]]:
    """The range of a DTensor that this process holds: `(start, stop)` for each dimension.

    Raises:
        MapperError: this process holds a summand instead.
    """
    from torch.distributed.tensor import _utils as utils

    dtensor = cast("Any", tensor)
    if any(placement.is_partial() for placement in dtensor.placements):
        raise MapperError(f"a DTensor placed as {dtensor.placements} holds summands", expected="shards or replicas")
    shape, offset = cast("Any", utils).compute_local_shape_and_global_offset(
        tensor.shape, dtensor.device_mesh, dtensor.placements
    )
    return [(start, start + length) for start, length in zip(offset, shape, strict=True)]


@dataclass(frozen=True)
class Distribute(InPlace):
    """Convert a tensor that every process has into a DTensor, without communication.

    >>> from nnsplice.checkpoints import Distribute
    >>> from tempfile import mkdtemp
    >>> from torch import distributed
    >>> distributed.init_process_group("gloo", init_method=f"file://{mkdtemp()}/team", rank=0, world_size=1)
    >>> mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
    >>> from torch.distributed.tensor import Shard
    >>> spread = Distribute("w", mesh, [Shard(0)]).apply({"w": torch.arange(4)})["w"]
    >>> spread.to_local(), spread.placements
    (tensor([0, 1, 2, 3]), (Shard(dim=0),))
    >>> distributed.destroy_process_group()

    Attributes:
        name: the name.
        device_mesh: the mesh.
        placements: the placement on each of its dimensions.
    """

    name: str
    device_mesh: DeviceMesh
    placements: Sequence[Placement]

    def _compute(self, *tensors: Tensor) -> Sequence[Tensor]:
        from torch.distributed import tensor as distributed

        made = cast("Any", distributed).distribute_tensor(
            tensors[0], self.device_mesh, list(self.placements), src_data_rank=None
        )
        return [made]


@dataclass(frozen=True)
class GatherFullTensor(InPlace):
    """Gather a DTensor into a full tensor; every process of its mesh takes part.

    >>> from nnsplice.checkpoints import Distribute, GatherFullTensor
    >>> from tempfile import mkdtemp
    >>> from torch import distributed
    >>> distributed.init_process_group("gloo", init_method=f"file://{mkdtemp()}/team", rank=0, world_size=1)
    >>> mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
    >>> from torch.distributed.tensor import Shard
    >>> spread = Distribute("w", mesh, [Shard(0)]).apply({"w": torch.arange(4)})
    >>> GatherFullTensor("w").apply(spread)
    {'w': tensor([0, 1, 2, 3])}
    >>> distributed.destroy_process_group()

    Attributes:
        name: the name.
    """

    name: str

    def _compute(self, *tensors: Tensor) -> Sequence[Tensor]:
        (tensor,) = tensors
        if not is_distributed(tensor):
            raise MapperError(f"{self.name} is no DTensor", expected="a tensor that is spread over a mesh")
        return [cast("Any", tensor).full_tensor().contiguous()]
