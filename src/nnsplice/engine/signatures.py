"""The arguments that a module's `forward` takes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

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
        """The first argument, which most modules are called with by site."""
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


#: What models of transformers take, and all that is known of others where nothing was asked.
ANY = Taken((), (), open=True)


def as_taken(taken: Taken, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our inputs under the names that a forward has for them.

    A mask that masks nothing is left out where it is not taken; tokens go to the first argument where they have
    another name.

    Raises:
        BadArgument: the forward does not take what it would need.
    """
    kept: dict[str, Tensor] = {}
    for name, value in inputs.items():
        if taken.takes(name):
            kept[name] = value
        elif name == "input_ids" and taken.first is not None and taken.first not in inputs:
            kept[taken.first] = value
        elif not (name.endswith("attention_mask") and bool(value.bool().all())):
            raise BadArgument(
                f"this model's forward takes no {name}, and these prompts need one",
                expected=f"prompts for what it takes: {', '.join(taken.names) or 'nothing'}",
            )
    return kept
