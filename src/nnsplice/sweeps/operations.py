"""Operations of a sweep: replace a value, add to it, compute it, or cut an attention edge.

There are four ways to change a run: `patch`, `mean` and `resample` replace a value by one from another run or capture;
`add` and `noise` add a value; `zero` and a function of the user's compute the new value from the current one; and
`knockout` removes keys from the softmax of a query.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from nnsplice.activations.algebra import interchanged
from nnsplice.digests import function_digest
from nnsplice.errors import BadArgument, BadType, ShapeError, named
from nnsplice.subspaces import Subspace

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
#: Operations that need a capture as the source of values.
NEEDS_REFERENCE = ("mean", "resample", "add")


@dataclass(frozen=True)
class Operation:
    """A named operation, or a function `[row, width] -> [row, width]`."""

    name: str
    way: Way
    compute: Callable[[Tensor], Tensor] | None = None
    #: The subspace that is changed; None for the whole value.
    subspace: Subspace | None = None

    @property
    def reads(self) -> bool:
        """Whether the current value is needed to compute the new one (an addition does not need it)."""
        return self.way == "compute" or self.name == "noise" or self.subspace is not None

    @property
    def identity(self) -> Any:
        """The identity of an operation, as plain data."""
        operation: Any = self.name
        if self.name not in NAMES:
            operation = {"function": self.name, "source": function_digest(self.compute)}
        if self.subspace is None:
            return operation
        return {"operation": operation, "subspace": dict(self.subspace.identity)}

    def apply(self, current: Tensor, value: Tensor | None) -> Tensor:
        """The new values of these rows.

        Args:
            current: `[row, width]`, what the run computed.
            value: the replacement, or the addend; None if the value is computed.
        """
        new = self._whole(current, value)
        if self.subspace is None:
            return new
        check_width(self.subspace, current.shape[-1])
        return interchanged(current, new, self.subspace.basis)

    def _whole(self, current: Tensor, value: Tensor | None) -> Tensor:
        """The new values, before the restriction to a subspace."""
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
            # Standard normal noise, scaled to the root mean square of the current value.
            value = value * current.pow(2).mean(-1, keepdim=True).sqrt()
        return value.expand_as(current) if self.way == "replace" else current + value


def check_width(subspace: Subspace, width: int, place: object = None) -> None:
    """Raise for a site of another width than the subspace."""
    if subspace.width != width:
        raise ShapeError(
            f"this site is {width} wide, and the subspace is of {subspace.place}, which is {subspace.width} wide",
            path=place,
            expected="sites of one width with the subspace",
        )


def operation_of(given: str | Callable[[Tensor], Tensor], subspace: Subspace | None = None) -> Operation:
    """The operation of a name or a function, on the whole value or on its part in a subspace."""
    operation = _named(given)
    if subspace is None:
        return operation
    if not isinstance(subspace, Subspace):
        raise BadType(
            f"{named(subspace)} is no subspace", expected="an ns.Subspace", write="ns.Subspace.of(site, vectors)"
        )
    if operation.way == "cut":
        raise BadArgument("edges of attention are cut or not, they have no part in a subspace", expected="no subspace=")
    if not subspace.k:
        raise BadArgument("the subspace has no dimensions, so nothing would change", expected="at least one")
    return replace(operation, subspace=subspace)


def _named(given: str | Callable[[Tensor], Tensor]) -> Operation:
    if isinstance(given, str):
        if given not in NAMES:
            raise BadArgument(f"there is no operation {given!r}", expected=f"{', '.join(NAMES)}, or a function")
        return Operation(given, NAMES[given], torch.zeros_like if given == "zero" else None)
    if not callable(given):
        raise BadType(f"an operation of type {type(given).__name__}", expected=f"{', '.join(NAMES)}, or a function")
    name = getattr(given, "__name__", type(given).__name__)
    # A user's function may have the name of an operation.
    return Operation(f"{name}()" if name in NAMES else name, "compute", given)
