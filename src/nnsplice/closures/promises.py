"""The promises of each kind of site, and the results of measuring them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nnsplice.atlas import Site
from nnsplice.paths import Path

PromiseKind = Literal[
    "stream",
    "mid",
    "attn",
    "mixer",
    "cross",
    "mlp",
    "heads",
    "q",
    "k",
    "v",
    "gate",
    "ungated",
    "pattern",
    "written pattern",
    "neurons",
    "experts",
]

#: What closures call the tower of cross-attention: its layers are the decoder's.
CROSS = "cross"

#: PromiseKind -> how a message calls its sites, and what they promise.
PROMISES: dict[PromiseKind, tuple[str, str]] = {
    "stream": (
        ".input and .output",
        "what one layer puts out is what the next is given, or the head, a vector for each token",
    ),
    "mid": (".mid", "it is input + attn.output, goes on beside the MLP, and with mlp.output makes the layer's output"),
    "attn": (".attn.output", "it is what attention adds to the stream: input + attn.output + mlp.output is the output"),
    "mixer": (
        ".mixer.output",
        "it is what the mixing of tokens adds to the stream: input + mixer.output + mlp.output is the output",
    ),
    "cross": (".cross.output", "it is what cross-attention adds to the stream"),
    "mlp": (".mlp.output", "it is what the MLP adds to the stream: input + attn.output + mlp.output is the output"),
    "heads": (".heads[:].output", "each slice is one head's, and through the output projection they make attn.output"),
    "q": (".heads[:].q", "the query of one head moves that head's slice and no other"),
    "k": (".groups[:].k", "the key of one group moves the slices of its heads and no others"),
    "v": (".groups[:].v", "the value of one group moves the slices of its heads, column by column, and no others"),
    "gate": (".heads[:].gate", "the gate of one head moves that head's slice, column by column, and no other"),
    "ungated": (".heads[:].ungated", "times the sigmoid of the gate it is the head's slice"),
    "pattern": (".heads[:].pattern", "these are the shares with which a head mixes values: not negative, 1 at most"),
    "written pattern": ("writes to .heads[:].pattern", "pattern @ v is the head's slice"),
    "neurons": (".neurons[:].output", "through the last matrix of the MLP they make its output"),
    "experts": (".experts[:].output", "what single experts contribute makes what all of them do"),
}


@dataclass(frozen=True, slots=True)
class Closure:
    """One promise of one layer, measured."""

    kind: PromiseKind
    tower: str
    layer: int
    #: By how much it is missed, relative to the size of what was added; infinite where there is nothing to compare.
    gap: float
    #: What rounding may do.
    allowed: float
    #: What was compared, or why nothing could be.
    found: str = ""

    @property
    def holds(self) -> bool:
        """Whether the promise is kept."""
        return self.gap <= self.allowed


def kind_of(path: Path) -> PromiseKind | None:
    """The kind of an expanded path; None for a native one and for sites that are what their module's name says."""
    names = [step.name for step in path.steps]
    if path.native or names[0] not in ("layers", "embed"):
        return None
    if len(names) == 1:
        return "mid" if path.value == "mid" else "stream"
    match names[-1].removeprefix("cross."), path.value or "output":
        case "heads", "pattern":
            # What is written in its place, and what that is made of, are sites of another kind.
            return "pattern" if isinstance(path.site, Site) and path.site.kind == "pattern" else "written pattern"
        case "heads" | "groups" as part, "output":
            return "heads" if part == "heads" else None
        case "heads" | "groups", ("q" | "k" | "v" | "gate" | "ungated") as role:
            return role
        case ("attn" | "mixer" | "cross" | "mlp" | "q" | "k" | "v" | "neurons" | "experts") as part, "output":
            return part
    return None


# --- sizes ------------------------------------------------------------------------------------------------------------


def gap(terms: list[Tensor], total: Tensor) -> float:
    """The largest difference between a sum and what it should be, each number relative to the sizes of its terms.

    Rounding is bounded by these sizes, number by number, so a small branch beside a large stream is measured as well.
    """
    if any(term.numel() != total.numel() for term in terms):
        return float("inf")
    expected = _wide(total)
    parts = [_wide(term).reshape(expected.shape) for term in terms]
    size = sum((part.abs() for part in parts), expected.abs())
    return largest((sum(parts) - expected).abs(), size)


def largest(difference: Tensor, size: Tensor) -> float:
    """The largest quotient, where nothing over nothing is nothing."""
    share = difference / size.clamp_min(torch.finfo(size.dtype).tiny)
    return float(share.nan_to_num(float("inf")).max()) if share.numel() else 0.0


def tolerance(*tensors: Tensor, computed: bool = False) -> float:
    """What rounding may do to a sum of these, relative to their sizes.

    Args:
        computed: products were taken again, in an order that may be another: half of the digits.
    """
    eps = max((torch.finfo(t.dtype).eps for t in tensors if t.is_floating_point()), default=2.0**-52)
    return max(eps**0.5 if computed else 4 * eps, 1e-10)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float64)
