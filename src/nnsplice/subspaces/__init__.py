"""Subspaces: parts of a place that are smaller than the place.

subspace    Subspace, the value: an orthonormal basis at one address
bases       vectors -> orthonormal bases, principal angles, intersections
storage     files
"""

from nnsplice.subspaces.subspace import Subspace

__all__ = ["Subspace"]


def __dir__() -> list[str]:  # what <TAB> shows
    return __all__
