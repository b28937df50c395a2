"""The alignment of a matrix's update with a pair of low-rank factors, whose product is not computed."""

from __future__ import annotations

import torch
from torch import Tensor

from nnsplice.errors import BadArgument

#: Rounding noise of double precision in what is computed here: a cosine this near to 1 is 1.
NOISE = 1e-14
#: The numbers of an update that are read at once: two megabytes in double precision.
BLOCK = 1 << 18
#: Singular values of a factor below this share of the largest one are rounding noise.
RANK_TOLERANCE = 1e-12


def cosine(left: Tensor, right: Tensor, update: Tensor) -> float:
    """The cosine of `left @ right`, `[out, r] @ [r, in]`, with `update`, `[out, in]`; 0.0 where either is zero.

    Both factors become an orthonormal part and a small triangle first, so that the norm of the product is computed from
    the product of the triangles: exact also where the factors nearly cancel. Costs O(r · out · in).
    """
    b, a = _normalised(left, "lora_B"), _normalised(right, "lora_A")
    if b is None or a is None:
        return 0.0
    qb, rb = torch.linalg.qr(b)
    qa, ra = torch.linalg.qr(a.mT)
    core = rb @ ra.mT
    found, energy = _projected(qb, qa, update)
    size = float(core.norm()) * energy**0.5
    return _clipped(float((core * found).sum()) / size, -1.0) if size else 0.0


def subspace_share(left: Tensor, right: Tensor, update: Tensor) -> float:
    """The share of the update's energy that lies in the columns of `left` and the rows of `right`: from 0 to 1."""
    b, a = _normalised(left, "lora_B"), _normalised(right, "lora_A")
    if b is None or a is None:
        return 0.0
    found, energy = _projected(_basis(b), _basis(a.mT), update)
    return _clipped(float(found.square().sum()) / energy, 0.0) if energy else 0.0


def _projected(left: Tensor, right: Tensor, update: Tensor) -> tuple[Tensor, float]:
    """`left.T @ update @ right` and the update's energy, both of the update divided by its largest number.

    Goes through the update in double precision by some rows at a time, which stay in the cache.
    """
    largest = _largest(update, "the update")
    found = left.new_zeros(left.shape[1], right.shape[1])
    energy = 0.0
    if largest == 0.0:
        return found, energy
    rows = max(1, BLOCK // max(update.shape[1], 1))
    for start in range(0, update.shape[0], rows):
        part = update[start : start + rows].detach().double() / largest
        found += left[start : start + rows].mT @ (part @ right)
        energy += float(torch.linalg.vector_norm(part)) ** 2
    return found, energy


def singular_values(left: Tensor, right: Tensor) -> Tensor:
    """The singular values of `left @ right`, largest first, as many as the factors have ranks; float64."""
    b, a = left.detach().double(), right.detach().double()
    width = min(b.shape[0], b.shape[1], a.shape[1])
    if not (torch.isfinite(b).all() and torch.isfinite(a).all()):
        return torch.full((width,), torch.nan, dtype=torch.float64)
    rb, ra = torch.linalg.qr(b, mode="r")[1], torch.linalg.qr(a.mT, mode="r")[1]
    return torch.linalg.svdvals(rb @ ra.mT)


def _normalised(tensor: Tensor, name: str) -> Tensor | None:
    """In double precision, divided by its largest number, so that squares neither vanish nor overflow."""
    largest = _largest(tensor, name)
    return tensor.detach().double() / largest if largest else None


def _largest(tensor: Tensor, name: str) -> float:
    largest = float(torch.linalg.vector_norm(tensor.detach(), float("inf"))) if tensor.numel() else 0.0
    if not largest < float("inf"):
        raise BadArgument(f"{name} holds numbers that are not finite", expected="a run that did not diverge")
    return largest


def _basis(matrix: Tensor) -> Tensor:
    """Orthonormal columns that span those of a matrix."""
    u, s, _ = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, s > RANK_TOLERANCE * s[0]]


def _clipped(number: float, least: float) -> float:
    if number > 1.0 - NOISE:
        return 1.0
    return max(number, least)
