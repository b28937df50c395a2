"""Orthonormal bases as plain tensors `[width, k]` in float64: made of vectors, compared, joined."""

from __future__ import annotations

import torch
from torch import Tensor

from nnsplice.errors import BadArgument, ShapeError

#: Sines of principal angles below which two directions are one, for intersections and unions.
SAME = 1e-8


def orthonormal(vectors: Tensor) -> Tensor:
    """A basis `[width, k]` of the span of `[k, width]` vectors; orthonormal vectors are kept as they are.

    Raises:
        ShapeError: not `[k, width]`, or more vectors than numbers in each.
        BadArgument: numbers that are not finite, or vectors that depend on each other.
    """
    if vectors.dim() != 2 or not vectors.shape[1]:
        raise ShapeError(f"vectors of shape {list(vectors.shape)}", expected="[k, width]")
    if not vectors.shape[0]:
        raise BadArgument("no vectors, so they span nothing", expected="at least one vector")
    if not vectors.is_floating_point():
        raise BadArgument(f"vectors of {vectors.dtype}", expected="real numbers")
    if not bool(torch.isfinite(vectors).all()):
        raise BadArgument("the vectors hold NaN or infinity", expected="finite numbers")
    count, width = vectors.shape
    if count > width:
        raise ShapeError(f"{count} vectors of width {width} depend on each other", expected=f"at most {width} vectors")
    wide = vectors.detach().cpu().double()
    lengths = wide.norm(dim=1, keepdim=True)
    if not bool((lengths > 0).all()):
        raise BadArgument("a zero vector has no direction", expected="vectors that do not depend on each other")
    unit = wide / lengths
    rank = int((torch.linalg.svdvals(unit) > tolerance(vectors)).sum())
    if rank < count:
        raise BadArgument(
            f"{count} vectors of rank {rank} depend on each other, as far as {vectors.dtype} can tell",
            expected=f"{rank} of them that do not",
        )
    basis, upper = torch.linalg.qr(unit.T)
    return basis * torch.sign(upper.diagonal())


def tolerance(vectors: Tensor) -> float:
    """Singular values of unit vectors below this are rounding in the dtype that the vectors had."""
    return max(vectors.shape) * torch.finfo(vectors.dtype).eps


def angles(a: Tensor, b: Tensor) -> Tensor:
    """The principal angles of two bases in radians, smallest first: `[min(k)]`; small ones to the last digit too."""
    if a.shape[1] < b.shape[1]:
        a, b = b, a
    cosines = torch.linalg.svdvals(a.T @ b).clamp(max=1.0)
    # An angle near 0 has a cosine that rounds to 1; its sine does not round.
    sines = torch.linalg.svdvals(b - a @ (a.T @ b)).flip(0).clamp(max=1.0)
    return torch.where(cosines**2 > 0.5, torch.asin(sines), torch.acos(cosines))


def common(a: Tensor, b: Tensor) -> Tensor:
    """A basis of the intersection: `[width, k]`; k may be 0."""
    left, _, _ = torch.linalg.svd(a.T @ b)
    shared = int((torch.sin(angles(a, b)) < SAME).sum())
    return a @ left[:, :shared]


def joined(a: Tensor, b: Tensor) -> Tensor:
    """A basis of the sum of both: the first basis, and the part of the second that is not in it."""
    rest = b - a @ (a.T @ b)
    left, sines, _ = torch.linalg.svd(rest, full_matrices=False)
    new = left[:, sines > SAME]
    basis, _ = torch.linalg.qr(torch.cat([a, new], dim=1))
    return basis
