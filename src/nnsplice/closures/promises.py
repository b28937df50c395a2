"""The promise of each kind of site, and the result of measuring it."""

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

#: The tower name of closures of cross-attention, which is part of the decoder's layers.
CROSS = "cross"

#: The gap of a promise that could not be measured.
UNMEASURED = float("inf")

#: The sites of each kind, as a message names them, and their promise.
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
    """The measurement of one promise in one layer."""

    kind: PromiseKind
    tower: str
    layer: int
    #: How far the promise is from holding, relative to the compared values; `UNMEASURED` if nothing could be compared.
    gap: float
    #: The gap that rounding may cause.
    allowed: float
    #: What was found, for a message.
    found: str = ""

    @property
    def holds(self) -> bool:
        """Whether the promise holds."""
        return self.gap <= self.allowed


def kind_of(path: Path) -> PromiseKind | None:
    """The kind of an expanded path; None for paths that promise nothing but their module."""
    names = [step.name for step in path.steps]
    if path.native or names[0] not in ("layers", "embed"):
        return None
    if len(names) == 1:
        return "mid" if path.value == "mid" else "stream"
    match names[-1].removeprefix("cross."), path.value or "output":
        case "heads", "pattern":
            # A written pattern is expanded to other sites, which promise more.
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
    """The largest difference between the sum of terms and a total, each number relative to the sizes of its terms.

    Rounding is bounded by these sizes, number by number, so a small branch next to a large stream is measured as well.
    """
    if any(term.numel() != total.numel() for term in terms):
        return UNMEASURED
    expected = _float64(total)
    parts = [_float64(term).reshape(expected.shape) for term in terms]
    size = sum((part.abs() for part in parts), expected.abs())
    return largest((sum(parts) - expected).abs(), size)


def largest(difference: Tensor, size: Tensor) -> float:
    """The largest quotient, where 0 / 0 is 0 and NaN is infinite."""
    share = difference / size.clamp_min(torch.finfo(size.dtype).tiny)
    return float(share.nan_to_num(float("inf")).max()) if share.numel() else 0.0


def tolerance(*tensors: Tensor, computed: bool = False) -> float:
    """The rounding error of a sum of these tensors, relative to their sizes.

    Args:
        computed: values were computed again, possibly in another order: half of the digits.
    """
    eps = max((torch.finfo(t.dtype).eps for t in tensors if t.is_floating_point()), default=2.0**-52)
    return max(eps**0.5 if computed else 4 * eps, 1e-10)


def _float64(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float64)
