"""The arguments that a module's `forward` takes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

from nnsplice.errors import BadArgument


@dataclass(frozen=True, slots=True)
class Signature:
    """The arguments of one `forward`."""

    names: tuple[str, ...]
    #: The names without a default.
    required: tuple[str, ...]
    #: Whether it has `**kwargs`.
    open: bool

    @property
    def first(self) -> str | None:
        """The first argument, which most modules are given by position."""
        return self.names[0] if self.names else None

    def takes(self, name: str) -> bool:
        """Whether an argument of this name is accepted."""
        return self.open or name in self.names


@lru_cache(maxsize=256)
def signature_of(kind: type) -> Signature:
    """The signature of a class's `forward`."""
    found = list(inspect.signature(kind.forward).parameters.values())[1:]
    named = [p for p in found if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return Signature(
        tuple(p.name for p in named),
        tuple(p.name for p in named if p.default is p.empty),
        any(p.kind == p.VAR_KEYWORD for p in found),
    )


#: Accepts every name; for models whose `forward` was not inspected.
ANY_SIGNATURE = Signature((), (), open=True)


def fitted_inputs(signature: Signature, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inputs under the names of a `forward`.

    A mask that masks nothing is left out if it is not accepted; tokens go to the first argument if it has another name.

    Raises:
        BadArgument: an input has no argument.
    """
    kept: dict[str, Tensor] = {}
    for name, value in inputs.items():
        if signature.takes(name):
            kept[name] = value
        elif name == "input_ids" and signature.first is not None and signature.first not in inputs:
            kept[signature.first] = value
        elif not (name.endswith("attention_mask") and bool(value.bool().all())):
            raise BadArgument(
                f"this model's forward takes no {name}, and these prompts need one",
                expected=f"prompts for what it takes: {', '.join(signature.names) or 'nothing'}",
            )
    return kept
