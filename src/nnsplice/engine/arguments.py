"""Which arguments a module's call takes, and which of ours it is given."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import Tensor

from nnsplice.errors import BadArgument


@dataclass(frozen=True, slots=True)
class Taken:
    """The arguments of one `forward`."""

    #: Those with a name.
    names: tuple[str, ...]
    #: Those of them without a default.
    required: tuple[str, ...]
    #: Whether any other name is taken too.
    open: bool

    @property
    def first(self) -> str | None:
        """The first argument, which most modules are called with by place."""
        return self.names[0] if self.names else None

    def takes(self, name: str) -> bool:
        """Whether the call may be given an argument of this name."""
        return self.open or name in self.names


@lru_cache(maxsize=256)
def taken_by(kind: type) -> Taken:
    """What the forward of a class takes."""
    found = list(inspect.signature(kind.forward).parameters.values())[1:]
    named = [p for p in found if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return Taken(
        tuple(p.name for p in named),
        tuple(p.name for p in named if p.default is p.empty),
        any(p.kind == p.VAR_KEYWORD for p in found),
    )


def accepted(kind: type, inputs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Our inputs as a class's forward takes them: `(args, kwargs)`.

    A mask that masks nothing is left out where it is not taken; tokens go by place where they have another name.

    Raises:
        BadArgument: the forward does not take what it would need.
    """
    takes = taken_by(kind)
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    for name, value in inputs.items():
        if takes.takes(name):
            kwargs[name] = value
        elif name == "input_ids" and takes.first is not None and not args and takes.first not in inputs:
            args = (value,)
        elif not (name.endswith("attention_mask") and isinstance(value, Tensor) and bool(value.bool().all())):
            raise BadArgument(
                f"{kind.__name__}.forward takes no {name}, and these prompts need one",
                expected=f"prompts for what it takes: {', '.join(takes.names) or 'nothing'}",
            )
    return args, kwargs
