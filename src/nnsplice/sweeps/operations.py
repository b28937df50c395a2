"""What a sweep does to a place: replace its value, add to it, compute it anew, or cut an edge of attention.

Seven names and functions, four ways: `patch`, `mean` and `resample` replace by a value from elsewhere, `add` and
`noise` add one, `zero` and a function of the user's compute the new value from the current one, and `knockout` takes
keys out of the softmax of a query.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from nnsplice.digests import function_digest
from nnsplice.errors import BadArgument, BadType, named

Way = Literal["replace", "add", "compute", "cut"]
NAMES: dict[str, Way] = {
    "patch": "replace",
    "mean": "replace",
    "resample": "replace",
    "add": "add",
    "noise": "add",
    "zero": "compute",
    "knockout": "cut",
}
#: What needs a capture to take values from.
NEEDS_REFERENCE = ("mean", "resample", "add")


@dataclass(frozen=True)
class Operation:
    """One of the names, or a function `[row, width] -> [row, width]`."""

    name: str
    way: Way
    compute: Callable[[Tensor], Tensor] | None = None

    @property
    def identity(self) -> Any:
        """What makes two operations the same, as plain data."""
        if self.name in NAMES:
            return self.name
        return {"function": self.name, "source": function_digest(self.compute)}

    def apply(self, current: Tensor, value: Tensor | None) -> Tensor:
        """The new values of these rows.

        Args:
            current: `[row, width]`, what the run computed.
            value: what to replace by or to add; None where the value is computed.
        """
        if self.way == "compute":
            assert self.compute is not None
            new = self.compute(current)
            if not isinstance(new, Tensor) or new.shape != current.shape:
                found = f"shape {list(new.shape)}" if isinstance(new, Tensor) else f"{named(new)}"
                raise BadArgument(
                    f"the operation {self.name} made {found} of {list(current.shape)}", expected="the same shape"
                )
            return new.to(current)
        assert value is not None
        value = value.to(current)
        if self.name == "noise":
            # Standard normal numbers come in; they are made as large as the value's own are in the mean.
            value = value * current.pow(2).mean(-1, keepdim=True).sqrt()
        return value.expand_as(current) if self.way == "replace" else current + value


def operation_of(given: str | Callable[[Tensor], Tensor]) -> Operation:
    """The operation that a name or a function means."""
    if isinstance(given, str):
        if given not in NAMES:
            raise BadArgument(f"there is no operation {given!r}", expected=f"{', '.join(NAMES)}, or a function")
        return Operation(given, NAMES[given], torch.zeros_like if given == "zero" else None)
    if not callable(given):
        raise BadType(f"an operation of type {type(given).__name__}", expected=f"{', '.join(NAMES)}, or a function")
    return Operation(getattr(given, "__name__", type(given).__name__), "compute", given)
