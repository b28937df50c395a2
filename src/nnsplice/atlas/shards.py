"""Parameters that are spread over processes: their names and shapes are whole, their numbers here are not.

An address says which columns of the whole tensor are a head's; in a shard the same columns are others'. Until those
are translated, such models are refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, distributed, nn

from nnsplice.errors import BadArgument
from nnsplice.wire import sharding_text


def refuse_sharded(parameters: Iterable[tuple[str, Any]], what: str) -> None:
    """Raise for a parameter of which this process may hold a part only.

    Args:
        parameters: names and tensors.
        what: what is asked for, as the subject of a sentence.

    Raises:
        BadArgument: one is a DTensor (tensor parallelism, `fully_shard`) or a part of FSDP's flat parameter.
    """
    if not distributed.is_available() or not distributed.is_initialized():
        return  # without processes nothing is spread, so the parameters need not be looked at
    for name, tensor in parameters:
        how = sharding_text(tensor) if isinstance(tensor, Tensor) else ""
        if how:
            raise BadArgument(
                f"{name} is {how}, and an address means rows and columns of the whole: {what} would be another site's",
                expected="a plain model with the whole tensors, gathered first",
                write="plain.load_state_dict({name: p.full_tensor() for name, p in model.named_parameters()})",
            )


def whole_here(model: nn.Module, what: str) -> None:
    """Raise for a model of which this process may hold a part only. See `refuse_sharded`."""
    if distributed.is_available() and distributed.is_initialized():
        refuse_sharded(model.named_parameters(), what)
        size = getattr(model, "_tp_size", None)  # shards that are plain tensors
        if isinstance(size, int) and size > 1:
            raise BadArgument(
                f"this model's layers are split over {size} processes (tensor parallelism), so {what} would be of the "
                "part that is here",
                expected="a model that is whole in this process",
                write="ns.load(name) without tp_plan",
            )
