"""The sites that a steering vector has directions for."""

from __future__ import annotations

from torch import Tensor

from nnsplice.activations import SavedActivation
from nnsplice.errors import BadArgument
from nnsplice.paths import Path

#: The advice for a vector of zeros.
NOT_ZERO = "a direction that is not zero, such as ns.steering.fit makes of states that differ"
LEAVE_OUT = "vector.subset([key for key in vector if vector[key].any()])"


def layer_of(path: Path) -> int | None:
    """The layer of a site: the first number in its address."""
    return next((step.index for step in path.steps if isinstance(step.index, int)), None)


def vectors_of(vector: SavedActivation) -> list[tuple[Path, Tensor]]:
    """Every site with its direction `[width]`.

    Raises:
        BadArgument: several positions of one site, or an empty vector.
    """
    found: list[tuple[Path, Tensor]] = []
    for pack in vector._packs:
        key, *more = pack.keys
        if more:
            raise BadArgument(
                f"{len(pack.keys)} positions of one site, and it is steered by one direction",
                path=key.place,
                write="vector.subset('layers[:].output[-1]') or vector.mean('position')",
            )
        found.append((key, pack.tensor[0, 0]))
    if not found:
        raise BadArgument("this vector is empty, so steering with it would do nothing")
    return found
