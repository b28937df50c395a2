"""A site: one activation of one model that can be read and written, as plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

End = Literal["input", "output"]
#: How a value is met. `plain`: it stands in a tensor, and a write replaces the tensor. `stream`: it stands in a tensor
#: that a skip path carries on beside the module, so a write must reach both. `pattern`, `expert` and `ungated`, a slice
#: before its gate, are derived from several values (`activations/derived.py`). `feature` and `error` are what an
#: attached SAE makes of a plain value; `transcoded` is a feature of one that reads this value and is written at another
#: site.
SiteKind = Literal["plain", "stream", "pattern", "expert", "ungated", "feature", "error", "transcoded"]
#: The kinds that are computed from values, and stand in none.
DERIVED: tuple[SiteKind, ...] = ("pattern", "expert", "ungated", "feature", "error", "transcoded")


@dataclass(frozen=True, slots=True)
class Site:
    """Where a value is met during the forward pass, and which part of it is meant.

    The identity of a site: two paths to the same site are equal, however they are spelled.
    """

    #: The module's dotted name under the root (`transformer.h.3.attn.c_proj`; empty for the root itself).
    module: str
    #: Which end of it: its first input or its output.
    end: End = "output"
    #: Which element of a container; None takes the first of a tuple and a tensor as it is.
    item: int | None = None
    #: The columns of the last axis that are meant; None for all.
    columns: tuple[int, int] | None = None
    #: Which call of a module that runs several times in one pass.
    occurrence: int = 0
    kind: SiteKind = "plain"
    #: The head of a pattern or of a slice before its gate, or the number of an expert or a feature.
    index: int | None = None
    #: Which tower's tokens the positions count.
    tower: Literal["encoder", "decoder"] = "decoder"
    #: The name of the SAE that a feature or an error is of.
    sae: str | None = None

    @property
    def location(self) -> tuple[str, str, int]:
        """What one access serves: every site with this location is read and written together."""
        return (self.module, self.end, self.occurrence)


def native_text(name: str | None) -> str:
    """A dotted module name as a native path writes it: `transformer.h.3.attn` -> `transformer.h[3].attn`."""
    text = ""
    for part in (name or "").split("."):
        text += f"[{part}]" if part.isdigit() else f".{part}" if text else part
    return text
