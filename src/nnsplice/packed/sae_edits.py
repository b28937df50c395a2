"""Edits of features and errors of an attached SAE."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from nnsplice.activations import features
from nnsplice.activations.access import site_of
from nnsplice.atlas import Site, host
from nnsplice.atlas.attached import Features
from nnsplice.paths import Path


@dataclass(frozen=True)
class PartChange:
    """What becomes of parts of one SAE. What several of them change by at one token adds up."""

    sae: Features
    #: See `rows.Change`: here of the part's own values, `[row, 1]` of features, `[row, width]` of errors.
    change: Callable[[Tensor, Tensor | None], Tensor]

    def steps(self, values: Tensor, given: Tensor | None, sites: Sequence[Site]) -> Tensor:
        """What `[row, width]` values change by.

        Args:
            given: what was given for the part of each row.
            sites: the part that each row is about, all of one kind.
        """
        old = features.each(self.sae, sites, values)
        return features.moved_each(self.sae, sites, self.change(old, given).to(old) - old, values)


def is_part(place: Path) -> bool:
    """Whether a site is a feature or an error."""
    return site_of(place).kind in features.KINDS


def home(place: Path) -> Site:
    """Where the value stands that a site is a part of, or that it is."""
    return site_of(host(place) if is_part(place) else place)
